"""The replica's control loop and its line to the policy actor, with neither Ray nor an engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from nestedfp.deployments import policy_actor
from nestedfp.deployments.control_loop import ControlLoop
from nestedfp.deployments.policy_actor import PolicyLink, PolicyService, actor_name
from nestedfp.policies.actor import PolicyActor
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.replica import ActorUnavailable, Order
from nestedfp.vllm.selection import PlanSelection
from nestedfp.vllm.settings import Settings
from nestedfp.vllm.status import EngineStatus

CONFIG = PolicyConfig.from_dict(
    {
        "controller": "threshold",
        "thresholds": {"waiting": {"high": 4, "low": 1}},
        "lease_s": 0.3,
        "sync_wait_s": 0.02,
        "decide_interval_s": 0.01,
        "min_dwell_s": 0.0,
    }
)


class Engine:
    """An engine with a queue that the test fills."""

    status: EngineStatus | None = None

    def __init__(self) -> None:
        self.waiting = 0
        self.orders: list[Order] = []

    async def apply(self, order: Order) -> None:
        self.orders.append(order)

    async def signals(self) -> dict[str, Any]:
        numbers = dict.fromkeys(("running", "waiting_prompt_tokens", "tokens_fp16", "tokens_fp8", "flips"), 0)
        times = dict.fromkeys(("oldest_waiting_s", "kv_usage", "arrivals_per_s", "age_s"), 0.0)
        unknown = dict.fromkeys(("ttft_p90_s", "tpot_p90_s", "step_time_s"))
        return {**numbers, **times, **unknown, "waiting": self.waiting}


class Metrics:
    def __init__(self) -> None:
        self.lags: list[float] = []
        self.up = False

    def engine(self, status: EngineStatus) -> None:
        raise AssertionError("this engine gives no status")

    def order(self, order: Order, lag_s: float) -> None:
        self.lags.append(lag_s)

    def policy_up(self, up: bool) -> None:
        self.up = up

    def latencies(self, slo: Any, ttft_s: float | None, tpot_s: float | None) -> None:
        assert (ttft_s, tpot_s) == (None, None)


class Line:
    """A line to an actor that the test can cut."""

    def __init__(self) -> None:
        self.actor: PolicyActor | None = PolicyActor(CONFIG)

    async def sync(self, report: dict[str, Any], known_epoch: int, wait_s: float) -> dict[str, Any]:
        if self.actor is None:
            raise ActorUnavailable("cut")
        return await self.actor.sync(report, known_epoch, wait_s)


async def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_queue_flips_the_engine_through_the_actor_and_without_it() -> None:
    engine, metrics, line = Engine(), Metrics(), Line()
    loop = ControlLoop("r1", CONFIG, engine, line.sync, metrics)
    task = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: metrics.up)
        assert engine.orders[-1].mode == "fp16"
        engine.waiting = 10
        await eventually(lambda: engine.orders[-1].mode == "fp8")
        assert engine.orders[-1].source == "actor"
        assert loop.status()["signals"]["waiting"] == 10
        line.actor = None
        await eventually(lambda: not metrics.up)
        assert engine.orders[-1].mode == "fp8"
        line.actor = PolicyActor(CONFIG)
        await eventually(lambda: metrics.up)
        assert loop.status()["mode"] == "fp8"
        assert len(metrics.lags) == len(engine.orders)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_new_loop_goes_on_from_the_order_of_the_one_before() -> None:
    engine, line = Engine(), Line()
    loop = ControlLoop("r1", CONFIG, engine, line.sync, Metrics())
    engine.waiting = 10
    task = asyncio.create_task(loop.run())
    await eventually(lambda: loop.given is not None and loop.given.mode == "fp8")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    before = engine.orders[-1]
    line.actor = PolicyActor(CONFIG)
    after = ControlLoop("r1", CONFIG, engine, line.sync, Metrics(), found=loop.given)
    task = asyncio.create_task(after.run())
    try:
        await eventually(lambda: after.status()["source"] == "actor")
        later = engine.orders[engine.orders.index(before) + 1 :]
        assert all(order.mode == "fp8" and order.epoch >= before.epoch for order in later)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class SlowEngine(Engine):
    """Checks epochs as vLLM's scheduler does, and takes an order although nobody waits for its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.selection = PlanSelection(Settings())
        self.sent: list[Order] = []
        self.answer_s = 0.0
        self._line = asyncio.Lock()

    async def apply(self, order: Order) -> None:
        self.sent.append(order)
        await asyncio.shield(asyncio.create_task(self._take(order)))

    async def _take(self, order: Order) -> None:
        async with self._line:
            await asyncio.sleep(self.answer_s)
            self.selection.set_target(order.mode, order.epoch, order.reason)
        self.orders.append(order)


