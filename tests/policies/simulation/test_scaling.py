"""Simulated autoscaling: when replicas start and leave, what they cost, and Serve's rule by its formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nestedfp.policies.autoscaling import ScalingConfig
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig, Slo
from nestedfp.policies.policy import Policy
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulation.cluster import Outcome, simulate
from nestedfp.policies.simulation.scaling import JointScaler, Scaler, ServeScaler
from nestedfp.policies.simulation.state import Columns, thickened, thinned
from nestedfp.policies.snapshot import ReplicaView

MakeView = Callable[..., ReplicaView]


def arrivals(rate: float, seconds: float, seed: int = 1) -> Columns:
    random = np.random.default_rng(seed)
    count = int(rate * seconds)
    return Columns(
        np.cumsum(random.exponential(1.0 / rate, count)),
        np.full(count, 1000, dtype=np.int32),
        np.full(count, 100, dtype=np.int32),
        np.zeros(count, dtype=np.bool_),
    )


class Stairs:
    """Wants what its steps say: (second, replicas)."""

    interval_s = 1.0
    min_replicas = 1
    max_replicas = 3

    def __init__(self, *steps: tuple[float, int]) -> None:
        self.steps = steps

    def replicas(self, views: object, ordered: int, now: float, fixed: object) -> int:
        return [count for at, count in self.steps if now >= at][-1]


def run(
    load: Columns, scaler: Scaler, startup_s: float, start: int = 1, policy: str = "static-fp16"
) -> Outcome:
    config = PolicyConfig(controller=policy)
    return simulate(load, Policy(config), replicas=start, seed=1, scaler=scaler, startup_s=startup_s)


def test_a_replica_serves_after_its_start_and_leaves_when_it_has_finished() -> None:
    outcome = run(arrivals(5.0, 60.0), Stairs((0.0, 1), (10.0, 2), (40.0, 1)), startup_s=15.0)
    active = np.array(outcome.timeline.active)
    assert set(active[:25]) == {1}
    assert set(active[26:40]) == {2}
    assert set(active[42:55]) == {1}
    assert np.isfinite(outcome.requests["finish_s"]).all()
    second = outcome.requests["arrival_s"][outcome.requests["replica"] == 1]
    assert 25.0 <= second.min() < second.max() <= 41.1
    # One replica throughout, the other from its order to its last token.
    last = outcome.requests["arrival_s"][-1]
    assert last + 30.0 <= outcome.replica_seconds <= last + 33.0


def test_serves_rule_follows_its_formula_and_delays(view: MakeView) -> None:
    rule = ServeScaler(
        min_replicas=1, max_replicas=10, target_ongoing_requests=4.0, upscale_delay_s=5.0, look_back_s=0.0
    )
    busy = [view("a", running=9, waiting=4), view("b", running=4, waiting=0)]
    assert [rule.replicas(busy, 2, float(second)) for second in range(7)] == [2, 2, 2, 2, 2, 5, 2]
    idle = [view("a"), view("b")]
    assert rule.replicas(idle, 5, 20.0) == 5
    assert rule.replicas(idle, 5, 619.0) == 5
    assert rule.replicas(idle, 5, 620.0) == 1


def test_a_wish_that_is_interrupted_starts_its_delay_anew(view: MakeView) -> None:
    rule = ServeScaler(
        min_replicas=1, max_replicas=10, target_ongoing_requests=4.0, upscale_delay_s=5.0, look_back_s=0.0
    )
    busy, quiet = [view("a", running=9)], [view("a", running=3)]
    assert [rule.replicas(busy, 1, at) for at in (0.0, 4.0)] == [1, 1]
    assert rule.replicas(quiet, 1, 4.5) == 1
    assert [rule.replicas(busy, 1, at) for at in (5.0, 9.0, 10.0)] == [1, 1, 3]


def test_the_joint_rule_adds_a_replica_when_fp8_is_not_enough_and_takes_it_back() -> None:
    parts = [arrivals(10.0, 60.0), arrivals(45.0, 90.0, 2), arrivals(4.0, 240.0, 3)]
    load = Columns(
        np.concatenate([parts[0].arrival_s, 60.0 + parts[1].arrival_s, 150.0 + parts[2].arrival_s]),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Columns.__slots__[1:]),
    )
    config = ScalingConfig(min_replicas=1, max_replicas=3, spare_s=60.0)
    joint = JointScaler(config=config, slo=Slo(), model=latency_model())
    outcome = run(load, joint, startup_s=20.0, policy="predictive")
    active = np.array(outcome.timeline.active)
    assert set(active[:60]) == {1}
    assert active[80:170].max() >= 2
    assert active[-1] == 1


@pytest.mark.parametrize(("policy", "strict"), [("static-fp16", False), ("predictive", True)])
def test_the_joint_rule_adds_replicas_that_must_stay_in_16_bits(policy: str, strict: bool) -> None:
    load = arrivals(45.0, 60.0)
    load.strict[:] = strict
    joint = JointScaler(
        config=ScalingConfig(min_replicas=1, max_replicas=3), slo=Slo(), model=latency_model()
    )
    outcome = run(load, joint, startup_s=5.0, policy=policy)
    assert {mode for modes in outcome.timeline.modes[5:] for mode in modes} == {0}
    assert max(outcome.timeline.active) > 1


def test_replicas_that_start_as_they_should_never_meet_the_end_of_the_patience() -> None:
    load = arrivals(45.0, 300.0)
    seen = []
    for patience in ({}, {"start_patience_s": 1e9}):
        config = ScalingConfig(min_replicas=1, max_replicas=4, **patience)
        joint = JointScaler(config=config, slo=Slo(), model=latency_model())
        seen.append(run(load, joint, startup_s=120.0, policy="predictive").timeline.active)
    assert max(seen[0]) > 1
    assert seen[0] == seen[1]


def test_copies_keep_the_bursts_and_thinning_the_order() -> None:
    load = arrivals(5.0, 60.0)
    thick = thickened(load, 3, 0.5, seed=1)
    assert len(thick.arrival_s) == 3 * len(load.arrival_s)
    assert (np.diff(thick.arrival_s) >= 0).all()
    assert set(load.arrival_s) <= set(thick.arrival_s)
    thin = thinned(load, 0.5, seed=1)
    assert 0.35 < len(thin.arrival_s) / len(load.arrival_s) < 0.65
    assert set(thin.arrival_s) <= set(load.arrival_s)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InvalidField, match="target_ongoing_requests"):
        ServeScaler(min_replicas=1, max_replicas=2, target_ongoing_requests=0.0)
    with pytest.raises(InvalidField, match="copies"):
        thickened(arrivals(1.0, 5.0), 0, 1.0, seed=1)
