"""The steady clock, and what leases and decisions make of a clock that jumps."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nestedfp.policies.actor import PolicyActor
from nestedfp.policies.clock import SteadyClock
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.replica import ReplicaControl

CONFIG = PolicyConfig.from_dict(
    {"thresholds": {"waiting": {"high": 8, "low": 1}}, "lease_s": 3.0, "min_dwell_s": 1.0, "calm_s": 1.0}
)


@given(st.lists(st.integers(-1_000_000, 1_000_000), max_size=30))
def test_it_follows_forwards_and_stands_still_backwards(steps: list[int]) -> None:
    raw = [0.0]
    clock = SteadyClock(lambda: raw[0])
    expected = clock()
    for step in steps:
        raw[0] += step
        expected += max(0, step)
        assert clock() == expected


def answer(call: Any, epoch: int, mode: str) -> dict[str, Any]:
    echo = {"boot_id": call.report.boot_id, "sequence": call.report.sequence}
    return {"epoch": epoch, "mode": mode, "lease_s": 3.0, "reason": "r", "owner": "o", **echo}


def test_a_clock_set_back_does_not_stretch_a_lease(clock: Any, idle: dict[str, Any]) -> None:
    control = ReplicaControl("a", CONFIG, clock=clock)
    call = control.begin(idle)
    assert control.finish(call, answer(call, 4, "fp8"))
    clock.now -= 500.0
    assert control.owner == "o"
    clock.now += 2.9
    assert control.order().source == "actor"
    clock.now += 0.2
    assert control.owner is None
    assert control.order().source == "local"


def test_a_clock_set_forward_ends_the_lease_and_flips_nothing(clock: Any, idle: dict[str, Any]) -> None:
    control = ReplicaControl("a", CONFIG, clock=clock)
    call = control.begin({**idle, "waiting": 9})
    assert control.finish(call, answer(call, 4, "fp16"))
    clock.now += 1e6
    order = control.order()
    assert (order.source, order.mode) == ("local", "fp16")


def test_alone_it_still_decides_after_the_clock_was_set_back(clock: Any, idle: dict[str, Any]) -> None:
    control = ReplicaControl("a", CONFIG, clock=clock)
    control.begin({**idle, "waiting": 9})
    assert control.order().mode == "fp8"
    clock.now -= 1e5
    for _ in range(5):
        clock.now += 0.6
        control.begin(idle)
        mode = control.order().mode
    assert mode == "fp16"


async def test_the_actor_still_decides_after_its_clock_was_set_back(clock: Any, report: Any) -> None:
    actor = PolicyActor(CONFIG, clock=clock, owner="o")
    first = await actor.sync(report().to_dict(), 0, 0.0)
    clock.now -= 1e5
    actor.status()
    clock.now += 0.2
    later = report(sequence=2, waiting=9, epoch=first["epoch"], owner="o")
    assert (await actor.sync(later.to_dict(), first["epoch"], 0.0))["mode"] == "fp8"


async def test_the_actor_tells_how_long_an_order_took(clock: Any, report: Any) -> None:
    actor = PolicyActor(CONFIG, clock=clock, owner="o")
    answered = await actor.sync(report().to_dict(), 0, 0.0)
    await actor.set_override("fp8", 10.0)
    assert actor.status()["replicas"]["a"]["delivery_s"] is None
    clock.now += 0.5
    epoch = answered["epoch"] + 1
    before = report(sequence=2, epoch=epoch, owner="o", applied_epoch=epoch - 1, applied_s_ago=0.4)
    await actor.sync(before.to_dict(), epoch, 0.0)
    assert actor.status()["replicas"]["a"]["delivery_s"] is None
    after = report(sequence=3, mode="fp8", epoch=epoch, owner="o", applied_epoch=epoch, applied_s_ago=0.3)
    await actor.sync(after.to_dict(), epoch, 0.0)
    assert abs(actor.status()["replicas"]["a"]["delivery_s"] - 0.2) < 1e-9


def test_a_report_says_what_the_engine_has_taken(clock: Any, idle: dict[str, Any]) -> None:
    control = ReplicaControl("a", CONFIG, clock=clock)
    first = control.begin(idle).report
    assert (first.applied_epoch, first.applied_s_ago) == (0, None)
    call = control.begin(idle)
    control.finish(call, answer(call, 7, "fp8"))
    control.applied(control.order())
    clock.now += 0.25
    taken = control.begin(idle).report
    assert (taken.applied_epoch, taken.applied_s_ago, taken.faults) == (7, 0.25, ())
