"""The actor: delivery, registration, restarts, repeated and late messages, clocks that jump."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from nestedfp.policies.actor import FORGET_AFTER_S, PolicyActor, RetiredReplica
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.bounds import step_bounds
from nestedfp.policies.controllers.threshold import ThresholdController
from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.roofline import NAME, latency_model

Report = Callable[..., ReplicaReport]

SETTINGS: dict[str, Any] = {
    "thresholds": {"waiting": {"high": 8, "low": 1}},
    "decide_interval_s": 0.01,
    "min_dwell_s": 1.0,
    "calm_s": 1.0,
    "lease_s": 5.0,
}


@pytest.fixture
def actor(clock: Any) -> PolicyActor:
    return PolicyActor(SETTINGS, clock=clock, wall=lambda: 5e9, owner="owner-1")


async def test_registration_is_answered_at_once(actor: PolicyActor, report: Report) -> None:
    answer = await asyncio.wait_for(actor.sync(report().to_dict(), 0, 1.5), 0.5)
    assert (answer["epoch"], answer["mode"], answer["owner"]) == (1, "fp16", "owner-1")
    assert (answer["boot_id"], answer["sequence"]) == ("boot", 1)


async def test_a_flip_ends_the_long_poll_and_is_logged(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    await actor.sync(report("a").to_dict(), 0, 0.0)
    await actor.sync(report("b").to_dict(), 0, 0.0)
    clock.now += 1.0
    poll = asyncio.create_task(actor.sync(report("a", sequence=2, waiting=9).to_dict(), 1, 1.5))
    started = asyncio.get_running_loop().time()
    assert (await poll)["mode"] == "fp8"
    assert asyncio.get_running_loop().time() - started < 0.5
    assert actor.status()["log"] == [
        {
            "at": 5e9,
            "replica_id": "a",
            "from": "fp16",
            "to": "fp8",
            "reason": "waiting 9 reached high water 8",
            "signal": "waiting",
            "value": 9,
            "threshold": 8.0,
        }
    ]


async def test_facts_that_come_between_decisions_are_decided_on_without_another_call(
    actor: PolicyActor, report: Report
) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    answer = await asyncio.wait_for(actor.sync(report(sequence=2, waiting=9).to_dict(), 1, 1.5), 0.5)
    assert answer["mode"] == "fp8"


async def test_no_change_is_answered_after_the_wait(actor: PolicyActor, report: Report) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    answer = await actor.sync(report(sequence=2).to_dict(), 1, 0.05)
    assert (answer["epoch"], answer["mode"], answer["sequence"]) == (1, "fp16", 2)


async def test_the_wait_is_bounded_by_the_lease(clock: Any, report: Report) -> None:
    actor = PolicyActor({**SETTINGS, "lease_s": 0.3, "sync_wait_s": 0.05}, clock=clock)
    await actor.sync(report().to_dict(), 0, 0.0)
    await asyncio.wait_for(actor.sync(report(sequence=2).to_dict(), 1, 1e6), 1.0)


async def test_repeated_and_reordered_reports_change_nothing_but_are_answered(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    await actor.sync(report(sequence=7).to_dict(), 0, 0.0)
    clock.now += 1.0
    late = await actor.sync(report(sequence=3, waiting=50).to_dict(), 1, 0.0)
    assert (late["mode"], late["sequence"]) == ("fp16", 3)
    status = actor.status()
    assert status["ignored_reports"] == 1
    assert status["replicas"]["a"]["report"]["sequence"] == 7
    assert status["log"] == []


async def test_a_restarted_actor_adopts_modes_and_epochs(clock: Any, report: Report) -> None:
    restarted = PolicyActor(SETTINGS, clock=clock)
    answer = await restarted.sync(report(mode="fp8", epoch=41, sequence=900).to_dict(), 41, 0.0)
    assert (answer["epoch"], answer["mode"]) == (42, "fp8")
    assert restarted.status()["log"] == []


async def test_a_restarted_actor_keeps_the_dwell_time(clock: Any, report: Report) -> None:
    restarted = PolicyActor({**SETTINGS, "calm_s": 0.0}, clock=clock)
    await restarted.sync(report(mode="fp8", epoch=41).to_dict(), 41, 0.0)
    clock.now += 0.5
    assert (await restarted.sync(report(mode="fp8", epoch=42, sequence=2).to_dict(), 42, 0.0))[
        "mode"
    ] == "fp8"
    clock.now += 0.6
    assert (await restarted.sync(report(mode="fp8", epoch=42, sequence=3).to_dict(), 42, 0.0))[
        "mode"
    ] == "fp16"


@pytest.mark.parametrize("settings", [{"controller": "predictive"}, {"cut_steps": True}])
async def test_the_first_order_of_any_replica_has_the_step_bounds(
    clock: Any, report: Report, settings: dict[str, Any]
) -> None:
    """Also where no decision is due yet, and for as long as the signals are of no use."""
    bounds = step_bounds(PolicyConfig.from_dict(settings))
    restarted = PolicyActor(settings, clock=clock)
    await restarted.sync(report("first").to_dict(), 0, 0.0)
    registered = await restarted.sync(report("a", mode="fp8", epoch=41).to_dict(), 41, 0.0)
    broken = {**report("blind", mode="fp8", epoch=7).to_dict(), "waiting": None}
    blind = await restarted.sync(broken, 7, 0.0)
    for sequence in range(2, 5):
        clock.now += 1.0
        again = await restarted.sync({**broken, "sequence": sequence, "epoch": 8}, 8, 0.0)
        assert (again["mode"], again["epoch"], again["limits"]) == ("fp8", 8, bounds)
    assert [registered["limits"], blind["limits"]] == [bounds, bounds]
    back = await restarted.sync(report("a", boot_id="second").to_dict(), 0, 0.0)
    assert back["limits"] == bounds


async def test_a_dry_run_sends_no_bounds(clock: Any, report: Report) -> None:
    actor = PolicyActor({"controller": "predictive", "dry_run": True}, clock=clock)
    assert (await actor.sync(report().to_dict(), 0, 0.0))["limits"] is None


async def test_a_restarted_replica_starts_over_and_its_old_process_is_refused(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    await actor.sync(report(waiting=9).to_dict(), 0, 0.0)
    clock.now += 1.0
    fresh = await actor.sync(report(boot_id="second", sequence=1).to_dict(), 0, 0.0)
    assert fresh["mode"] == "fp16"
    assert fresh["epoch"] > 2
    with pytest.raises(RetiredReplica):
        await actor.sync(report(sequence=2, waiting=9).to_dict(), 2, 0.0)
    assert actor.status()["replicas"]["a"]["report"]["boot_id"] == "second"


async def test_a_late_first_report_of_an_older_boot_does_not_retire_the_living_one(
    actor: PolicyActor, report: Report
) -> None:
    await actor.sync(report(boot_id="second", booted_at=20.0).to_dict(), 0, 0.0)
    with pytest.raises(RetiredReplica):
        await actor.sync(report(boot_id="first", booted_at=10.0).to_dict(), 0, 0.0)
    await actor.sync(report(boot_id="second", booted_at=20.0, sequence=2).to_dict(), 1, 0.0)
    assert actor.status()["replicas"]["a"]["report"]["boot_id"] == "second"


async def test_a_long_poll_of_a_replaced_process_is_refused(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    poll = asyncio.create_task(actor.sync(report(sequence=2).to_dict(), 1, 1.0))
    await asyncio.sleep(0)
    clock.now += 1.0
    await actor.sync(report(boot_id="second").to_dict(), 0, 0.0)
    with pytest.raises(RetiredReplica):
        await poll


async def test_a_replica_under_another_owner_is_taken_over_with_a_newer_epoch(
    actor: PolicyActor, report: Report
) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    foreign = report(sequence=2, mode="fp8", epoch=1, owner="somebody else").to_dict()
    answer = await actor.sync(foreign, 1, 0.0)
    assert (answer["epoch"], answer["mode"], answer["owner"]) == (2, "fp8", "owner-1")
    ours = report(sequence=3, mode="fp8", epoch=2, owner="owner-1").to_dict()
    assert (await actor.sync(ours, 2, 0.0))["epoch"] == 2


async def test_a_replica_that_was_on_its_own_is_adopted_as_it_is(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    clock.now += 5.1
    answer = await actor.sync(report(sequence=2, mode="fp8", epoch=1, waiting=4).to_dict(), 0, 0.0)
    assert (answer["mode"], answer["epoch"]) == ("fp8", 2)
    assert actor.status()["log"] == []


async def test_a_replica_not_heard_of_is_forgotten(actor: PolicyActor, report: Report, clock: Any) -> None:
    await actor.sync(report("gone").to_dict(), 0, 0.0)
    clock.now += FORGET_AFTER_S + 1.0
    await actor.sync(report("here").to_dict(), 0, 0.0)
    assert set(actor.status()["replicas"]) == {"here"}


async def test_a_replica_killed_in_the_middle_of_a_flip_makes_no_decision(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    """Its last report cries for FP8 for ever; only the flip it caused while fresh may be in the log."""
    await actor.sync(report("dead", waiting=9).to_dict(), 0, 0.0)
    for step in range(1, 40):
        clock.now += 1.0
        await actor.sync(report("alive", sequence=step).to_dict(), 0, 0.0)
    assert [record["replica_id"] for record in actor.status()["log"]] == ["dead"]


@pytest.mark.parametrize("jump", [2.5, 4.5, 1e6, -2.5, -1e6])
async def test_a_clock_that_jumps_ends_no_calm_stay_in_fp8(
    actor: PolicyActor, report: Report, clock: Any, jump: float
) -> None:
    """Every signal is calm before and after; within the lease as well, only time that was seen counts."""
    await actor.sync(report(mode="fp8", epoch=7).to_dict(), 7, 0.0)
    sequence = 1
    for _ in range(3):
        clock.now += jump
        sequence += 1
        answer = await actor.sync(report(sequence=sequence, mode="fp8", epoch=8).to_dict(), 8, 0.0)
        assert answer["mode"] == "fp8"
    for _ in range(2):
        clock.now += 0.6
        sequence += 1
        calm = report(sequence=sequence, mode="fp8", epoch=answer["epoch"])
        answer = await actor.sync(calm.to_dict(), answer["epoch"], 0.0)
    assert answer["mode"] == "fp16"


async def test_a_pin_holds_until_it_expires(actor: PolicyActor, report: Report, clock: Any) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    poll = asyncio.create_task(actor.sync(report(sequence=2).to_dict(), 1, 1.0))
    await asyncio.sleep(0)
    await actor.set_override("fp8", 10.0)
    assert (await asyncio.wait_for(poll, 0.5))["mode"] == "fp8"
    assert actor.status()["override"] == {"mode": "fp8", "left_s": pytest.approx(10.0)}
    assert actor.status()["log"][0]["signal"] == "override"
    modes = []
    for second in range(1, 14):
        clock.now += 1.0
        answer = await actor.sync(report(sequence=2 + second, mode="fp8").to_dict(), 0, 0.0)
        modes.append(answer["mode"])
    assert modes == ["fp8"] * 9 + ["fp16"] * 4
    assert actor.status()["override"] is None


async def test_a_pin_can_be_cleared(actor: PolicyActor, report: Report, clock: Any) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    await actor.set_override("fp8", 1000.0)
    await actor.clear_override()
    clock.now += 3.0
    await actor.sync(report(sequence=2, mode="fp8").to_dict(), 0, 0.0)
    clock.now += 1.1
    assert (await actor.sync(report(sequence=3, mode="fp8").to_dict(), 0, 0.0))["mode"] == "fp16"


@pytest.mark.parametrize(
    ("mode", "expires_s"), [("int4", 10.0), ("fp8", 0.0), ("fp8", float("nan")), ("fp8", 1e9)]
)
async def test_a_bad_pin_is_refused(actor: PolicyActor, mode: str, expires_s: float) -> None:
    with pytest.raises(InvalidField):
        await actor.set_override(mode, expires_s)


async def test_dry_run_logs_and_leaves_the_mode(clock: Any, report: Report) -> None:
    actor = PolicyActor({**SETTINGS, "dry_run": True}, clock=clock)
    assert (await actor.sync(report(waiting=9).to_dict(), 0, 0.0))["mode"] == "fp16"
    clock.now += 1.0
    assert (await actor.sync(report(sequence=2, waiting=9).to_dict(), 0, 0.0))["mode"] == "fp16"
    (record,) = actor.status()["log"]
    assert (record["to"], record["dry_run"]) == ("fp8", True)
    with pytest.raises(InvalidField, match="dry_run"):
        await actor.set_override("fp8", 10.0)


async def test_broken_signals_are_a_heartbeat_and_shown(
    actor: PolicyActor, report: Report, clock: Any
) -> None:
    await actor.sync(report().to_dict(), 0, 0.0)
    clock.now += 1.0
    await actor.sync({**report(sequence=2).to_dict(), "waiting": -3}, 1, 0.0)
    shown = actor.status()["replicas"]["a"]
    assert shown["faults"] == ["waiting"]
    assert shown["held"] == "unusable signals: waiting"
    assert shown["leased"]
    assert shown["heard_s_ago"] == 0.0


async def test_a_controller_that_raises_changes_no_mode_and_ends_no_call(
    actor: PolicyActor, report: Report, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await actor.sync(report("a").to_dict(), 0, 0.0)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no tokens")

    with monkeypatch.context() as broken:
        broken.setattr(ThresholdController, "wishes", fail)
        clock.now += 1.0
        answer = await actor.sync(report("a", sequence=2, waiting=9).to_dict(), 1, 0.0)
        assert (answer["mode"], answer["epoch"]) == ("fp16", 1)
        status = actor.status()
        assert status["failed_decisions"] == 1
        assert status["last_decision_error"] == "ZeroDivisionError: no tokens"
        assert status["replicas"]["a"]["held"] == "the controller failed: ZeroDivisionError: no tokens"
        await actor.set_override("fp8", 0.5)
        assert (await actor.sync(report("a", sequence=3).to_dict(), 1, 0.0))["mode"] == "fp8"
    clock.now += 1.0
    await actor.sync(report("a", sequence=4, mode="fp8", epoch=2).to_dict(), 2, 0.0)
    clock.now += 1.0
    assert (await actor.sync(report("a", sequence=5, mode="fp8", epoch=2).to_dict(), 2, 0.0))[
        "mode"
    ] == "fp16"
    assert actor.status()["failed_decisions"] == 2


@pytest.mark.parametrize("bad", [{}, {"replica_id": "a"}, None, {"replica_id": 3}])
async def test_a_message_without_a_sender_registers_nothing(actor: PolicyActor, bad: Any) -> None:
    with pytest.raises(InvalidField):
        await actor.sync(bad, 0, 0.0)
    assert actor.status()["replicas"] == {}


async def test_bad_settings_fail_when_the_actor_starts() -> None:
    with pytest.raises(InvalidField, match="controller"):
        PolicyActor({"controller": "magic"})


def test_the_actor_says_which_step_costs_it_begins_with(caplog: pytest.LogCaptureFixture) -> None:
    costs = {mode: {"overhead_s": 0.0, "weights_s": 0.01, "token_s": 0.0} for mode in ("fp16", "fp8")}
    with caplog.at_level("INFO", logger="nestedfp.policies.actor"):
        assert PolicyActor({}).status()["latency_model"] == NAME
    assert f"step costs at first: {NAME}, corrected online" in caplog.text
    assert PolicyActor({"latency": {"costs": costs}}).status()["latency_model"] == "policy.latency"
    # As a deployment fills in the longest step of its engine.
    assert PolicyActor(PolicyConfig(latency=latency_model(512))).status()["latency_model"] == NAME
