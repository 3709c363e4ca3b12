"""What a request passes in the replica before vLLM sees it: route, key, size, precision class.

Each class is one ASGI middleware with one reason to refuse. All refusals have OpenAI's error shape.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from nestedfp.deployments.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    header,
    retry_after,
    send_error,
    without,
)
from nestedfp.vllm.control import PRECISION_ARGUMENT, STRICT_CACHE_SALT

GENERATION: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
HEALTH: Final = "/health"

# vLLM mounts administrators' routes beside the API, and its key check does not cover them.
ROUTES: Final = {
    HEALTH: "GET",
    "/version": "GET",
    "/v1/models": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    **dict.fromkeys(GENERATION, "POST"),
}

PRECISION_HEADER: Final = b"x-nestedfp-precision"
STRICT: Final = "fp16"
ANY: Final = "any"
_MARKS: Final = (PRECISION_ARGUMENT.encode(), STRICT_CACHE_SALT.encode(), rb"\u", b"\0")
WAITED: Final = "nestedfp.waited_s"
"""In the scope of a strict request that got a place: how long it waited for it."""
READ: Final = "nestedfp.read_s"
"""In the scope of a request with a body: how long it took to come."""
_SHOWN: Final = 80
"""Characters of a client's value in a refusal."""


def route(scope: Scope) -> str:
    """The path below the prefix that the application is served under."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class KnownRoutes:
    """Lets :data:`ROUTES` through and nothing else."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (method := ROUTES.get(route(scope))) is None:
            message = f"There is no {route(scope)} here; the routes are {', '.join(sorted(ROUTES))}."
            await send_error(send, 404, message, "NotFoundError")
        elif scope["method"] != method:
            message = f"{route(scope)} takes {method}, not {scope['method']}."
            allow = [(b"allow", method.encode())]
            await send_error(send, 405, message, "MethodNotAllowedError", headers=allow)
        else:
            await self._app(scope, receive, send)


