"""Bounds how many messages the streams of a replica send a second.

Each message of a stream takes Ray Serve's replica and its proxy half a millisecond, in the one loop that also
takes requests in. An engine that serves 200 streams at 13 ms a token would fill both with events, and new
prompts would wait behind them for a second. So a stream that has just sent waits a little for the next time:
longer the more streams are open. What it has to say meanwhile is joined, and nothing of it changes.
"""

from __future__ import annotations

import asyncio

from nestedfp.deployments.asgi import App, Message, Receive, Scope, Send, header


class EventPace:
    """ASGI middleware: the event streams of `app` send some `per_second` messages a second, all together.

    Beside them a stream's first two messages leave at once: the one that opens a chat holds no token, and
    joins the next if that follows without delay. So does its end, with all that was held back before it. What
    a stream has said leaves when its turn comes, though it says nothing more.
    """

    def __init__(self, app: App, per_second: int) -> None:
        self._app = app
        self._per_second = per_second
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stream = _Stream(self, send)
        try:
            await self._app(scope, receive, stream.send)
        finally:
            stream.close()

    @property
    def interval_s(self) -> float:
        """What lies between two messages of a stream at least."""
        return self._open / self._per_second

    def opened(self) -> None:
        self._open += 1

    def closed(self) -> None:
        self._open -= 1


class _Stream:
    """One response; held back is what follows an event too soon."""

    def __init__(self, pace: EventPace, send: Send) -> None:
        self._pace = pace
        self._client = send
        self._streams = False
        self._held = b""
        self._left = 0
        self._due_s = 0.0
        self._turn: asyncio.Task[None] | None = None
        # The turn and the application may both send, and what was said first leaves first.
        self._sending = asyncio.Lock()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = header(message.get("headers", []), b"content-type") or b""
            if kind.startswith(b"text/event-stream"):
                self._streams = True
                self._pace.opened()
        if not self._streams or message["type"] != "http.response.body":
            await self._client(message)
            return
        if self._turn is not None and self._turn.done():
            turn, self._turn = self._turn, None
            turn.result()  # where the client could not be sent to, the application hears of it now
        self._held += message.get("body", b"")
        if not message.get("more_body", False):
            await self._release(more_body=False)
        elif self._left and asyncio.get_running_loop().time() >= self._due_s:
            await self._release(more_body=True)
        elif self._turn is None:
            self._turn = asyncio.create_task(self._await_turn())

    def close(self) -> None:
        """The application is through with it, in whatever way."""
        if self._turn is not None and not self._turn.cancel() and not self._turn.cancelled():
            self._turn.exception()  # nobody is left to be told
        if self._streams:
            self._streams = False
            self._pace.closed()

    async def _await_turn(self) -> None:
        while self._held:
            wait_s = self._due_s - asyncio.get_running_loop().time()
            if wait_s > 0.0:
                await asyncio.sleep(wait_s)  # the application may have sent meanwhile, and so moved the turn
            else:
                await self._release(more_body=True)

    async def _release(self, *, more_body: bool) -> None:
        async with self._sending:
            body, self._held = self._held, b""
            if body or not more_body:
                self._left += 1
                if self._left > 1:
                    self._due_s = asyncio.get_running_loop().time() + self._pace.interval_s
                await self._client({"type": "http.response.body", "body": body, "more_body": more_body})
