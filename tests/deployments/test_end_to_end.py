"""The real application through its front door: Ray Serve and one replica of vLLM, nested, on the CPU.

All tests share one application. They run in the order of the file: the last one kills the engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from nestedfp.deployments.cluster import RunningApp

from .serving import ANSWER_S, eventually, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT = "Once upon a time there was a"


def settings(model: str) -> dict[str, Any]:
    return {
        "engine": {
            "model": model,
            "served_model_name": "smol",
            "device": "cpu",
            "arguments": {
                "dtype": "float16",
                "max_model_len": 512,
                "max_num_seqs": 4,
                "enforce_eager": True,
            },
        },
        "replicas": {
            "num_cpus": 0.5,
            "max_ongoing_requests": 6,
            "max_queued_requests": 4,
            "graceful_shutdown_timeout_s": ANSWER_S,
        },
        "http": {"max_body_bytes": 16384, "max_strict_requests": 1},
        # Nothing that these tests do reaches the thresholds: every flip is one that a test asked for.
        "policy": {
            "thresholds": {"waiting": {"high": 1000, "low": 999}},
            "cut_steps": True,
            "min_dwell_s": 0.0,
            "calm_s": 0.2,
            "return_gap_s": 0.0,
            "max_flips_per_minute": 60,
            "lease_s": 3.0,
            "sync_wait_s": 0.2,
        },
    }


@pytest.fixture(scope="module")
def app(model_path: str) -> Iterator[RunningApp]:
    with serving(settings(model_path)) as started:
        yield started


@pytest.fixture(scope="module")
def http(app: RunningApp) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=app.url, timeout=ANSWER_S, limits=limits) as client:
        yield client


def complete(http: httpx.Client, *, strict: bool = False, **more: Any) -> httpx.Response:
    body = {"model": "smol", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    headers = {"x-nestedfp-precision": "fp16"} if strict else {}
    return http.post("/completions", json=body, headers=headers)


def start_of(http: httpx.Client) -> str:
    return complete(http, max_tokens=1).headers["x-nestedfp-precision-at-start"]


def engine(app: RunningApp) -> dict[str, Any]:
    status: dict[str, Any] = app.replica_status()["engine"]
    return status


def pin(app: RunningApp, http: httpx.Client, mode: str) -> None:
    app.pin(mode, 120.0)
    eventually(lambda: start_of(http) == mode)


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"].startswith("application/json")
    error: dict[str, Any] = response.json()["error"]
    assert error["message"]
    assert error["code"] == response.status_code
    return error


def test_it_serves_the_model_with_nested_layers(app: RunningApp, http: httpx.Client) -> None:
    assert [model["id"] for model in http.get("/models").json()["data"]] == ["smol"]
    assert httpx.get(app.url.removesuffix("/v1") + "/health", timeout=ANSWER_S).status_code == 200
    status = engine(app)
    assert status["layers"] == {"nested": 120, "plain": 0}


def test_a_json_answer_says_what_served_it(app: RunningApp, http: httpx.Client) -> None:
    response = complete(http)
    assert response.status_code == 200
    assert response.headers["x-nestedfp-precision-at-start"] == "fp16"
    assert response.headers["x-nestedfp-replica"] == app.replica_status()["replica"]
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == 8
    # The last token leaves without being scheduled again.
    assert usage["nestedfp"] == {"fp16": usage["total_tokens"] - 1, "fp8": 0}


def test_the_openai_client_streams_and_gets_the_same_usage(app: RunningApp) -> None:
    client = openai.OpenAI(base_url=app.url, api_key="none", timeout=ANSWER_S, max_retries=0)
    stream = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Count to ten."}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert len([chunk for chunk in chunks if chunk.choices]) >= 10
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 12
    tokens = usage.model_dump()["nestedfp"]
    assert tokens["fp16"] > 12
    assert tokens["fp8"] == 0


def test_calls_under_one_request_id_and_samples_are_counted_each_by_itself(http: httpx.Client) -> None:
    def call(tokens: int) -> dict[str, Any]:
        body = {"model": "smol", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
        answer = http.post("/completions", json=body, headers={"x-request-id": "trace-7"})
        assert answer.headers["x-request-id"] == "trace-7"
        usage: dict[str, Any] = answer.json()["usage"]
        return usage

    with ThreadPoolExecutor(3) as clients:
        for usage in clients.map(call, (8, 16, 24)):
            assert sum(usage["nestedfp"].values()) == usage["total_tokens"] - 1
    both = complete(http, n=2, temperature=1.0).json()["usage"]
    # Each sample computes the prompt, and its last token leaves without being scheduled again.
    executed = 2 * both["prompt_tokens"] + both["completion_tokens"] - 2
    assert sum(both["nestedfp"].values()) == executed


def test_a_flip_under_a_running_stream_and_the_classes_after_it(app: RunningApp, http: httpx.Client) -> None:
    body = {
        "model": "smol",
        "prompt": PROMPT,
        "max_tokens": 120,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with http.stream("POST", "/completions", json=body) as response:
        assert response.headers["x-nestedfp-precision-at-start"] == "fp16"
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        next(events)
        app.pin("fp8", 120.0)
        *_, last, done = events
    assert done == "[DONE]"
    tokens = json.loads(last)["usage"]["nestedfp"]
    assert tokens["fp16"] > 0
    assert tokens["fp8"] > 0

    eventually(lambda: start_of(http) == "fp8")
    served = complete(http).json()["usage"]["nestedfp"]
    assert served["fp8"] > 0
    assert served["fp16"] == 0
    strict = complete(http, strict=True)
    assert strict.headers["x-nestedfp-precision-at-start"] == "fp16"
    assert strict.json()["usage"]["nestedfp"]["fp8"] == 0

    app.unpin()
    eventually(lambda: start_of(http) == "fp16")
    status = engine(app)
    assert status["mixed_steps"] == 0
    assert status["flips"] >= 2
    modes = [(change["from"], change["to"]) for change in app.policy_status()["log"]]
    assert ("fp16", "fp8") in modes
    assert ("fp8", "fp16") in modes


def test_misses_and_corrected_step_times_are_told(app: RunningApp, http: httpx.Client) -> None:
    """This model's steps on a CPU take longer than those of the H100 that predictions begin with."""
    complete(http, max_tokens=24)
    eventually(lambda: app.replica_status()["control"]["signals"].get("slo_miss_share") is not None)
    assert 0.0 <= app.replica_status()["control"]["signals"]["slo_miss_share"] <= 1.0
    eventually(lambda: engine(app)["step_corrections"].get("fp16", 0.0) > 1.0)