class ApiKeys:
    """Demands `Authorization: Bearer KEY` on every route but the health check; without keys, nothing."""

    def __init__(self, app: App, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._digests or scope["type"] != "http" or route(scope) == HEALTH or self._accepts(scope):
            await self._app(scope, receive, send)
            return
        message = "Give a valid API key in the header 'Authorization: Bearer KEY'."
        challenge = [(b"www-authenticate", b"Bearer")]
        await send_error(send, 401, message, "AuthenticationError", headers=challenge)

    def _accepts(self, scope: Scope) -> bool:
        scheme, _, key = (header(scope["headers"], b"authorization") or b"").partition(b" ")
        given = _digest(key.strip())
        # Every key is compared, in constant time: neither the order nor the content shows in the duration.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class BodyLimit:
    """Reads the whole request body, at most `limit` bytes, before the application runs."""

    def __init__(self, app: App, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        declared = header(scope["headers"], b"content-length") or b""
        body = b""
        more = True
        begun_s = time.monotonic()
        while more and len(body) <= self._limit and not (declared.isdigit() and int(declared) > self._limit):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if more or len(body) > self._limit:
            text = f"The request body is larger than {self._limit} bytes."
            await send_error(send, 413, text, "RequestTooLargeError")
            return
        scope[READ] = time.monotonic() - begun_s
        await self._app(scope, _replay(body, receive), send)


class PrecisionClass:
    """Enforces the header `x-nestedfp-precision: fp16 | any`.

    A strict request (`fp16`) tells the engine to run each of its steps in 16 bits and to share no KV block
    with requests that may have used FP8. Since it holds the whole batch in 16 bits, at most `limit` run at
    once; one more waits, first come first served, for at most `wait_s` seconds and is then refused with 503,
    of which `refused(waited_s)` is told. A body that would break the promise, to itself or to others, is
    refused with 400. Stands behind :class:`BodyLimit`, so that the body is one message.
    """

    def __init__(
        self,
        app: App,
        *,
        limit: int,
        wait_s: float,
        retry_after_s: int,
        nested: bool,
        refused: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._app = app
        self._limit = limit
        self._places = asyncio.Semaphore(limit)
        self.wait_s = wait_s
        self._retry_after_s = retry_after_s
        self._nested = nested
        self._refused = refused
        self.running = 0
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route(scope) not in GENERATION:
            await self._app(scope, receive, send)
            return
        came_s = time.monotonic()
        wanted = (
            (header(scope["headers"], PRECISION_HEADER) or ANY.encode()).decode("latin-1").strip().lower()
        )
        body = (await receive()).get("body", b"")
        if wanted not in (STRICT, ANY):
            message = f"The header x-nestedfp-precision is {wanted!r}; give 'fp16' or 'any', or leave it out."
            await send_error(send, 400, message, "BadRequestError", param="x-nestedfp-precision")
        elif (fault := _fault(body, pinned=wanted == STRICT and self._nested)) is not None:
            field, message = fault
            await send_error(send, 400, message, "BadRequestError", param=field)
        elif wanted == ANY or not self._nested:
            await self._app(scope, _replay(body, receive), send)
        elif await self._got_place():
            scope[WAITED] = time.monotonic() - came_s
            try:
                await self._run_strict(scope, body, receive, send)
            finally:
                self._places.release()
        else:
            message = (
                f"All {self._limit} places for requests that demand FP16 were taken for {self.wait_s:g} s; "
                "try again."
            )
            later = retry_after(self._retry_after_s)
            self._refused(time.monotonic() - came_s)
            await send_error(send, 503, message, "ServiceUnavailableError", headers=later)

    async def _got_place(self) -> bool:
        """Wait for a place. A client that leaves meanwhile ends the wait: Serve cancels its request."""
        self.waiting += 1
        try:
            async with asyncio.timeout(self.wait_s if self._limit else 0.0):
                await self._places.acquire()
        except TimeoutError:
            return False
        finally:
            self.waiting -= 1
        return True

    async def _run_strict(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        pinned = pin_to_16_bits(body)
        length = (b"content-length", str(len(pinned)).encode())
        scope["headers"] = [*without(scope["headers"], b"content-length"), length]
        self.running += 1
        try:
            await self._app(scope, _replay(pinned, receive), send)
        finally:
            self.running -= 1


class QueueBound:
    """Refuses a request with 503 while the engine's queue exceeds the bound that the policy has ordered.

    `bound()` is in prompt tokens, infinite while there is none; `queued()` is what waits as far as is known,
    so a burst that comes between two reports of the engine is let in.
    """

    def __init__(
        self, app: App, *, queued: Callable[[], float], bound: Callable[[], float], retry_after_s: int
    ) -> None:
        self._app = app
        self._queued = queued
        self._bound = bound
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route(scope) in GENERATION and self._queued() > self._bound():
            message = "The queue is as long as the latency objective allows in FP8; try again."
            later = retry_after(self._retry_after_s)
            await send_error(send, 503, message, "ServiceUnavailableError", headers=later)
        else:
            await self._app(scope, receive, send)


def is_strict(scope: Scope) -> bool:
    """Whether a request that :class:`PrecisionClass` let through demands 16 bits."""
    return (header(scope["headers"], PRECISION_HEADER) or b"").strip().lower() == STRICT.encode()


def pin_to_16_bits(body: bytes) -> bytes:
    """The body with the engine's instruction added; one that is no JSON object is left for vLLM to refuse."""
    request = _json_object(body)
    if request is None:
        return body
    extra = request.get("vllm_xargs")
    request["vllm_xargs"] = {**(extra if isinstance(extra, dict) else {}), PRECISION_ARGUMENT: STRICT}
    salt = request.get("cache_salt")
    # A client's own salt keeps separating its requests.
    request["cache_salt"] = (
        f"{STRICT_CACHE_SALT}:{salt}" if isinstance(salt, str) and salt else STRICT_CACHE_SALT
    )
    return json.dumps(request).encode()


def _fault(body: bytes, *, pinned: bool) -> tuple[str, str] | None:
    """The field for which this body is refused, and the message; `pinned`: the engine will get a pin."""
    # Escapes or UTF-16 may spell the names; where there are neither, most bodies need not be parsed.
    named = any(mark in body for mark in _MARKS)
    request = _json_object(body) if named or pinned else None
    if request is None:
        return None
    extra, salt, beams = (request.get(name) for name in ("vllm_xargs", "cache_salt", "use_beam_search"))
    if isinstance(extra, dict) and PRECISION_ARGUMENT in extra:
        text = f"The header x-nestedfp-precision sets {PRECISION_ARGUMENT}; leave it out of vllm_xargs."
        return "vllm_xargs", text
    # Secret salts would differ from replica to replica, and from one start to the next.
    if isinstance(salt, str) and salt.startswith(STRICT_CACHE_SALT):
        taken = f"what begins with {STRICT_CACHE_SALT!r} is for requests that demand FP16"
        return "cache_salt", f"cache_salt is {salt[:_SHOWN]!r}, but {taken}; choose another."
    # vLLM makes the parameters of each beam anew, without the pin.
    if pinned and beams not in (None, False):
        shown = json.dumps(beams)[:_SHOWN]
        text = f"use_beam_search is {shown}; leave it out, or the header x-nestedfp-precision: fp16."
        return "use_beam_search", text
    return None


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replay(body: bytes, receive: Receive) -> Callable[[], Any]:
    """A `receive` that gives the body as one message and then what the client still sends: its disconnect."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