async def test_a_loop_cancelled_in_the_middle_of_an_order_hands_it_over() -> None:
    engine, line = SlowEngine(), Line()
    loop = ControlLoop("r1", CONFIG, engine, line.sync, Metrics())
    task = asyncio.create_task(loop.run())
    await eventually(lambda: bool(engine.orders) and engine.orders[-1].source == "actor")
    engine.answer_s = 0.2
    engine.waiting = 10
    await eventually(lambda: engine.sent[-1].mode == "fp8")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.selection.mode == "fp16"
    in_flight = engine.sent[-1]
    line.actor = None
    after = ControlLoop("r1", CONFIG, engine, line.sync, Metrics(), found=loop.given)
    task = asyncio.create_task(after.run())
    try:
        await eventually(lambda: task.done() or len(engine.orders) >= len(engine.sent))
        assert not task.done()
        assert (engine.orders[-1].mode, engine.orders[-1].epoch) == (in_flight.mode, in_flight.epoch)
        assert engine.selection.mode == "fp8"
        # An actor that comes back goes on from there.
        line.actor = PolicyActor(CONFIG)
        await eventually(lambda: task.done() or engine.selection.epoch > in_flight.epoch)
        assert not task.done()
        assert engine.selection.mode == "fp8"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_replica_that_must_stay_in_its_mode_publishes_so() -> None:
    line = Line()
    assert line.actor is not None
    loop = ControlLoop("r1", CONFIG, Engine(), line.sync, Metrics())
    task = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: loop.scaling_stats().get("fixed") == 0.0)
        await line.actor.set_override("fp16", 60.0)
        await eventually(lambda: loop.scaling_stats()["fixed"] == 1.0)
        await line.actor.clear_override()
        await eventually(lambda: loop.scaling_stats()["fixed"] == 0.0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_the_actors_name_changes_with_the_settings_and_the_application() -> None:
    other = PolicyConfig.from_dict({**CONFIG.to_dict(), "lease_s": 0.4})
    names = {actor_name("a", CONFIG), actor_name("b", CONFIG), actor_name("a", other)}
    assert len(names) == 3
    assert actor_name("a", CONFIG) == actor_name("a", PolicyConfig.from_dict(CONFIG.to_dict()))
    assert all(name.startswith("nestedfp-policy::") for name in names)


def test_the_actors_name_changes_with_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    before = actor_name("a", CONFIG)
    (tmp_path / "changed.py").write_text("")
    monkeypatch.setattr(policy_actor.policies, "__path__", [str(tmp_path)])
    policy_actor._code.cache_clear()
    try:
        assert actor_name("a", CONFIG) != before
    finally:
        policy_actor._code.cache_clear()


class RemoteActor:
    """A stand-in for a Ray handle."""

    def __init__(self, error: Exception | None = None, owner: str = "o") -> None:
        self.sync = self
        self.error = error
        self.answer = {"mode": "fp16", "owner": owner}

    async def remote(self, *_: object) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.answer


async def test_a_lost_actor_is_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [RemoteActor(ValueError("gone\nlong trace")), RemoteActor()]
    monkeypatch.setattr(policy_actor, "find_or_create", lambda *_: found.pop(0))
    link = PolicyLink("a", CONFIG)
    with pytest.raises(ActorUnavailable, match=r"^gone$"):
        await link.sync({}, 0, 0.0)
    assert (await link.sync({}, 0, 0.0))["mode"] == "fp16"
    assert (await link.sync({}, 0, 0.0))["mode"] == "fp16"
    assert found == []


async def test_that_another_actor_has_no_pin_of_the_one_before_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = RemoteActor(owner="first")
    found = [first, RemoteActor(owner="second")]
    monkeypatch.setattr(policy_actor, "find_or_create", lambda *_: found.pop(0))
    link = PolicyLink("a", CONFIG)
    await link.sync({}, 0, 0.0)
    first.error = RayError()
    with pytest.raises(ActorUnavailable):
        await link.sync({}, 0, 0.0)
    assert "pin" not in caplog.text
    for _ in range(2):
        await link.sync({}, 0, 0.0)
    assert ["pin" in record.message for record in caplog.records] == [True]


class TaskError(RayError):
    """As Ray wraps what an actor's method raises."""

    cause = ValueError("boot 7 was replaced")


@pytest.mark.parametrize(
    ("error", "told"),
    [(TaskError("ray::sync()\nTraceback"), "boot 7 was replaced"), (RayError(), "RayError")],
)
async def test_the_reason_of_a_failed_call_is_told(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_actor, "find_or_create", lambda *_: RemoteActor(error))
    with pytest.raises(ActorUnavailable, match=f"^{told}$"):
        await PolicyLink("a", CONFIG).sync({}, 0, 0.0)


async def test_a_slow_search_for_the_actor_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[str] = []
    answered = threading.Event()

    def find(app_name: str, _: PolicyConfig) -> RemoteActor:
        searches.append(app_name)
        answered.wait(10.0)
        return RemoteActor()

    monkeypatch.setattr(policy_actor, "find_or_create", find)
    link = PolicyLink("a", CONFIG)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await link.sync({}, 0, 0.0)
    answered.set()
    assert (await link.sync({}, 0, 0.0))["mode"] == "fp16"
    assert searches == ["a"]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was killed."""
    killed: list[str] = []
    context = SimpleNamespace(current_actor="itself")
    monkeypatch.setattr(policy_actor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(policy_actor.ray, "kill", killed.append)
    return killed


async def report(sequence: int) -> dict[str, Any]:
    identity = {"replica_id": "r", "boot_id": "b", "mode": "fp16", "epoch": 0, "sequence": sequence}
    return {**await Engine().signals(), **identity}


async def test_an_actor_that_nobody_calls_ends_itself(ended: list[str]) -> None:
    actor = PolicyService(CONFIG.to_dict(), lonely_s=0.1)
    for sequence in range(1, 6):
        await actor.sync(await report(sequence), 0, 0.0)
        await asyncio.sleep(0.05)
        assert ended == []
    await eventually(lambda: ended == ["itself"])


@pytest.mark.parametrize("removed", [False, True])
async def test_an_actor_does_not_end_before_its_pin(ended: list[str], removed: bool) -> None:
    actor = PolicyService(CONFIG.to_dict(), lonely_s=0.02)
    await actor.sync(await report(1), 0, 0.0)
    await actor.set_override("fp8", 60.0 if removed else 0.3)
    await asyncio.sleep(0.2)
    assert ended == []
    if removed:
        await actor.clear_override()
    await eventually(lambda: ended == ["itself"])


def test_long_polls_leave_room_for_status_and_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Made:
        def options(self, **options: Any) -> Made:
            given.update(options)
            return self

        def remote(self, config: dict[str, Any]) -> str:
            return "handle"

    monkeypatch.setattr(policy_actor.ray, "remote", lambda _: Made())
    assert policy_actor.find_or_create("a", CONFIG) == "handle"
    assert given["max_concurrency"] >= 10_000
