"""One streamed request to an OpenAI-compatible endpoint, timed.

httpx hands over each block as the socket delivers it, also under gevent, which is what makes TTFT and ITL
right; a client that waits for full buffers reports the time of the buffer instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from nestedfp.loadtests.prompts import prompt_text
from nestedfp.loadtests.settings import ReplaySettings
from nestedfp.loadtests.stream import TokenStream, error_text
from nestedfp.loadtests.traces import TraceRequest

_MAX_ERROR_BYTES = 65_536


@dataclass
class Exchange:
    """One request's way through the client, filled as it goes: what is known when it is cut short stays.

    ``error`` is None only once the answer is complete.
    """

    stream: TokenStream
    status: int | None = None
    error: str | None = "the client did not finish this request"
    precision_at_start: str | None = None
    replica: str | None = None


def new_client(settings: ReplaySettings) -> httpx.Client:
    """A client without proxies and with a connection for each request.

    No connection is kept: a service that balances connections then spreads the requests, and none is lost on
    a connection that the server was just closing.
    """
    headers = {"accept-encoding": "identity"}
    if settings.api_key:
        headers["authorization"] = f"Bearer {settings.api_key}"
    return httpx.Client(
        base_url=settings.base_url,
        headers=headers,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        timeout=httpx.Timeout(settings.request_timeout_s, connect=settings.connect_timeout_s),
        trust_env=False,
    )


def body(settings: ReplaySettings, request: TraceRequest) -> dict[str, Any]:
    """The JSON body of a request: greedy, of the traced output length (``ignore_eos``), usage at the end."""
    text = prompt_text(request.prompt_tokens, settings.seed, request.index)
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": text}]} if settings.endpoint == "chat" else {"prompt": text}
    )
    return {
        "model": settings.model,
        **prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if settings.ignore_eos else {}),
    }


def exchange(
    client: httpx.Client,
    settings: ReplaySettings,
    request: TraceRequest,
    into: Exchange,
    on_headers: Callable[[Exchange], None],
) -> None:
    """Send the request and stream its answer into ``into``; token times are on ``time.monotonic``.

    Failures of transport and server end up in ``into.error``; nothing else is caught.
    """
    try:
        with client.stream(
            "POST",
            settings.path,
            json=body(settings, request),
            headers={"x-nestedfp-precision": request.precision_class},
        ) as response:
            into.status = response.status_code
            into.precision_at_start = response.headers.get("x-nestedfp-precision-at-start")
            into.replica = response.headers.get("x-nestedfp-replica")
            on_headers(into)
            if response.status_code != httpx.codes.OK:
                into.error = _refusal(response)
                return
            for block in response.iter_raw():
                into.stream.feed(block, time.monotonic())
            into.error = into.stream.problem
    except (httpx.HTTPError, httpx.StreamError) as error:
        into.error = into.stream.error or f"{type(error).__name__}: {error}"


def check_endpoint(client: httpx.Client, settings: ReplaySettings) -> str | None:
    """What speaks against starting: no answer at the URL, or a model that is not served; None if nothing."""
    try:
        response = client.get("/v1/models", timeout=settings.connect_timeout_s)
    except httpx.HTTPError as error:
        return f"no answer from {settings.base_url}: {error}; start the server or correct --url"
    if response.status_code == httpx.codes.NOT_FOUND:
        return None
    if response.status_code != httpx.codes.OK:
        return f"{settings.base_url}/v1/models answered {response.status_code}: {response.text[:200]}"
    try:
        models = [entry["id"] for entry in response.json()["data"]]
    except (ValueError, LookupError, TypeError):
        return f"{settings.base_url}/v1/models is not an OpenAI model list: {response.text[:200]!r}"
    if settings.model not in models:
        return f"model {settings.model!r} is not served at {settings.base_url}; served: {', '.join(models)}"
    return None


def _refusal(response: httpx.Response) -> str:
    text = b""
    for block in response.iter_raw():
        text += block
        if len(text) > _MAX_ERROR_BYTES:
            break
    try:
        problem: object = json.loads(text)
    except ValueError:
        return str(text[:500], "utf-8", "replace") or f"HTTP {response.status_code}, empty body"
    return error_text(problem)
