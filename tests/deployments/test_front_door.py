"""The proxy's answers in OpenAI's shape."""

from __future__ import annotations

import json

import pytest

from nestedfp.deployments.arrival import RECEIVED_HEADER
from nestedfp.deployments.asgi import App, Headers, Receive, Scope, Send, send_error
from nestedfp.deployments.front_door import SERVE_HEADERS, FrontDoor

from .asgi_client import ask


def answering(status: int, kind: bytes, *parts: bytes, headers: Headers | None = None) -> App:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        start = [(b"content-type", kind), *(headers or [])]
        await send({"type": "http.response.start", "status": status, "headers": start})
        for index, part in enumerate(parts):
            more = index < len(parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})

    return app


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
async def test_textual_errors_take_openais_shape(status: int) -> None:
    answer = await ask(FrontDoor(answering(status, b"text/plain", b"queues ", b"full")), "POST", "/x")
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    error = json.loads(answer.body)["error"]
    assert (error["message"], error["code"]) == ("queues full", status)
    assert ("retry-after" in answer.headers) == (status in (429, 503))


async def test_a_retry_after_of_serve_stays() -> None:
    app = answering(503, b"text/plain", b"full", headers=[(b"retry-after", b"7")])
    assert (await ask(FrontDoor(app), "POST", "/x")).headers["retry-after"] == "7"


async def test_answers_of_the_replica_pass() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send_error(send, 400, "bad", "BadRequestError", param="model")

    answer = await ask(FrontDoor(app), "POST", "/x")
    assert json.loads(answer.body)["error"]["param"] == "model"
    stream = await ask(FrontDoor(answering(200, b"text/event-stream", b"a", b"b")), "POST", "/x")
    assert [message["body"] for message in stream.messages[1:]] == [b"a", b"b"]


async def test_a_replica_that_died_before_it_answered_is_a_503() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("actor died")

    answer = await ask(FrontDoor(app), "POST", "/x")
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert "actor died" not in answer.body.decode()


async def test_a_stream_that_breaks_is_cut_not_answered_twice() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("actor died")

    with pytest.raises(RuntimeError, match="actor died"):
        await ask(FrontDoor(app), "POST", "/x")


async def test_headers_that_change_serve_are_taken_away() -> None:
    seen: list[Headers] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(scope["headers"])
        await send_error(send, 404, "no", "NotFoundError")

    headers = [*((name.title(), b"1") for name in SERVE_HEADERS), (b"accept", b"*/*")]
    await ask(FrontDoor(app), "POST", "/x", headers=headers)
    names = [[name for name, _ in headers] for headers in seen]
    assert names == [[b"accept", RECEIVED_HEADER]]
