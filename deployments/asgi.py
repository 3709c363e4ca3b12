"""ASGI in types, and the helpers that the middlewares share."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; `name` in lower case."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return None


def without(headers: Iterable[tuple[bytes, bytes]], *names: bytes) -> Headers:
    """The headers except those named (lower case)."""
    return [(key, value) for key, value in headers if key.lower() not in names]


def is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return (header(headers, b"content-type") or b"").startswith(b"application/json")


def error_body(status: int, message: str, kind: str, *, param: str | None = None) -> bytes:
    """An error in OpenAI's shape, as vLLM writes it: `code` repeats the HTTP status."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


async def send_error(
    send: Send,
    status: int,
    message: str,
    kind: str,
    *,
    param: str | None = None,
    headers: Headers | None = None,
) -> None:
    """Answer with an error in OpenAI's shape."""
    await send_json(send, status, error_body(status, message, kind, param=param), headers)


async def send_json(send: Send, status: int, body: bytes, headers: Headers | None = None) -> None:
    """Answer with a complete JSON body."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": own + (headers or [])})
    await send({"type": "http.response.body", "body": body})


def retry_after(seconds: int) -> Headers:
    return [(b"retry-after", str(seconds).encode())]
