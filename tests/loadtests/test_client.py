"""The client without Locust: what is sent, and what each kind of answer becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nestedfp.loadtests.client import Exchange, body, check_endpoint, exchange, new_client
from nestedfp.loadtests.settings import ReplaySettings
from nestedfp.loadtests.stream import TokenStream
from nestedfp.loadtests.traces import TraceRequest

REQUEST = TraceRequest(index=4, arrival_s=0.0, prompt_tokens=12, output_tokens=5, precision_class="fp16")


def send(settings: ReplaySettings, request: TraceRequest = REQUEST) -> Exchange:
    seen = Exchange(TokenStream())
    with new_client(settings) as client:
        exchange(client, settings, request, seen, lambda _: None)
    return seen


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_request_asks_for_what_the_trace_says(dummy: Callable[..., Any], endpoint: str) -> None:
    server = dummy(ttft_s=0.01, itl_s=0.0)
    seen = send(ReplaySettings(server.url, "dummy", endpoint, api_key="key"))
    assert seen.error is None
    assert len(seen.stream.token_times) == 5
    assert (seen.precision_at_start, seen.replica) == ("fp16", "r0")
    entry = server.answered()[0]
    assert entry["path"] == {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[endpoint]
    sent = entry["body"]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["stream"]) == ("dummy", 5, 0.0, True)
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["ignore_eos"] is True
    text = sent["messages"][0]["content"] if endpoint == "chat" else sent["prompt"]
    assert len(text.split()) == 12
    assert entry["headers"]["x-nestedfp-precision"] == "fp16"
    assert entry["headers"]["authorization"] == "bearer key"
    assert entry["headers"]["accept-encoding"] == "identity"


def test_ignore_eos_can_be_left_out() -> None:
    assert "ignore_eos" not in body(ReplaySettings("http://h", "m", ignore_eos=False), REQUEST)


@pytest.mark.parametrize(
    ("fault", "status", "message", "tokens"),
    [
        ("500", 500, "the engine is dead", 0),
        ("503", 503, "overloaded, in plain text", 0),
        ("refuse", None, "RemoteProtocolError: Server disconnected", 0),
        ("abort", 200, "RemoteProtocolError: peer closed connection", 2),
        ("error", 200, "out of blocks", 2),
        ("no done", 200, "the stream ended before [DONE]", 5),
        ("hang", 200, "ReadTimeout", 0),
    ],
)
def test_each_way_to_fail_keeps_its_reason_and_what_came_before(
    dummy: Callable[..., Any], fault: str, status: int | None, message: str, tokens: int
) -> None:
    server = dummy(ttft_s=0.01, itl_s=0.01, faults={"0": fault})
    seen = send(ReplaySettings(server.url, "dummy", request_timeout_s=1.0))
    assert message in (seen.error or "")
    assert seen.status == status
    assert len(seen.stream.token_times) == tokens


def test_an_answer_without_usage_is_complete_and_uncounted(dummy: Callable[..., Any]) -> None:
    server = dummy(ttft_s=0.01, itl_s=0.0, faults={"0": "no usage"})
    seen = send(ReplaySettings(server.url, "dummy"))
    assert seen.error is None
    assert seen.stream.usage_count("completion_tokens") is None


def test_nobody_there_is_an_error_of_the_exchange() -> None:
    seen = send(ReplaySettings("http://127.0.0.1:9", "dummy"))
    assert "ConnectError" in (seen.error or "")


def test_the_endpoint_is_checked_before_a_replay(dummy: Callable[..., Any]) -> None:
    server = dummy()
    for url, model, problem in [
        (server.url, "dummy", None),
        (server.url, "llama", "model 'llama' is not served"),
        ("http://127.0.0.1:9", "dummy", "no answer from http://127.0.0.1:9"),
    ]:
        settings = ReplaySettings(url, model)
        with new_client(settings) as client:
            found = check_endpoint(client, settings)
        assert found is None if problem is None else found is not None and found.startswith(problem)
