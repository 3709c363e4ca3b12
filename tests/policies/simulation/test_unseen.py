"""What a schedule is worth on noise that its search has not seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nestedfp.policies.config import Slo
from nestedfp.policies.simulation.oracle import LEVELS, figures, replay
from nestedfp.policies.simulation.state import Columns, EngineSettings
from nestedfp.policies.simulation.unseen import DRAWS, hold

SETTINGS = EngineSettings(noise=0.05)


@pytest.fixture
def workload(load: Callable[..., Columns]) -> Columns:
    return load(60.0, 20.0)


def test_the_draws_of_noise_differ_and_a_draw_is_repeatable(workload: Columns) -> None:
    schedule = np.full((25, 2), 3, dtype=np.int8)
    runs = [
        replay(workload, schedule, seed=1, settings=SETTINGS, slo=Slo(), noise_seed=draw)["finish_s"]
        for draw in (DRAWS[0], DRAWS[0], DRAWS[1])
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_schedule_that_does_not_keep_the_attainment_is_tightened_until_it_does(workload: Columns) -> None:
    free = np.zeros((25, 2), dtype=np.int8)
    fp8 = np.full_like(free, len(LEVELS) - 1)
    drawn = [
        figures(replay(workload, fp8, seed=1, settings=SETTINGS, slo=Slo(), noise_seed=draw), Slo())[1]
        for draw in DRAWS
    ]
    best = float(np.mean(drawn))
    held = hold(workload, free, best - 0.02, seed=1, settings=SETTINGS, slo=Slo())
    assert held.found_share == 1.0
    assert held.found_attainment < best - 0.02
    assert held.share is not None
    assert 0.0 < held.share < 1.0


def test_what_no_schedule_keeps_has_no_share(workload: Columns) -> None:
    held = hold(workload, np.zeros((25, 2), dtype=np.int8), 1.1, seed=1, settings=SETTINGS, slo=Slo())
    assert held.share is None
