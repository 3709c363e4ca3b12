"""Headers and usage by precision; everything else must pass untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from nestedfp.deployments.arrival import DELAYED
from nestedfp.deployments.asgi import App, Message, Receive, Scope, Send, header, send_error, send_json
from nestedfp.deployments.precision_report import PrecisionReport

from .asgi_client import Answer, ask, scope_of

CHAT = "/v1/chat/completions"
TOKENS = {"fp16": 40, "fp8": 12}
USAGE = {"prompt_tokens": 40, "completion_tokens": 12, "total_tokens": 52}


class Desk:
    """A :class:`PrecisionReport` with its surroundings."""

    def __init__(self, inner: App, tokens: Mapping[str, int] | None = TOKENS) -> None:
        self.tokens = tokens
        self.asked: list[str] = []
        self.arrivals = 0
        self.served: list[tuple[bool, int, Mapping[str, int] | None]] = []
        self.delays: list[float | None] = []
        self.precision = "fp8"
        self.app = PrecisionReport(
            inner,
            replica="r1",
            precision=lambda: self.precision,
            tokens=self._take,
            arrived=self._arrived,
            served=self._served,
        )

    async def ask(self, **more: Any) -> Answer:
        return await ask(self.app, "POST", CHAT, **more)

    async def _take(self, request_id: str) -> Mapping[str, int] | None:
        self.asked.append(request_id)
        return self.tokens

    def _arrived(self) -> None:
        self.arrivals += 1

    def _served(
        self,
        *,
        strict: bool,
        status: int,
        tokens: Mapping[str, int] | None,
        waited_s: float,
        delay_s: float | None = None,
    ) -> None:
        self.served.append((strict, status, tokens))
        self.delays.append(delay_s)


def json_app(value: object) -> App:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send_json(send, 200, json.dumps(value).encode())

    return app


def stream_app(*bodies: bytes) -> App:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def test_json_usage_gains_tokens_by_precision() -> None:
    answer = {"id": "chatcmpl-1", "choices": [{"text": "ü"}], "usage": USAGE}
    desk = Desk(json_app(answer))
    response = await desk.ask()
    assert json.loads(response.body) == {**answer, "usage": {**USAGE, "nestedfp": TOKENS}}
    assert int(response.headers["content-length"]) == len(response.body)
    assert response.headers["x-nestedfp-precision-at-start"] == "fp8"
    assert response.headers["x-nestedfp-replica"] == "r1"
    assert desk.asked == ["chatcmpl-1"]
    assert desk.arrivals == 1
    assert desk.served == [(False, 200, TOKENS)]


async def test_unknown_tokens_leave_the_body_alone() -> None:
    answer = {"id": "chatcmpl-1", "usage": USAGE}
    response = await Desk(json_app(answer), tokens=None).ask()
    assert response.body == json.dumps(answer).encode()


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
async def test_the_precision_at_the_start_is_that_in_force_when_the_headers_leave(kind: bytes) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        desk.precision = "fp16"  # A flip while the request waited.
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"{}"})

    desk = Desk(app)
    assert (await desk.ask()).headers["x-nestedfp-precision-at-start"] == "fp16"


async def test_a_strict_request_starts_in_16_bits_whatever_the_target() -> None:
    desk = Desk(json_app({"id": "x", "usage": USAGE}), tokens={"fp16": 52, "fp8": 0})
    response = await desk.ask(headers=[(b"x-nestedfp-precision", b"fp16")])
    assert response.headers["x-nestedfp-precision-at-start"] == "fp16"
    assert desk.served[0][0] is True


async def test_a_stream_changes_in_its_last_usage_only_and_passes_message_by_message() -> None:
    chunks = [
        event({"id": "cmpl-1", "choices": [{"text": 'he said "usage":{ and left ü'}]}),
        event({"id": "cmpl-1", "choices": [{"text": "a"}], "usage": USAGE}),
        event({"id": "cmpl-1", "choices": [], "usage": USAGE}),
        b"data: [DONE]\n\n",
    ]
    desk = Desk(stream_app(*chunks))
    response = await desk.ask()
    bodies = [message["body"] for message in response.messages[1:]]
    final = event({"id": "cmpl-1", "choices": [], "usage": {**USAGE, "nestedfp": TOKENS}})
    assert bodies == [chunks[0], chunks[1], final, chunks[3], b""]
    assert desk.asked == ["cmpl-1"]
    assert response.headers["x-nestedfp-precision-at-start"] == "fp8"


async def test_a_stream_without_usage_is_counted_too() -> None:
    chunks = [event({"id": "cmpl-1", "choices": [{"text": text, "id": "no"}]}) for text in "ab"]
    desk = Desk(stream_app(*chunks, b"data: [DONE]\n\n"))
    response = await desk.ask()
    assert response.body == b"".join([*chunks, b"data: [DONE]\n\n"])
    assert desk.asked == ["cmpl-1"]
    assert desk.served == [(False, 200, TOKENS)]


async def test_events_that_share_a_message_stay_whole() -> None:
    last = event({"id": "cmpl-1", "choices": [], "usage": USAGE})
    response = await Desk(stream_app(b": keep-alive\n\n" + last + b"data: [DONE]\n\n")).ask()
    final = event({"id": "cmpl-1", "choices": [], "usage": {**USAGE, "nestedfp": TOKENS}})
    assert response.body == b": keep-alive\n\n" + final + b"data: [DONE]\n\n"


async def test_the_start_of_a_stream_is_not_held_back() -> None:
    sent: list[Message] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        assert len(sent) == 1
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert len(sent) == 2

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await Desk(app).app({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)


async def test_errors_pass_and_are_counted() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send_error(send, 404, "no such model", "NotFoundError")

    desk = Desk(app)
    response = await desk.ask()
    assert response.status == 404
    assert json.loads(response.body)["error"]["message"] == "no such model"
    assert (desk.asked, desk.served) == ([], [(False, 404, None)])


async def test_a_request_without_an_answer_counts_as_left() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("cut")

    desk = Desk(app)
    with pytest.raises(RuntimeError, match="cut"):
        await desk.ask()
    assert desk.served == [(False, 499, None)]


class Gone(Exception):
    """What a server raises when the client has gone."""


@pytest.mark.parametrize("error", [asyncio.CancelledError, Gone])
async def test_a_stream_that_is_cut_off_counts_as_left(error: type[BaseException]) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        raise error

    desk = Desk(app)
    with pytest.raises(error):
        await desk.ask()
    assert desk.served == [(False, 499, None)]


async def test_an_end_that_reaches_nobody_counts_as_left() -> None:
    async def send(message: Message) -> None:
        if not message.get("more_body", True):
            raise Gone

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    desk = Desk(stream_app(event({"id": "cmpl-1", "choices": []})))
    with pytest.raises(Gone):
        await desk.app(scope_of("POST", CHAT), receive, send)
    assert desk.served == [(False, 499, None)]


async def test_requests_that_share_an_id_are_told_apart() -> None:
    seen: list[bytes | None] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(header(scope["headers"], b"x-request-id"))
        await send_json(send, 200, b"{}")

    desk = Desk(app)
    for headers in ([(b"x-request-id", b"trace-7")], [(b"X-Request-Id", b"trace-7")], []):
        await desk.ask(headers=headers)
    first, second, none = seen
    assert first is not None
    assert second is not None
    assert first.startswith(b"trace-7-")
    assert second.startswith(b"trace-7-")
    assert first != second
    assert none is None


async def test_how_long_a_request_took_to_the_engine_is_told_if_it_is_known() -> None:
    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        if header(scope["headers"], b"x-way") is not None:
            scope[DELAYED] = 0.25
        await send_json(send, 200, b"{}")

    desk = Desk(app)
    await desk.ask(headers=[(b"x-way", b"1")])
    await desk.ask()
    assert desk.delays == [0.25, None]


async def test_other_routes_are_not_touched() -> None:
    desk = Desk(json_app({"id": "x", "usage": USAGE}))
    response = await ask(desk.app, "GET", "/v1/models")
    assert "x-nestedfp-replica" not in response.headers
    assert desk.arrivals == 0
