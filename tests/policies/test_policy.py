"""``decide``: hysteresis, dwell, bounds, pins, and facts that must not be decided on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.bounds import step_bounds
from nestedfp.policies.policy import FLIP_WINDOW_S, Assignment, Policy, PolicyState
from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.snapshot import Override, ReplicaView, Snapshot

MakeView = Callable[..., ReplicaView]

SETTINGS: dict[str, Any] = {
    "thresholds": {"waiting": {"high": 8, "low": 1}, "ttft_p90_s": {"high": 0.8, "low": 0.4}},
    "min_dwell_s": 2.0,
    "calm_s": 3.0,
    "return_gap_s": 1.0,
    "max_flips_per_minute": 6,
}


class Run:
    """A policy with its state and a moving clock, one replica unless told otherwise."""

    def __init__(self, view: MakeView, **changes: Any) -> None:
        self.policy = Policy(PolicyConfig.from_dict({**SETTINGS, **changes}))
        self.state: PolicyState = self.policy.start()
        self.view = view
        self.now = 0.0

    def at(self, now: float, override: Override | None = None, **fields: Any) -> Assignment:
        return self.all_at(now, [self.view(**fields)], override)["a"]

    def all_at(
        self, now: float, views: list[ReplicaView], override: Override | None = None
    ) -> dict[str, Assignment]:
        targets, self.state = self.policy.decide(Snapshot(tuple(views), override), self.state, now)
        return targets


def test_high_water_flips_at_once_and_names_the_signal(view: MakeView) -> None:
    target = Run(view).at(0.0, waiting=8)
    assert (target.previous, target.mode) == ("fp16", "fp8")
    assert (target.signal, target.value, target.threshold) == ("waiting", 8, 8.0)


def test_the_signal_furthest_beyond_its_threshold_is_named(view: MakeView) -> None:
    target = Run(view).at(0.0, waiting=9, ttft_p90_s=1.5)
    assert target.signal == "ttft_p90_s"


def test_between_the_waters_nothing_changes(view: MakeView) -> None:
    run = Run(view)
    assert run.at(0.0, waiting=7).mode == "fp16"
    run.at(1.0, waiting=8)
    for second in range(2, 60):
        assert run.at(float(second), waiting=2).mode == "fp8"


def test_return_needs_unbroken_calm_on_every_signal(view: MakeView) -> None:
    run = Run(view)
    run.at(0.0, waiting=8)
    assert run.at(10.0).mode == "fp8"
    assert run.at(12.0, ttft_p90_s=0.5).mode == "fp8"
    assert run.at(13.0).mode == "fp8"
    assert run.at(14.5).mode == "fp8"
    assert run.at(15.9).mode == "fp8"
    returned = run.at(16.0)
    assert (returned.previous, returned.mode) == ("fp8", "fp16")


def test_dwell_holds_a_flip_and_says_so(view: MakeView) -> None:
    run = Run(view, calm_s=0.0)
    run.at(0.0, waiting=8)
    held = run.at(1.0)
    assert held.mode == "fp8"
    assert held.held is not None
    assert "dwell time, 1.00 s left" in held.held
    assert run.at(2.0).mode == "fp16"


def test_panic_overrides_dwell(view: MakeView) -> None:
    run = Run(view, calm_s=0.0)
    run.at(0.0, waiting=8)
    assert run.at(2.0).mode == "fp16"
    assert run.at(2.5, waiting=15).mode == "fp16"
    assert run.at(2.6, waiting=16).mode == "fp8"


def test_replicas_return_one_by_one_least_loaded_first(view: MakeView) -> None:
    run = Run(view)
    names = ["a", "b", "c"]
    run.all_at(0.0, [view(name, waiting=8) for name in names])
    loads = {"a": 1, "b": 0, "c": 1}
    returned: list[tuple[float, str]] = []
    for tenth in range(100, 200):
        now = tenth / 10
        targets = run.all_at(now, [view(name, waiting=loads[name]) for name in names])
        returned += [(now, name) for name, target in targets.items() if target.changed]
    assert [name for _, name in returned] == ["b", "a", "c"]
    times = [now for now, _ in returned]
    assert times == pytest.approx([13.0, 14.0, 15.0])


@given(
    st.lists(
        st.tuples(st.floats(0.0, 5.0), st.integers(0, 40), st.sampled_from(["ok", "stale", "fault"])),
        max_size=150,
    )
)
@settings(max_examples=60, deadline=None)
def test_no_load_exceeds_the_bounds(steps: list[tuple[float, int, str]]) -> None:
    """Under any sequence: at most 6 flips in any 60 s, dwell kept unless in panic, no flip on bad facts."""
    policy = Policy(PolicyConfig.from_dict({**SETTINGS, "calm_s": 0.0}))
    state = policy.start()
    flips: list[float] = []
    now = 0.0
    for gap_s, waiting, quality in steps:
        now += gap_s
        identity = {"replica_id": "a", "boot_id": "boot", "sequence": 1, "mode": "fp16", "epoch": 0}
        signals = dict.fromkeys(("oldest_waiting_s", "kv_usage", "arrivals_per_s", "age_s"), 0.0)
        counts = dict.fromkeys(("running", "waiting_prompt_tokens", "tokens_fp16", "tokens_fp8", "flips"), 0)
        missing = {"ttft_p90_s": None, "tpot_p90_s": None, "step_time_s": None}
        message = {**identity, **signals, **counts, **missing, "waiting": waiting}
        if quality == "fault":
            message["waiting"] = -waiting - 1
        stale_s = 60.0 if quality == "stale" else 0.0
        facts = Snapshot((ReplicaView(ReplicaReport.from_dict(message), stale_s),))
        targets, state = policy.decide(facts, state, now)
        if targets["a"].changed:
            assert quality == "ok"
            assert not flips or now - flips[-1] >= 2.0 or waiting >= 16
            flips.append(now)
    for index, first in enumerate(flips):
        assert sum(1 for later in flips[index:] if later < first + FLIP_WINDOW_S) <= 6


def test_a_return_never_takes_the_last_flip(view: MakeView) -> None:
    run = Run(view, calm_s=0.0, min_dwell_s=0.0, return_gap_s=0.0, max_flips_per_minute=4)
    modes = [run.at(second / 2, waiting=0 if second % 2 else 8).mode for second in range(20)]
    assert modes[:3] == ["fp8", "fp16", "fp8"]
    assert set(modes[3:]) == {"fp8"}


@pytest.mark.parametrize("stale_s", [2.1, 1e9, float("nan"), float("inf"), -1.0])
def test_stale_signals_flip_nothing(view: MakeView, stale_s: float) -> None:
    target = Run(view).at(0.0, waiting=100, stale_s=stale_s)
    assert not target.changed
    assert target.held is not None
    assert "old" in target.held


def test_faulty_signals_flip_nothing_and_are_named(view: MakeView, report: Callable[..., Any]) -> None:
    broken = ReplicaReport.from_dict({**report(waiting=100).to_dict(), "kv_usage": float("nan")})
    target = Run(view).all_at(0.0, [ReplicaView(broken, 0.0)])["a"]
    assert not target.changed
    assert target.held == "unusable signals: kv_usage"


def test_bad_facts_break_calm(view: MakeView) -> None:
    run = Run(view)
    run.at(0.0, waiting=8)
    run.at(10.0)
    run.at(12.0, stale_s=9.0)
    assert run.at(13.5).mode == "fp8"
    assert run.at(15.0).mode == "fp8"
    assert run.at(16.5).mode == "fp16"


@pytest.mark.parametrize(("gap_s", "returned"), [(2.0, "fp16"), (2.1, "fp8"), (1e9, "fp8")])
def test_a_time_without_decisions_breaks_calm(view: MakeView, gap_s: float, returned: str) -> None:
    """As long as signals may be old it counts; a process that was suspended longer has seen no calm."""
    run = Run(view)
    run.at(0.0, waiting=8)
    run.at(1.0)
    assert run.at(3.0).mode == "fp8"
    assert run.at(3.0 + gap_s).mode == returned
    assert [run.at(3.0 + gap_s + later_s).mode for later_s in (1.5, 3.0)][-1] == "fp16"


def test_one_bad_replica_does_not_hold_the_others(view: MakeView) -> None:
    targets = Run(view).all_at(0.0, [view("a", waiting=9), view("b", waiting=9, stale_s=99.0)])
    assert targets["a"].mode == "fp8"
    assert targets["b"].mode == "fp16"


def test_a_pin_beats_every_bound_and_expires(view: MakeView) -> None:
    run = Run(view)
    pin = Override("fp8", 100.0)
    pinned = run.at(0.0, override=pin, stale_s=99.0)
    assert (pinned.mode, pinned.signal) == ("fp8", "override")
    assert run.at(99.9, override=pin).mode == "fp8"
    run.at(100.0, override=pin)
    assert run.at(101.5).mode == "fp8"
    assert run.at(103.0, override=pin).mode == "fp16"


def test_a_pin_keeps_the_controllers_step_bounds(view: MakeView) -> None:
    run = Run(view, controller="predictive", thresholds={})
    bounds = step_bounds(run.policy.config)
    assert run.at(0.0).limits == bounds
    for mode, until_s in (("fp8", 10.0), ("fp16", 20.0), ("auto", 30.0)):
        pin = Override(mode, until_s)
        flipped, kept, blind = (
            run.at(until_s - left_s, override=pin, stale_s=stale_s)
            for left_s, stale_s in ((9.0, 0.0), (8.0, 0.0), (7.0, 99.0))
        )
        assert [target.mode for target in (flipped, kept, blind)] == [mode] * 3
        assert [target.limits for target in (flipped, kept, blind)] == [bounds] * 3


def test_a_pin_in_fp8_keeps_the_bound_on_the_queue_for_as_long_as_there_is_one(view: MakeView) -> None:
    run = Run(view, controller="predictive", thresholds={}, prediction={"shed": True})
    flood = {"waiting": 400, "waiting_prompt_tokens": 400_000, "oldest_waiting_s": 9.0, "mode": "fp8"}
    pin = Override("fp8", 100.0)
    for second in range(5):
        pinned = run.at(float(second), override=pin, **flood)
        assert pinned.limits is not None
        assert pinned.limits["waiting_prompt_tokens"] > 0
    calm = run.at(5.0, override=pin, mode="fp8")
    assert calm.limits == step_bounds(run.policy.config)


def test_a_static_policy_takes_every_replica_over_at_once(view: MakeView) -> None:
    run = Run(view, controller="static-fp16")
    targets = run.all_at(0.0, [view(str(index), mode="fp8", waiting=50) for index in range(20)])
    assert {target.mode for target in targets.values()} == {"fp16"}


def test_a_replica_that_left_is_forgotten(view: MakeView) -> None:
    run = Run(view)
    run.all_at(0.0, [view("a", waiting=8), view("b")])
    run.all_at(1.0, [view("b")])
    assert set(run.state.replicas) == {"b"}
    assert run.all_at(2.0, [view("a"), view("b")])["a"].mode == "fp16"


def test_the_same_facts_give_the_same_decision_in_any_order(view: MakeView) -> None:
    views = [view(str(index), waiting=index, running=index % 3) for index in range(12)]
    forwards, backwards = Run(view), Run(view)
    assert forwards.all_at(0.0, views) == backwards.all_at(0.0, views[::-1])
    assert forwards.state == backwards.state


def test_a_thousand_replicas_are_decided_within_the_bound(
    view: MakeView, least_cpu_s: Callable[..., float]
) -> None:
    run = Run(view)
    views = [view(f"r{index}", waiting=index % 12, running=index % 7) for index in range(1000)]
    assert least_cpu_s(lambda step: run.all_at(step * 0.1, views)) < 0.010


def test_the_threshold_controller_keeps_replicas_for_strict_requests(view: MakeView) -> None:
    """A quarter of the requests demand 16 bits: two of four replicas stay there whatever their queue."""
    run = Run(view)
    modes = ["fp16"] * 4
    for second in range(5):
        views = [
            view(str(n), waiting=40, running=10, strict_running=50 if n == 3 else 0, mode=modes[n])
            for n in range(4)
        ]
        targets = run.all_at(float(second), views)
        modes = [targets[str(n)].mode for n in range(4)]
        assert modes.count("fp16") == 2


def test_a_replica_in_fp8_returns_for_strict_requests(view: MakeView) -> None:
    run = Run(view)
    pressed = {"waiting": 40, "running": 10, "mode": "fp8", "strict_waiting": 1}
    seen = [run.at(float(second), **pressed) for second in range(10)]
    assert seen[0].mode == "fp8"
    assert seen[-1].mode == "fp16"
    assert "demand 16 bits" in seen[-1].reason
