"""What every request passes in the HTTP proxy, before and after Serve itself.

Serve answers some requests without a replica: no such route, queues full, a replica died, timed out. It does
so in plain text. This middleware puts these answers into OpenAI's shape, takes away the request headers with
which a client could change Serve's own behaviour, and stamps each request with its arrival. Ray loads
:func:`middlewares` into each proxy that has `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` set to
:data:`CALLBACK`.
"""

from __future__ import annotations

import logging
from typing import Final

from starlette.middleware import Middleware

from nestedfp.deployments.arrival import RECEIVED_HEADER, Stamp
from nestedfp.deployments.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    header,
    is_json,
    retry_after,
    send_error,
    without,
)

CALLBACK: Final = "nestedfp.deployments.front_door:middlewares"
CALLBACK_VARIABLE: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

# A client may neither set its own time limit nor keep its request running after it has gone.
SERVE_HEADERS: Final = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")

_KINDS: Final = {
    404: "NotFoundError",
    408: "TimeoutError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
_RETRY_AFTER_S: Final = 1
_LONGEST_TEXT: Final = 2000

logger = logging.getLogger(__name__)


class FrontDoor:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._stamp = Stamp()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = without(scope["headers"], *SERVE_HEADERS, RECEIVED_HEADER)
        scope["headers"] = [*given, self._stamp.now()]
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            if answer.started:
                raise
            logger.exception("no replica answered %s %s", scope["method"], scope["path"])
            await send_error(
                send,
                503,
                "The replica that served this request is gone; try again.",
                _KINDS[503],
                headers=retry_after(_RETRY_AFTER_S),
            )


class _Answer:
    """Passes a response through, except a textual error, which it collects and rewrites."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._text = b""
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and not is_json(message.get("headers", [])):
                self._held = message
                return
            self.started = True
        elif self._held is not None and message["type"] == "http.response.body":
            self._text += message.get("body", b"")[: _LONGEST_TEXT - len(self._text)]
            if not message.get("more_body", False):
                await self._rewrite(self._held)
            return
        await self._send(message)

    async def _rewrite(self, start: Message) -> None:
        self.started = True
        status = start["status"]
        headers = without(start.get("headers", []), b"content-type", b"content-length")
        if status in (429, 503) and header(headers, b"retry-after") is None:
            headers += retry_after(_RETRY_AFTER_S)
        text = self._text.decode("utf-8", "replace") or f"HTTP status {status}"
        await send_error(self._send, status, text, _KINDS.get(status, "InternalServerError"), headers=headers)


def middlewares() -> list[Middleware]:
    """Entry point for Ray's proxies."""
    return [Middleware(FrontDoor)]
