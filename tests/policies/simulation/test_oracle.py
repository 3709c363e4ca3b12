"""The oracle: a schedule does what a policy of the same orders does, and the search stays below its bound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nestedfp.policies.config import PolicyConfig, Slo
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation.cluster import simulate
from nestedfp.policies.simulation.oracle import LEVELS, figures, replay, schedule_of, search, share_bound
from nestedfp.policies.simulation.state import Columns, EngineSettings

Load = Callable[..., Columns]

SETTINGS = EngineSettings(noise=0.0, flip_s=0.0)


@pytest.mark.parametrize(("policy", "level"), [("static-fp16", 0), ("static-fp8", len(LEVELS) - 1)])
def test_the_ends_of_the_levels_are_the_static_policies(load: Load, policy: str, level: int) -> None:
    workload = load(20.0)
    outcome = simulate(
        workload, Policy(PolicyConfig(controller=policy)), replicas=2, seed=3, settings=SETTINGS
    )
    schedule = np.full((40, 2), level, dtype=np.int8)
    requests = replay(workload, schedule, seed=3, settings=SETTINGS, slo=Slo())
    np.testing.assert_allclose(requests["finish_s"], outcome.requests["finish_s"], rtol=1e-12)
    share, _ = figures(requests, Slo())
    assert share == (1.0 if level == 0 else 0.0)


def test_levels_trade_tokens_in_16_bits_for_attainment(load: Load) -> None:
    workload = load(40.0)
    reached = []
    for level in (0, 3, 6, len(LEVELS) - 1):
        schedule = np.full((40, 2), level, dtype=np.int8)
        reached.append(figures(replay(workload, schedule, seed=1, settings=SETTINGS, slo=Slo()), Slo()))
    shares, attainments = zip(*reached, strict=True)
    assert list(shares) == sorted(shares, reverse=True)
    assert attainments[0] < attainments[-1]


def test_the_search_keeps_the_attainment_and_does_not_pass_the_bound(load: Load) -> None:
    workload = load(40.0)
    policy = Policy(PolicyConfig(controller="predictive"))
    outcome = simulate(workload, policy, replicas=2, seed=1, settings=SETTINGS)
    start = schedule_of(outcome)
    found = search(
        workload, 0.95, replicas=2, seed=1, settings=SETTINGS, slo=Slo(), starts=(start,), tries=80
    )
    assert found.attainment >= 0.95
    assert found.tried <= 80
    again = figures(replay(workload, found.schedule, seed=1, settings=SETTINGS, slo=Slo()), Slo())
    assert again == (found.share, found.attainment)
    constant = [
        figures(
            replay(workload, np.full((40, 2), level, dtype=np.int8), seed=1, settings=SETTINGS, slo=Slo()),
            Slo(),
        )
        for level in range(len(LEVELS))
    ]
    assert found.share >= max(share for share, attainment in constant if attainment >= 0.95)
    bound = share_bound(workload, found.attainment, replicas=2, settings=SETTINGS, slo=Slo())
    assert found.share <= bound <= 1.0


def test_the_bound_falls_with_the_load(load: Load) -> None:
    bounds = [
        share_bound(load(rate), 1.0, replicas=2, settings=SETTINGS, slo=Slo()) for rate in (5.0, 100.0, 150.0)
    ]
    assert bounds[0] == 1.0 > bounds[1] > bounds[2]
