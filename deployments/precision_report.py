"""Says in each response which precision served it.

- header `x-nestedfp-precision-at-start`: the precision in force when the headers left. A flip may follow.
- header `x-nestedfp-replica`: the replica's id.
- `usage.nestedfp` = {"fp16": n, "fp8": m}: the request's tokens (prompt computed and output) by the precision
  of the step that executed them; in a JSON answer, and in a stream's last chunk where the client asks for
  usage.

A stream passes message by message. vLLM sends whole events, so only the event with the final usage is
touched.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from nestedfp.deployments.admission import GENERATION, WAITED, is_strict, route
from nestedfp.deployments.arrival import DELAYED
from nestedfp.deployments.asgi import App, Headers, Message, Receive, Scope, Send, header, is_json, without

AT_START_HEADER: Final = b"x-nestedfp-precision-at-start"
REPLICA_HEADER: Final = b"x-nestedfp-replica"
_ID_HEADER: Final = b"x-request-id"
_UNFINISHED: Final = 499

# Inside a JSON string the quotes would be escaped, so generated text cannot contain this.
_USAGE_MARK: Final = b'"usage":{'
_FIRST_ID: Final = re.compile(rb'data: \{"id":"([^"\\]+)"')
_EVENT_END: Final = b"\n\n"
_DATA: Final = b"data: "


class Served(Protocol):
    """Hears of each request that left: its class, the HTTP status, its tokens by precision, how long it
    waited at the door for a place of its class, and how long it took from the proxy to the engine, if known.

    The status is 499 where the answer was not sent to its end: the client left, or time ran out.
    """

    def __call__(
        self,
        *,
        strict: bool,
        status: int,
        tokens: Mapping[str, int] | None,
        waited_s: float,
        delay_s: float | None = None,
    ) -> None: ...


class PrecisionReport:
    """ASGI middleware around vLLM's application.

    `precision()` is the precision in force now; `tokens(request_id)` gives a finished request's tokens by
    precision, None where they are not known, and does not raise; `arrived()` and `served(...)` are told of
    each request.
    """

    def __init__(
        self,
        app: App,
        *,
        replica: str,
        precision: Callable[[], str],
        tokens: Callable[[str], Awaitable[Mapping[str, int] | None]],
        arrived: Callable[[], None],
        served: Served,
    ) -> None:
        self._app = app
        self._replica = replica.encode()
        self._precision = precision
        self._tokens = tokens
        self._arrived = arrived
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route(scope) not in GENERATION:
            await self._app(scope, receive, send)
            return
        self._arrived()
        scope["headers"] = _with_own_id(scope["headers"])
        strict = is_strict(scope)

        def headers() -> Headers:
            precision = "fp16" if strict else self._precision()
            return [(AT_START_HEADER, precision.encode()), (REPLICA_HEADER, self._replica)]

        response = _Response(send, headers, self._tokens)
        try:
            await self._app(scope, receive, response.send)
        finally:
            self._served(
                strict=strict,
                status=response.status,
                tokens=response.tokens,
                waited_s=scope.get(WAITED, 0.0),
                delay_s=scope.get(DELAYED),
            )


class _Response:
    """One response on its way out. `status` is 499 until all of it has been sent."""

    def __init__(
        self,
        send: Send,
        headers: Callable[[], Headers],
        tokens: Callable[[str], Awaitable[Mapping[str, int] | None]],
    ) -> None:
        self._client = send
        self._headers = headers
        self._ask = tokens
        self._held: Message | None = None
        self._body = b""
        self._streams = False
        self._stream_id: str | None = None
        self._started = _UNFINISHED
        self.status = _UNFINISHED
        self.tokens: Mapping[str, int] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._held is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish_json(self._held)
        elif self._streams and _USAGE_MARK in message.get("body", b""):
            await self._send({**message, "body": await self._annotate_events(message["body"])})
        else:
            await self._send(message)
        if self._streams and message["type"] == "http.response.body":
            await self._follow_stream(message)

    async def _follow_stream(self, message: Message) -> None:
        """Ask for the tokens of a stream whose client did not: they are counted all the same."""
        if self._stream_id is None and (found := _FIRST_ID.match(message.get("body", b""))):
            self._stream_id = found[1].decode()
        over = not message.get("more_body", False)
        if over and self.tokens is None and self._stream_id is not None:
            self.tokens = await self._ask(self._stream_id)

    async def _send(self, message: Message) -> None:
        """Everything goes through here: headers are added as they leave, and the end is noted."""
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *self._headers()]}
        await self._client(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.status = self._started

    async def _start(self, message: Message) -> None:
        self._started = message["status"]
        headers = message.get("headers", [])
        if self._started == 200 and is_json(headers):
            # The length is not known before the usage is; the body follows at once.
            self._held = message
            return
        self._streams = (header(headers, b"content-type") or b"").startswith(b"text/event-stream")
        await self._send(message)

    async def _finish_json(self, start: Message) -> None:
        body = self._body
        answer = json.loads(body)
        if await self._annotate(answer):
            body = _dump(answer)
        length = (b"content-length", str(len(body)).encode())
        headers = [*without(start.get("headers", []), b"content-length"), length]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _annotate_events(self, body: bytes) -> bytes:
        return _EVENT_END.join([await self._annotate_event(event) for event in body.split(_EVENT_END)])

    async def _annotate_event(self, event: bytes) -> bytes:
        if _USAGE_MARK not in event or not event.startswith(_DATA):
            return event
        chunk = json.loads(event.removeprefix(_DATA))
        # With usage in every chunk, only the one without choices is final.
        if chunk.get("choices") or not await self._annotate(chunk):
            return event
        return _DATA + _dump(chunk)

    async def _annotate(self, answer: dict[str, Any]) -> bool:
        usage, request_id = answer.get("usage"), answer.get("id")
        if not isinstance(usage, dict) or not isinstance(request_id, str):
            return False
        self.tokens = await self._ask(request_id)
        if self.tokens is None:
            return False
        usage["nestedfp"] = dict(self.tokens)
        return True


def _with_own_id(headers: Headers) -> Headers:
    """The headers with a request id that no other request has.

    vLLM names a request after this header, and clients send one id with all calls of one trace: the tokens of
    those that run at once would be added up.
    """
    given = header(headers, _ID_HEADER)
    if given is None:
        return headers
    return [*without(headers, _ID_HEADER), (_ID_HEADER, given + b"-" + uuid.uuid4().hex[:12].encode())]


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
