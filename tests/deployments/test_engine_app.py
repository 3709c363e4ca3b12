"""An engine's application with a stand-in for the engine: orders, status, and what follows for requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nestedfp.deployments import engine_app
from nestedfp.deployments.asgi import Receive, Scope, Send, send_json
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.engine_app import EngineApp
from nestedfp.deployments.replica import with_user_config
from nestedfp.deployments.signals import RequestWindow
from nestedfp.policies.replica import Order
from nestedfp.policies.roofline import NAME
from nestedfp.vllm.status import EngineStatus

from .asgi_client import ask
from .engine_status import engine_status

CHAT = "/v1/chat/completions"
SETTINGS = DeploymentSettings.from_dict({"engine": {"model": "m"}, "policy": {"slo": {"ttft_s": 2.0}}})


class Engine:
    """Answers the control's calls as an engine with a queue of `queued` prompt tokens would."""

    def __init__(self, queued: int = 0) -> None:
        self.queued = queued
        self.targets: list[dict[str, Any]] = []

    @property
    def engine_core(self) -> Engine:
        return self

    async def call_utility_async(self, _method: str, request: dict[str, Any]) -> dict[str, Any]:
        if request["command"] == "set_target":
            self.targets.append(request)
            return {"result": None}
        return {"result": status(self.queued).to_dict()}


def status(queued: int) -> EngineStatus:
    counts: dict[str, Any] = {"fp16": 0, "fp8": 0}
    return engine_status(
        mode="fp8",
        epoch=1,
        current="fp8",
        steps=counts,
        tokens=counts,
        waiting=1,
        waiting_prompt_tokens=queued,
        step_time_s={"fp16": None, "fp8": None},
        step_corrections={"fp16": 1.5},
    )


async def answering(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send_json(send, 200, b"{}")


def opened(engine: Engine, served: list[int] | None = None) -> EngineApp:
    app = EngineApp(engine, SETTINGS, RequestWindow(10.0))
    told = [] if served is None else served
    app.open(answering, SETTINGS, "r1", lambda **facts: told.append(facts["status"]))
    return app


async def status_of(app: EngineApp) -> int:
    return (await ask(app.asgi, "POST", CHAT, body=(b"{}",))).status


async def test_a_bound_on_the_queue_refuses_what_comes_beyond_it() -> None:
    engine = Engine(queued=500)
    served: list[int] = []
    app = opened(engine, served)
    await app.refresh()
    assert await status_of(app) == 200
    await app.apply(Order("fp8", 1, "strained", {"waiting_prompt_tokens": 499.0}, "actor"))
    refused = await ask(app.asgi, "POST", CHAT, body=(b"{}",))
    assert refused.status == 503
    assert refused.headers["retry-after"] == "1"
    assert json.loads(refused.body)["error"]["code"] == 503
    assert (await ask(app.asgi, "GET", "/v1/models")).status == 200
    engine.queued = 499
    await app.refresh()
    assert await status_of(app) == 200
    engine.queued = 500
    await app.refresh()
    await app.apply(Order("fp8", 2, "calmer", None, "actor"))
    assert await status_of(app) == 200
    assert served == [200, 503, 200, 200]


async def test_an_order_reaches_the_engine_and_the_header() -> None:
    engine = Engine()
    app = opened(engine)
    await app.apply(Order("fp8", 7, "because", None, "actor"))
    assert (engine.targets[0]["mode"], engine.targets[0]["epoch"]) == ("fp8", 7)
    answer = await ask(app.asgi, "POST", CHAT, body=(b"{}",))
    assert answer.headers["x-nestedfp-precision-at-start"] == "fp8"


async def test_an_engine_that_hangs_is_seen_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Engine):
        async def call_utility_async(self, _method: str, request: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(60.0)
            raise AssertionError("it was waited for")

    monkeypatch.setattr(engine_app, "_ANSWER_TIMEOUT_S", 0.02)
    app = opened(Hanging())
    assert not await app.refresh()
    assert app.silent_s >= 0.02
    assert "waiting" not in await app.signals()
    alive = opened(Engine())
    await asyncio.sleep(0.02)
    assert await alive.refresh()
    assert alive.silent_s < 0.02


PLAIN = DeploymentSettings.from_dict({"engine": {"model": "m", "nested": False}})


class PlainEngine:
    """Plain vLLM, which knows none of the control's calls; it answers while it is told to."""

    def __init__(self) -> None:
        self.engine_core = None
        self.answers = asyncio.Event()
        self.asked = 0

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await self.answers.wait()
        return False


async def test_plain_vllm_that_hangs_is_seen_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_app, "_ANSWER_TIMEOUT_S", 0.02)
    engine = PlainEngine()
    app = EngineApp(engine, PLAIN, RequestWindow(10.0))
    assert not await app.refresh()
    assert app.silent_s >= 0.02
    engine.answers.set()
    assert await app.refresh()
    assert app.silent_s < 0.02
    assert app.status is None
    assert engine.asked == 2


async def test_a_changed_slo_is_what_misses_are_counted_by() -> None:
    window = RequestWindow(10.0)
    app = EngineApp(Engine(), SETTINGS, window)
    app.open(answering, SETTINGS, "r1", lambda **_: None)
    window._add(window._ttft_s, (1.5,))
    assert (await app.signals())["slo_miss_share"] == 0.0
    app.adopt(with_user_config(SETTINGS, {"policy": {"slo": {"ttft_s": 1.0}}}))
    assert (await app.signals())["slo_miss_share"] == 1.0


async def test_the_latency_model_is_as_the_engine_corrected_it() -> None:
    app = opened(Engine())
    assert app.latency_model == {"costs": NAME, "correction": {}}
    await app.refresh()
    assert app.latency_model == {"costs": NAME, "correction": {"fp16": 1.5}}
    costs = {mode: {"overhead_s": 0.01, "weights_s": 0.0, "token_s": 0.0} for mode in ("fp16", "fp8")}
    app.adopt(with_user_config(SETTINGS, {"policy": {"latency": {"costs": costs}}}))
    assert app.latency_model["costs"] == "policy.latency"