def test_16_bits_are_the_same_after_flips(app: RunningApp, http: httpx.Client) -> None:
    def text() -> str:
        answer: str = complete(http, max_tokens=24).json()["choices"][0]["text"]
        return answer

    before = text()
    pin(app, http, "fp8")
    pin(app, http, "fp16")
    assert text() == before
    app.unpin()


def test_a_killed_policy_actor_is_replaced_and_flips_nothing(app: RunningApp, http: httpx.Client) -> None:
    owner = app.policy_status()["owner"]
    flips = engine(app)["flips"]
    app.kill_policy()
    assert complete(http).status_code == 200
    eventually(lambda: len(app.policy_status()["replicas"]) == 1)
    assert app.policy_status()["owner"] != owner
    eventually(lambda: app.replica_status()["control"]["source"] == "actor")
    assert engine(app)["flips"] == flips


def test_an_aborted_stream_leaves_the_engine_idle(app: RunningApp, http: httpx.Client) -> None:
    body = {"model": "smol", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/completions", json=body) as response:
        # Held on to: an iterator that is collected closes the stream.
        lines = response.iter_lines()
        next(lines)
        eventually(lambda: engine(app)["running"] == 1)
    eventually(lambda: engine(app)["running"] == 0, within_s=8.0)


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (lambda http: http.post("/completions", content=b"{not json"), 400),
        (lambda http: complete(http, model="other"), 404),
        (lambda http: complete(http, prompt="word " * 2000), 400),
        (lambda http: complete(http, prompt="word " * 20000), 413),
        (lambda http: complete(http, max_tokens=-1), 400),
        (lambda http: http.post("/completions", json={"model": "smol"}), 400),
        (lambda http: http.post("/completions", json=[1, 2]), 400),
        (lambda http: http.post("/completions", headers={"x-nestedfp-precision": "int4"}), 400),
        (lambda http: http.post("/load_lora_adapter", json={}), 404),
        (lambda http: http.get("/completions"), 405),
    ],
    ids=[
        "bad JSON",
        "unknown model",
        "oversized prompt",
        "oversized body",
        "bad parameter",
        "missing parameter",
        "no object",
        "unknown class",
        "no such route",
        "wrong method",
    ],
)
def test_errors_have_openais_shape(
    http: httpx.Client, request_of: Callable[[httpx.Client], httpx.Response], status: int
) -> None:
    response = request_of(http)
    assert response.status_code == status
    error_of(response)


def test_a_client_cannot_set_serves_time_limit(http: httpx.Client) -> None:
    body = {"model": "smol", "prompt": PROMPT, "max_tokens": 4}
    response = http.post("/completions", json=body, headers={"x-request-timeout-seconds": "0.001"})
    assert response.status_code == 200


def test_a_full_replica_refuses_with_retry_after(app: RunningApp, http: httpx.Client) -> None:
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda _: complete(http, max_tokens=16), range(24)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        error_of(answer)
    eventually(lambda: engine(app)["running"] == 0)


def test_the_replica_ends_with_its_engine(app: RunningApp) -> None:
    replica = psutil.Process(app.replica_status()["pid"])
    family = replica.children(recursive=True)
    # The engine's core is the child with children of its own, the workers; titles depend on the environment.
    core = next(process for process in replica.children() if process.children())
    core.kill()
    killed_s = time.monotonic()
    replica.wait(timeout=10)
    assert time.monotonic() - killed_s < 5.0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
