"""The simulated engine and its API in one process, in real time but with steps of a millisecond."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from nestedfp.deployments.arrival import RECEIVED_HEADER
from nestedfp.deployments.asgi import Message
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.simulated_app import SimulatedApp
from nestedfp.deployments.simulated_engine import Generation, NeverFits, Refused, SimulatedEngine
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.policy import Policy
from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.replica import Order
from nestedfp.policies.simulation.cluster import simulate
from nestedfp.policies.simulation.state import Columns, EngineSettings

SLOW_S, FAST_S = 0.004, 0.002
COSTS = {
    "fp16": {"overhead_s": SLOW_S, "weights_s": 0.0, "token_s": 1e-5},
    "fp8": {"overhead_s": FAST_S, "weights_s": 0.0, "token_s": 1e-5},
}
MODEL = LatencyModel(costs={mode: StepCosts(**costs) for mode, costs in COSTS.items()}, chunk_tokens=64)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def engine(clock: Clock | None = None, **changes: Any) -> SimulatedEngine:
    settings = EngineSettings(model=MODEL, max_sequences=4, kv_tokens=1000, noise=0.0, flip_s=0.0)
    return SimulatedEngine(settings, places=changes.pop("places", 16), clock=clock or Clock(), **changes)


def run_to(simulated: SimulatedEngine, clock: Clock, now: float) -> None:
    clock.now = now
    simulated.catch_up()


def idle(simulated: SimulatedEngine) -> bool:
    status = simulated.status()
    return (status.running, status.waiting, status.waiting_prompt_tokens, status.kv_usage) == (0, 0, 0, 0.0)


def test_it_serves_a_trace_step_for_step_as_the_simulator_does() -> None:
    random = np.random.default_rng(3)
    count = 40
    trace = Columns(
        np.cumsum(random.exponential(0.02, count)),
        random.integers(1, 150, count).astype(np.int32),
        random.integers(1, 30, count).astype(np.int32),
        random.random(count) < 0.2,
    )
    settings = EngineSettings(model=MODEL, max_sequences=4, kv_tokens=1000, noise=0.0, flip_s=0.0)
    policy = Policy(PolicyConfig(controller="static-fp16"))
    wanted = simulate(trace, policy, replicas=1, seed=0, settings=settings).requests
    clock = Clock()
    simulated = SimulatedEngine(settings, places=count, clock=clock)
    served: list[Generation] = []
    for arrival_s, prompt, output, strict in zip(
        trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.strict, strict=True
    ):
        run_to(simulated, clock, 50.0 + arrival_s)
        served.append(simulated.submit(int(prompt), int(output), strict=bool(strict)))
    run_to(simulated, clock, 1000.0)
    assert [one.token_s[0] for one in served] == pytest.approx(wanted["first_s"], abs=1e-9)
    assert [one.token_s[-1] for one in served] == pytest.approx(wanted["finish_s"], abs=1e-9)
    assert [one.tokens["fp16"] for one in served] == wanted["fp16"].tolist()
    assert idle(simulated)


def test_a_request_is_as_old_as_it_is_told() -> None:
    clock = Clock()
    simulated = engine(clock)
    told, new = simulated.submit(10, 3, strict=False, age_s=0.4), simulated.submit(10, 3, strict=False)
    run_to(simulated, clock, clock.now + 1.0)
    assert told.done
    assert new.done
    # Both are in step from the second on.
    assert told.token_s[1:] == new.token_s[:2]
    assert told.ttft_s == pytest.approx(0.4 + SLOW_S, abs=1e-3)
    assert new.ttft_s == pytest.approx(told.ttft_s - 0.4 + SLOW_S, abs=1e-3)


def test_a_flip_holds_from_the_next_step_on() -> None:
    clock = Clock()
    simulated = engine(clock)
    one = simulated.submit(10, 8, strict=False)
    run_to(simulated, clock, 50.0 + 2.5 * SLOW_S)
    simulated.set_target("fp8", epoch=3, reason="test", limits=None)
    run_to(simulated, clock, 60.0)
    assert one.token_modes == ["fp16"] * 3 + ["fp8"] * 5
    gaps = np.diff(one.token_s)
    assert gaps[:2] == pytest.approx([SLOW_S] * 2, rel=0.1)
    assert gaps[2:] == pytest.approx([FAST_S] * 5, rel=0.1)
    assert sum(one.tokens.values()) == 10 + 8 - 1
    status = simulated.status()
    assert (status.mode, status.epoch, status.flips, status.steps) == ("fp8", 3, 1, {"fp16": 3, "fp8": 5})


def test_a_strict_request_gets_16_bits_from_an_engine_in_fp8() -> None:
    clock = Clock()
    simulated = engine(clock)
    simulated.set_target("fp8", epoch=1, reason="test", limits=None)
    strict = simulated.submit(10, 5, strict=True)
    beside = simulated.submit(10, 9, strict=False)
    run_to(simulated, clock, 60.0)
    assert strict.tokens == {"fp16": 14, "fp8": 0}
    assert beside.tokens["fp8"] > 0


@pytest.mark.parametrize("wait_s", [0.0, 2.5 * SLOW_S], ids=["in the first step", "while decoding"])
def test_aborted_requests_leave_nothing_behind(wait_s: float) -> None:
    clock = Clock()
    simulated = engine(clock)
    every = [simulated.submit(20 + n, 10 + n, strict=n % 2 == 0) for n in range(8)]
    run_to(simulated, clock, clock.now + wait_s)
    for number in (1, 6, 7, 0, 4):
        simulated.abort(every[number])
        simulated.abort(every[number])
    assert simulated.status().strict_running + simulated.extra_signals()["strict_waiting"] == 1
    run_to(simulated, clock, 60.0)
    rest = [every[number] for number in (2, 3, 5)]
    assert all(one.done and len(one.token_s) == one.output_tokens for one in rest)
    assert not any(every[number].done for number in (1, 6, 7, 0, 4))
    assert idle(simulated)
    assert len(simulated._free) == 16


def test_what_does_not_fit_is_refused() -> None:
    simulated = engine(places=2)
    with pytest.raises(NeverFits):
        simulated.submit(900, 101, strict=False)
    simulated.set_target("fp8", epoch=1, reason="shed", limits={"waiting_prompt_tokens": 100.0})
    simulated.submit(100, 5, strict=False)
    simulated.submit(100, 5, strict=False)
    with pytest.raises(Refused, match="places"):
        simulated.submit(1, 1, strict=False)


def test_a_bounded_queue_sheds() -> None:
    simulated = engine()
    simulated.set_target("fp8", epoch=1, reason="shed", limits={"waiting_prompt_tokens": 100.0})
    for _ in range(2):
        simulated.submit(90, 5, strict=False)
    with pytest.raises(Refused, match="bounds the queue"):
        simulated.submit(90, 5, strict=False)
    assert len(simulated._free) == 14


@pytest.mark.parametrize(("mode", "limits"), [("mlp-fp8", None), ("auto", {"tokens_high": 3.0})])
def test_unknown_modes_and_limits_are_named(mode: str, limits: dict[str, float] | None) -> None:
    with pytest.raises(InvalidField):
        engine().set_target(mode, epoch=1, reason="test", limits=limits)


def test_auto_under_the_policys_limits_takes_fp8_only_for_what_is_behind() -> None:
    clock = Clock()
    simulated = engine(clock)
    limits = {
        "pace_s": 0.9 * SLOW_S,
        "tpot_s": SLOW_S,
        "ttft_s": 1e9,
        "late_s": 1e9,
        "least_tokens": 0.0,
        "light_ttft_s": 1e9,
        "given_up_s": 1e9,
        "light_s": 0.0,
        "heavy_s": 0.0,
    }
    simulated.set_target("auto", epoch=1, reason="test", limits=limits)
    one = simulated.submit(10, 60, strict=False)
    run_to(simulated, clock, 60.0)
    assert one.tpot_s is not None
    assert one.tpot_s <= 0.9 * SLOW_S
    assert 0.5 < one.token_modes.count("fp16") / 60 < 0.9


def settings_of(**changes: Any) -> DeploymentSettings:
    return DeploymentSettings.from_dict(
        {
            "engine": {
                "model": "simulated",
                "device": "simulated",
                "arguments": {"max_num_seqs": 8, "max_model_len": 500, "stream_interval": 4},
            },
            "policy": {"latency": {"chunk_tokens": 64, "costs": COSTS}},
            **changes,
        }
    )


@asynccontextmanager
async def started(
    served: Callable[..., None] = lambda **_: None, **changes: Any
) -> AsyncIterator[SimulatedApp]:
    app = await SimulatedApp.start(settings_of(**changes), replica="simulated-r", served=served)
    try:
        yield app
    finally:
        app.shutdown()


async def post(
    app: SimulatedApp,
    body: dict[str, Any],
    *,
    strict: bool = False,
    leave_after: int | None = None,
    age_s: float | None = None,
) -> list[Message]:
    """The messages of the answer.

    The client leaves after `leave_after` of them. The request reached the proxy `age_s` ago.
    """
    sent: list[Message] = []
    left = asyncio.Event()
    request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        if request:
            return request.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if leave_after is not None and len(sent) >= leave_after:
            left.set()

    headers = [(b"x-nestedfp-precision", b"fp16")] if strict else []
    if age_s is not None:
        headers.append((RECEIVED_HEADER, f"{time.time() - age_s:.6f} proxy".encode()))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    async with asyncio.timeout(20.0):
        await app.asgi(scope, receive, send)
    return sent


def headers_of(messages: list[Message]) -> dict[bytes, bytes]:
    return dict(messages[0]["headers"])


async def test_an_answer_is_labelled_and_counts_by_precision() -> None:
    async with started() as app:
        messages = await post(app, {"prompt": [1] * 20, "max_tokens": 6, "token_times": True})
        assert headers_of(messages)[b"x-nestedfp-replica"] == b"simulated-r"
        answer = json.loads(messages[1]["body"])
        assert answer["system_fingerprint"].startswith("simulated")
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, 6)
        assert usage["nestedfp"] == {"fp16": 25, "fp8": 0}
        simulated = usage["simulated"]
        assert simulated["label"].startswith("simulated")
        assert simulated["token_modes"] == ["fp16"] * 6
        assert simulated["tpot_s"] == pytest.approx(SLOW_S, rel=0.3)
        assert simulated["ttft_s"] == pytest.approx(simulated["token_s"][0] - simulated["arrival_s"])


async def test_ttft_begins_at_the_proxy() -> None:
    async with started() as app:
        body = {"prompt": [1] * 20, "max_tokens": 2, "token_times": True}
        answers = [await post(app, body, age_s=age_s) for age_s in (0.01, 0.41)]
        near, far = (json.loads(messages[1]["body"])["usage"]["simulated"] for messages in answers)
        assert near["queued_s"] - near["arrival_s"] == pytest.approx(0.0, abs=0.001)
        assert far["queued_s"] - far["arrival_s"] == pytest.approx(0.4, abs=0.1)
        assert far["ttft_s"] == pytest.approx(far["token_s"][0] - far["arrival_s"])
        assert (await app.signals())["ttft_p90_s"] == pytest.approx(far["ttft_s"])


async def test_a_stream_sends_the_first_token_alone_and_then_several() -> None:
    async with started() as app:
        body = {
            "prompt": "four words of prompt",
            "max_tokens": 10,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        messages = await post(app, body)
        events = b"".join(message["body"] for message in messages[1:]).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        words = [len(chunk["choices"][0]["text"].split()) for chunk in chunks[:-1]]
        assert words[0] == 1
        assert sum(words) == 10
        assert len(words) <= 4
        assert chunks[-1]["usage"]["nestedfp"] == {"fp16": 13, "fp8": 0}
        assert chunks[-1]["usage"]["simulated"]["label"].startswith("simulated")


async def test_a_client_that_leaves_frees_the_engine() -> None:
    async with started() as app:
        body = {"prompt": [1], "max_tokens": 400, "stream": True}
        messages = await post(app, body, leave_after=3)
        assert len(messages) < 50
        assert app.status is not None
        assert (app.status.running, app.status.waiting) == (0, 0)


async def test_fp8_is_ordered_and_a_strict_answer_has_none() -> None:
    async with started() as app:
        await app.apply(Order("fp8", 2, "test"))
        body = {"prompt": [1] * 5, "max_tokens": 5}
        served, strict = await post(app, body), await post(app, body, strict=True)
        assert headers_of(served)[b"x-nestedfp-precision-at-start"] == b"fp8"
        assert json.loads(served[1]["body"])["usage"]["nestedfp"] == {"fp16": 0, "fp8": 9}
        assert headers_of(strict)[b"x-nestedfp-precision-at-start"] == b"fp16"
        assert json.loads(strict[1]["body"])["usage"]["nestedfp"] == {"fp16": 9, "fp8": 0}


async def test_short_of_places_a_strict_request_waits_within_the_slo_and_is_then_refused() -> None:
    patient = {"http": {"max_strict_requests": 1}}
    body = {"prompt": [1] * 5, "max_tokens": 40}
    async with started(**patient) as app:
        both = await asyncio.gather(post(app, body, strict=True), post(app, body, strict=True))
        assert [messages[0]["status"] for messages in both] == [200, 200]
    hasty = {"http": {"max_strict_requests": 1, "strict_wait_s": 0.02, "retry_after_s": 7}}
    told: list[tuple[int, bool]] = []

    def served(*, strict: bool, status: int, tokens: Any, waited_s: float, **_: Any) -> None:
        told.append((status, waited_s > 0.01))

    async with started(served, **hasty) as app:
        both = await asyncio.gather(post(app, body, strict=True), post(app, body, strict=True))
        assert told == [(503, True), (200, False)]
        assert sorted(messages[0]["status"] for messages in both) == [200, 503]
        refused = next(messages for messages in both if messages[0]["status"] == 503)
        assert headers_of(refused)[b"retry-after"] == b"7"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "other", "prompt": "a"}, 404),
        ({"prompt": [1] * 600}, 400),
        ({"prompt": "a", "max_tokens": 0}, 400),
        ({"prompt": "a", "max_tokens": "many"}, 400),
        ({"prompt": "a", "max_tokens": 4, "max_completion_tokens": 0}, 400),
        ({"prompt": "a", "n": 2}, 400),
        ({"prompt": [True]}, 400),
        ({"prompt": []}, 400),
        ({}, 400),
    ],
)
async def test_bad_requests_get_openais_errors(body: dict[str, Any], status: int) -> None:
    async with started() as app:
        messages = await post(app, body)
        assert messages[0]["status"] == status
        assert json.loads(messages[1]["body"])["error"]["code"] == status


async def test_the_server_may_start_and_stop_it() -> None:
    async with started() as app:
        come = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        sent: list[Message] = []

        async def receive() -> Message:
            return come.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        await app.asgi({"type": "lifespan"}, receive, send)
        assert [message["type"] for message in sent] == [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ]


async def test_its_signals_are_a_whole_report() -> None:
    async with started() as app:
        await post(app, {"prompt": [1] * 20, "max_tokens": 6})
        identity = {"replica_id": "r", "boot_id": "b", "sequence": 1, "mode": "fp16", "epoch": 0}
        report = ReplicaReport.from_dict({**await app.signals(), **identity})
        assert report.faults == ()
        assert report.tokens_fp16 == 25
        assert report.arriving_prompt_tokens_per_s == 20.0
        assert report.slo_miss_share == 0.0
        assert report.step_time_s is not None


def test_a_bad_argument_is_named() -> None:
    engine_settings = {"model": "m", "device": "simulated", "arguments": {"dtype": "float16"}}
    with pytest.raises(InvalidField, match=r"engine\.arguments\.dtype"):
        DeploymentSettings.from_dict({"engine": engine_settings})


def test_a_simulated_replica_imports_neither_torch_nor_vllm() -> None:
    program = (
        "import sys, nestedfp.deployments.replica, nestedfp.deployments.simulated_app;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
