"""The replica's end: leases, refusals, deciding alone, and the loop that runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from nestedfp.policies.actor import PolicyActor
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.bounds import step_bounds
from nestedfp.policies.controllers.threshold import ThresholdController
from nestedfp.policies.replica import ActorUnavailable, Call, Order, ReplicaControl, follow

CONFIG = PolicyConfig.from_dict(
    {"thresholds": {"waiting": {"high": 8, "low": 1}}, "lease_s": 3.0, "min_dwell_s": 1.0, "calm_s": 1.0}
)


@pytest.fixture
def control(clock: Any) -> ReplicaControl:
    return ReplicaControl("a", CONFIG, clock=clock, boot_id="boot")


def answer(call: Call, epoch: int, mode: str, **changes: Any) -> dict[str, Any]:
    echo = {"boot_id": call.report.boot_id, "sequence": call.report.sequence}
    return {"epoch": epoch, "mode": mode, "lease_s": 3.0, "reason": "r", "owner": "o", **echo, **changes}


def test_it_starts_in_fp16_without_an_owner(control: ReplicaControl, idle: dict[str, Any]) -> None:
    assert control.order() == Order("fp16", 0, "on its own: keeps the mode it has")
    assert control.owner is None
    assert control.begin(idle).known_epoch == 0


def test_a_target_holds_for_its_lease_counted_from_the_call(
    control: ReplicaControl, idle: dict[str, Any], clock: Any
) -> None:
    call = control.begin(idle)
    clock.now += 2.0
    assert control.finish(call, answer(call, 4, "fp8"))
    assert control.order() == Order("fp8", 4, "r", None, "actor")
    assert control.lease_left_s == pytest.approx(1.0)
    clock.now += 1.0
    assert control.owner is None
    assert control.order().source == "local"


def test_an_answer_later_than_its_lease_is_refused(
    control: ReplicaControl, idle: dict[str, Any], clock: Any
) -> None:
    call = control.begin(idle)
    clock.now += 3.0
    assert not control.finish(call, answer(call, 4, "fp8"))
    assert control.order().mode == "fp16"
    assert control.status()["refused_answers"] == 1


@pytest.mark.parametrize(
    "changes", [{"sequence": 9}, {"boot_id": "other"}, {"epoch": 3}, {"mode": "fp16"}, {"owner": "usurper"}]
)
def test_what_is_refused(control: ReplicaControl, idle: dict[str, Any], changes: dict[str, Any]) -> None:
    first = control.begin(idle)
    assert control.finish(first, answer(first, 4, "fp8"))
    second = control.begin(idle)
    assert not control.finish(second, {**answer(second, 4, "fp8"), **changes})
    assert control.order().mode == "fp8"
    assert control.owner == "o"


def test_only_the_newest_call_counts(control: ReplicaControl, idle: dict[str, Any]) -> None:
    old, new = control.begin(idle), control.begin(idle)
    assert not control.finish(old, answer(old, 9, "fp8"))
    assert control.finish(new, answer(new, 2, "fp16"))


def test_a_new_owner_takes_over_with_a_newer_epoch(control: ReplicaControl, idle: dict[str, Any]) -> None:
    first = control.begin(idle)
    control.finish(first, answer(first, 4, "fp8", owner="old"))
    second = control.begin(idle)
    assert second.report.epoch == 4
    assert control.finish(second, answer(second, 5, "fp8", owner="new"))
    assert control.owner == "new"


def test_a_control_that_takes_an_engine_over_goes_on_from_its_order(clock: Any, idle: dict[str, Any]) -> None:
    found = Order("fp8", 7, "r", None, "actor")
    control = ReplicaControl("a", CONFIG, clock=clock, found=found)
    assert (control.order().mode, control.order().epoch, control.owner) == ("fp8", 7, None)
    call = control.begin(idle)
    assert (call.report.mode, call.report.epoch, call.known_epoch) == ("fp8", 7, 0)
    assert not control.finish(call, answer(call, 7, "fp16"))
    call = control.begin(idle)
    assert control.finish(call, answer(call, 8, "fp8"))
    assert control.order().source == "actor"


@pytest.mark.parametrize("bad", [{"mode": "int4"}, {"mode": None}, {"lease_s": -1}, {"epoch": "x"}])
def test_a_malformed_answer_is_an_error(
    control: ReplicaControl, idle: dict[str, Any], bad: dict[str, Any]
) -> None:
    call = control.begin(idle)
    with pytest.raises(InvalidField):
        control.finish(call, {**answer(call, 1, "fp8"), **bad})
    assert control.owner is None


def test_alone_it_keeps_its_mode_then_decides_on_its_own_signals(
    control: ReplicaControl, idle: dict[str, Any], clock: Any
) -> None:
    call = control.begin(idle)
    control.finish(call, answer(call, 4, "fp8"))
    assert control.order().mode == "fp8"
    modes = []
    for _ in range(8):
        clock.now += 0.5
        control.begin(idle)
        modes.append(control.order().mode)
    assert modes == ["fp8"] * 7 + ["fp16"]
    clock.now += 1.0
    control.begin({**idle, "waiting": 9})
    order = control.order()
    assert (order.mode, order.source, order.epoch) == ("fp8", "local", 4)
    assert "waiting 9 reached high water 8" in order.reason
    assert control.status()["lapses"] == 1


def test_alone_it_makes_no_flip_on_old_or_broken_signals(
    control: ReplicaControl, idle: dict[str, Any], clock: Any
) -> None:
    control.begin({**idle, "waiting": 9, "age_s": 5.0})
    assert control.order().mode == "fp16"
    control.begin({"waiting": 9})
    assert control.order().mode == "fp16"
    control.begin({**idle, "waiting": 9})
    assert control.order().mode == "fp8"


@pytest.mark.parametrize("found", [None, Order("fp8", 7, "r", {"pace_s": 0.001})])
def test_alone_its_orders_have_the_step_bounds_even_if_its_engine_does_not_answer(
    clock: Any, idle: dict[str, Any], found: Order | None
) -> None:
    config = PolicyConfig(controller="predictive")
    control = ReplicaControl("a", config, clock=clock, found=found)
    orders = [control.order()]
    for signals in ({}, {**idle, "age_s": 99.0}, idle):
        control.begin(signals)
        orders.append(control.order())
    assert [order.limits for order in orders] == [step_bounds(config)] * 4


def test_alone_and_blind_it_keeps_the_limits_that_the_actor_sent_last(
    clock: Any, idle: dict[str, Any]
) -> None:
    control = ReplicaControl("a", PolicyConfig(controller="predictive"), clock=clock)
    control.order()
    for epoch, limits in ((1, {"pace_s": 0.02}), (2, {"pace_s": 0.02, "waiting_prompt_tokens": 900.0})):
        call = control.begin(idle)
        assert control.finish(call, answer(call, epoch, "fp16", limits=limits))
        assert control.order().limits == limits
    clock.now += 3.0
    control.begin({})
    order = control.order()
    assert (order.source, order.limits) == ("local", {"pace_s": 0.02, "waiting_prompt_tokens": 900.0})


def test_alone_it_keeps_its_mode_while_its_controller_raises(
    clock: Any, idle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PolicyConfig(cut_steps=True)
    control = ReplicaControl("a", config, clock=clock)
    busy = {**idle, "oldest_waiting_s": 9.0}

    def fail(*_: object) -> None:
        raise ValueError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(ThresholdController, "wishes", fail)
        control.begin(busy)
        order = control.order()
        assert (order.mode, order.limits) == ("fp16", step_bounds(config))
        assert control.status()["failed_decisions"] == 1
        assert control.status()["last_decision_error"] == "ValueError: broken"
    control.begin(busy)
    assert control.order().mode == "fp8"
    assert control.status()["failed_decisions"] == 1


def test_local_and_central_flips_share_one_bound(
    control: ReplicaControl, idle: dict[str, Any], clock: Any
) -> None:
    """Six flips ordered by the actor leave none for the replica once it is alone."""
    for epoch in range(1, 7):
        call = control.begin(idle)
        control.finish(call, answer(call, epoch, "fp8" if epoch % 2 else "fp16"))
        control.order()
        clock.now += 1.0
    clock.now += 3.0
    control.begin({**idle, "waiting": 50})
    assert control.order().mode == "fp16"
    clock.now += 60.0
    control.begin({**idle, "waiting": 50})
    assert control.order().mode == "fp8"


def test_dry_run_keeps_the_mode_alone_too(clock: Any, idle: dict[str, Any]) -> None:
    control = ReplicaControl("a", PolicyConfig(dry_run=True), clock=clock)
    control.begin({**idle, "oldest_waiting_s": 50.0})
    assert control.order().mode == "fp16"


QUICK = PolicyConfig.from_dict(
    {
        "thresholds": {"waiting": {"high": 8, "low": 1}},
        "lease_s": 0.3,
        "sync_wait_s": 0.02,
        "decide_interval_s": 0.005,
        "min_dwell_s": 0.0,
        "calm_s": 0.0,
        "return_gap_s": 0.0,
    }
)


class Cluster:
    """One replica under ``follow``, and an actor that can be taken away."""

    def __init__(self, idle: dict[str, Any]) -> None:
        self.signals: dict[str, Any] = idle
        self.actor: PolicyActor | None = PolicyActor(QUICK)
        self.control = ReplicaControl("a", QUICK)
        self.orders: list[Order] = []

    async def sync(self, report: dict[str, Any], known_epoch: int, wait_s: float) -> Mapping[str, Any]:
        if self.actor is None:
            raise ActorUnavailable("killed")
        return await self.actor.sync(report, known_epoch, wait_s)

    async def read(self) -> Mapping[str, Any]:
        return self.signals

    async def apply(self, order: Order) -> None:
        self.orders.append(order)

    async def until(self, mode: str, source: str) -> None:
        async with asyncio.timeout(3.0):
            while (self.control.status()["mode"], self.control.status()["source"]) != (mode, source):
                await asyncio.sleep(0.005)


async def test_a_replica_follows_loses_and_finds_its_actor(idle: dict[str, Any]) -> None:
    cluster = Cluster(idle)
    running = asyncio.create_task(follow(cluster.control, cluster.sync, cluster.read, cluster.apply))
    await cluster.until("fp16", "actor")
    cluster.signals = {**idle, "waiting": 9}
    await cluster.until("fp8", "actor")
    cluster.actor = None
    await cluster.until("fp8", "local")
    cluster.signals = idle
    await cluster.until("fp16", "local")
    epoch = cluster.control.status()["epoch"]
    cluster.actor = PolicyActor(QUICK)
    await cluster.until("fp16", "actor")
    assert cluster.control.status()["epoch"] > epoch
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    modes = [order.mode for order in cluster.orders]
    assert modes[0] == "fp16"
    assert [order.epoch for order in cluster.orders] == sorted(order.epoch for order in cluster.orders)


async def test_an_actor_that_never_answers_does_not_hold_the_replica(idle: dict[str, Any]) -> None:
    cluster = Cluster({**idle, "waiting": 9})

    async def hang(report: dict[str, Any], known_epoch: int, wait_s: float) -> Mapping[str, Any]:
        await asyncio.sleep(60.0)
        return {}

    running = asyncio.create_task(follow(cluster.control, hang, cluster.read, cluster.apply))
    await cluster.until("fp8", "local")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_an_engine_that_cannot_be_told_ends_the_loop(idle: dict[str, Any]) -> None:
    cluster = Cluster(idle)

    async def dead(order: Order) -> None:
        raise RuntimeError("engine died")

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(follow(cluster.control, cluster.sync, cluster.read, dead), 2.0)
    assert caught.group_contains(RuntimeError, match="engine died")
