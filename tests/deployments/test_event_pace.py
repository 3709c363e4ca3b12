"""Streams are joined where they are many, and never lose, reorder or keep what they say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from nestedfp.deployments.asgi import App, Message, Receive, Scope, Send, send_json
from nestedfp.deployments.event_pace import EventPace

from .asgi_client import scope_of

SCOPE = scope_of("POST", "/v1/chat/completions")


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


class Client:
    """Takes the messages of one response, and when each came."""

    def __init__(self) -> None:
        self.messages: list[tuple[float, Message]] = []

    async def send(self, message: Message) -> None:
        self.messages.append((time.monotonic(), message))

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for _, m in self.messages if m["type"] == "http.response.body"]


def streaming(events: Callable[[], AsyncIterator[bytes]]) -> App:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def numbers(count: int, every_s: float) -> AsyncIterator[bytes]:
    for number in range(count):
        yield b"data: %d\n\n" % number
        await asyncio.sleep(every_s)


ALL = b"".join(b"data: %d\n\n" % number for number in range(40))


async def test_a_stream_alone_is_not_touched() -> None:
    client = Client()
    pace = EventPace(streaming(lambda: numbers(40, 0.004)), per_second=1000)
    await pace(SCOPE, nothing, client.send)
    assert b"".join(client.bodies) == ALL
    assert len(client.bodies) == 41


async def test_many_streams_send_no_more_than_all_may() -> None:
    clients = [Client() for _ in range(20)]
    pace = EventPace(streaming(lambda: numbers(40, 0.01)), per_second=100)
    start = time.monotonic()
    await asyncio.gather(*(pace(SCOPE, nothing, client.send) for client in clients))
    took_s = time.monotonic() - start
    for client in clients:
        assert b"".join(client.bodies) == ALL, "all of it, in order"
        assert client.messages[-1][1]["more_body"] is False
        assert all(event.endswith(b"\n\n") for event in client.bodies[:-1])
        first_s = client.messages[1][0] - start
        assert first_s < 0.15, "the first event waits for nobody"
    between = sum(len(client.bodies) - 2 for client in clients)
    assert between <= 100 * took_s + 20
    assert between >= 20, "joined, and not kept to the end"


async def test_what_was_held_back_leaves_though_nothing_follows() -> None:
    async def stalls() -> AsyncIterator[bytes]:
        for event in (b"data: a\n\n", b"data: b\n\n"):
            yield event
            await asyncio.sleep(0.01)
        yield b"data: c\n\n"
        yield b"data: d\n\n"
        await asyncio.sleep(0.5)

    client = Client()
    start = time.monotonic()
    await EventPace(streaming(stalls), per_second=10)(SCOPE, nothing, client.send)
    assert client.bodies == [b"data: a\n\n", b"data: b\n\n", b"data: c\n\ndata: d\n\n", b""]
    assert 0.08 < client.messages[3][0] - start < 0.4


@pytest.mark.parametrize("after_s", [None, 0.02])
async def test_the_first_token_waits_for_nobody_though_another_message_opens_the_chat(
    after_s: float | None,
) -> None:
    """vLLM's first event of a chat names the role alone; the token follows, at once or a little later."""

    async def chat() -> AsyncIterator[bytes]:
        yield b"data: role\n\n"
        if after_s is not None:
            await asyncio.sleep(after_s)
        yield b"data: token\n\n"
        await asyncio.sleep(0.3)

    clients = [Client() for _ in range(30)]
    pace = EventPace(streaming(chat), per_second=10)
    start = time.monotonic()
    await asyncio.gather(*(pace(SCOPE, nothing, client.send) for client in clients))
    for client in clients:
        opened = (
            [b"data: role\n\ndata: token\n\n"] if after_s is None else [b"data: role\n\n", b"data: token\n\n"]
        )
        assert client.bodies == [*opened, b""]
        assert client.messages[len(opened)][0] - start < 0.2, "streams as many as these wait 3 s for a turn"


async def test_a_client_that_cannot_be_sent_to_is_heard_of() -> None:
    async def bursts() -> AsyncIterator[bytes]:
        for event in (b"data: 0\n\n", b"data: 1\n\n"):
            yield event
            await asyncio.sleep(0.01)
        yield b"data: 2\n\n"  # held back: it is sent at its turn, beside the application
        await asyncio.sleep(0.3)
        yield b"data: 3\n\n"

    async def gone(message: Message) -> None:
        if message.get("body") == b"data: 2\n\n":
            raise ConnectionResetError("client")

    pace = EventPace(streaming(bursts), per_second=10)
    with pytest.raises(ConnectionResetError, match="client"):
        await pace(SCOPE, nothing, gone)
    assert pace.interval_s == 0


async def test_a_client_that_is_gone_from_the_start_is_heard_of() -> None:
    async def gone(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise ConnectionResetError("client")

    pace = EventPace(streaming(lambda: numbers(3, 0.02)), per_second=10)
    with pytest.raises(ConnectionResetError, match="client"):
        await pace(SCOPE, nothing, gone)
    assert pace.interval_s == 0


async def test_a_stream_that_fails_or_is_cut_off_counts_no_more() -> None:
    async def fails() -> AsyncIterator[bytes]:
        yield b"data: a\n\n"
        yield b"data: b\n\n"
        raise ValueError("engine")

    client = Client()
    pace = EventPace(streaming(fails), per_second=10)
    with pytest.raises(ValueError, match="engine"):
        await pace(SCOPE, nothing, client.send)
    cut = asyncio.create_task(
        EventPace(streaming(lambda: numbers(40, 1.0)), per_second=10)(SCOPE, nothing, client.send)
    )
    await asyncio.sleep(0.01)
    cut.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut
    assert pace.interval_s == 0
    sent = len(client.messages)
    await asyncio.sleep(0.2)
    assert len(client.messages) == sent, "nothing is sent after the end"


async def test_other_answers_pass_as_they_are() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send_json(send, 200, b"{}")

    client = Client()
    pace = EventPace(app, per_second=1)
    await pace(SCOPE, nothing, client.send)
    assert client.bodies == [b"{}"]
    assert pace.interval_s == 0
