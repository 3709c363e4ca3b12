"""The replica's door: what passes, what is refused, and how."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nestedfp.deployments.admission import (
    READ,
    ROUTES,
    ApiKeys,
    BodyLimit,
    KnownRoutes,
    PrecisionClass,
    pin_to_16_bits,
)
from nestedfp.deployments.asgi import App, Headers, Receive, Scope, Send, send_json
from nestedfp.deployments.door import api_keys
from nestedfp.policies.checks import InvalidField
from nestedfp.vllm.control import PRECISION_ARGUMENT, STRICT_CACHE_SALT

from .asgi_client import Answer, ask

CHAT = "/v1/chat/completions"


class Recorder:
    """The application behind the door: keeps the body it was given and answers 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive()).get("body", b""))
        await send_json(send, 200, b"{}")


def error_of(answer: Answer) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    error: dict[str, Any] = json.loads(answer.body)["error"]
    assert error["code"] == answer.status
    assert error["message"]
    assert error["type"]
    return error


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/docs", "/invocations", "/v1/load_lora_adapter", "/sleep", "/v1", "//v1/models", "/"],
)
async def test_routes_off_the_list_do_not_exist(path: str) -> None:
    inner = Recorder()
    answer = await ask(KnownRoutes(inner), "POST", path)
    assert answer.status == 404
    error_of(answer)
    assert inner.scopes == []


@pytest.mark.parametrize(("path", "method"), ROUTES.items())
async def test_listed_routes_take_their_method_only(path: str, method: str) -> None:
    assert (await ask(KnownRoutes(Recorder()), method, path)).status == 200
    wrong = await ask(KnownRoutes(Recorder()), "DELETE", path)
    assert wrong.status == 405
    assert wrong.headers["allow"] == method
    error_of(wrong)


async def test_a_route_prefix_is_not_part_of_the_route() -> None:
    inner = Recorder()

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await KnownRoutes(inner)({**scope, "root_path": "/llm"}, receive, send)

    assert (await ask(mounted, "GET", "/llm/v1/models")).status == 200
    assert (await ask(mounted, "GET", "/llm/metrics")).status == 404


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"Bearer one", 200),
        (b"bearer two", 200),
        (b"Bearer  one ", 200),
        (b"Bearer three", 401),
        (b"Bearer ", 401),
        (b"Basic one", 401),
        (b"one", 401),
        (None, 401),
    ],
)
async def test_api_keys(value: bytes | None, status: int) -> None:
    headers = [] if value is None else [(b"authorization", value)]
    answer = await ask(ApiKeys(Recorder(), ["one", "two"]), "GET", "/v1/models", headers=headers)
    assert answer.status == status
    if status == 401:
        error_of(answer)
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_without_keys_or_for_health_none_is_asked() -> None:
    assert (await ask(ApiKeys(Recorder(), []), "GET", "/v1/models")).status == 200
    assert (await ask(ApiKeys(Recorder(), ["one"]), "GET", "/health")).status == 200


@pytest.mark.parametrize(
    ("text", "keys"), [(None, []), ("", []), ("one", ["one"]), (" one, two ,", ["one", "two"])]
)
def test_keys_come_from_the_environment(
    text: str | None, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEYS", raising=False)
    if text is not None:
        monkeypatch.setenv("KEYS", text)
    assert api_keys("KEYS") == keys


def test_a_variable_without_a_key_in_it_does_not_open_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", " ,")
    with pytest.raises(InvalidField, match="KEYS"):
        api_keys("KEYS")


@pytest.mark.parametrize(
    ("chunks", "declared", "status"),
    [
        ((b"x" * 10,), None, 200),
        ((b"x" * 5, b"x" * 5), None, 200),
        ((b"x" * 11,), None, 413),
        ((b"x" * 6, b"x" * 6), None, 413),
        ((b"",), b"11", 413),
        ((b"x" * 10,), b"10", 200),
        ((b"x",), b"nonsense", 200),
    ],
)
async def test_body_limit(chunks: tuple[bytes, ...], declared: bytes | None, status: int) -> None:
    inner = Recorder()
    headers = [] if declared is None else [(b"content-length", declared)]
    answer = await ask(BodyLimit(inner, 10), "POST", CHAT, headers=headers, body=chunks)
    assert answer.status == status
    if status == 200:
        assert inner.bodies == [b"".join(chunks)]
    else:
        error_of(answer)
        assert inner.bodies == []


async def test_a_client_that_leaves_while_it_sends_gets_nothing_and_starts_nothing() -> None:
    inner = Recorder()
    sent: list[object] = []
    incoming = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return incoming.pop(0)

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await BodyLimit(inner, 10)(scope, receive, send)
    assert (inner.bodies, sent) == ([], [])


async def test_the_application_still_sees_the_disconnect_after_the_body() -> None:
    seen: list[str] = []

    async def inner(_scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"] for _ in range(2)])
        await send_json(send, 200, b"{}")

    await ask(BodyLimit(inner, 10), "POST", CHAT, body=(b"a", b"b"))
    assert seen == ["http.request", "http.disconnect"]


async def test_how_long_a_body_took_to_come_is_told() -> None:
    seen: list[float] = []
    incoming = [(0.0, b"{", True), (0.1, b"}", False)]

    async def inner(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(scope[READ])

    async def receive() -> dict[str, Any]:
        wait_s, body, more = incoming.pop(0)
        await asyncio.sleep(wait_s)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(_message: object) -> None: ...

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await BodyLimit(inner, 10)(scope, receive, send)
    assert seen == pytest.approx([0.1], abs=0.09)


def door(inner: App, limit: int = 1, *, nested: bool = True, wait_s: float = 0.0) -> PrecisionClass:
    return PrecisionClass(inner, limit=limit, wait_s=wait_s, retry_after_s=3, nested=nested)


STRICT = [(b"x-nestedfp-precision", b"FP16"), (b"content-length", b"2")]


async def test_a_strict_request_carries_the_instruction_to_the_engine() -> None:
    inner = Recorder()
    body = b'{"prompt": "a", "vllm_xargs": {"other": 1}}'
    assert (await ask(door(inner), "POST", CHAT, headers=STRICT, body=(body,))).status == 200
    sent = json.loads(inner.bodies[0])
    assert sent == {
        "prompt": "a",
        "vllm_xargs": {"other": 1, PRECISION_ARGUMENT: "fp16"},
        "cache_salt": STRICT_CACHE_SALT,
    }
    lengths = [value for key, value in inner.scopes[0]["headers"] if key == b"content-length"]
    assert lengths == [str(len(inner.bodies[0])).encode()]


async def test_other_requests_pass_byte_for_byte() -> None:
    body = b'{"prompt":   "nestedfp_precision"}'
    for headers in ([], [(b"x-nestedfp-precision", b"any")]):
        inner = Recorder()
        assert (await ask(door(inner), "POST", CHAT, headers=headers, body=(body,))).status == 200
        assert inner.bodies == [body]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff", b"", b"[" * 100_000])
async def test_a_strict_body_that_is_no_object_is_left_to_vllm(body: bytes) -> None:
    assert pin_to_16_bits(body) == body


async def test_a_clients_own_salt_still_separates() -> None:
    salts = {json.loads(pin_to_16_bits(json.dumps({"cache_salt": s}).encode()))["cache_salt"] for s in "ab"}
    assert len(salts) == 2
    assert STRICT_CACHE_SALT not in salts


async def test_unknown_class_and_pins_past_the_header_are_refused() -> None:
    unknown = await ask(door(Recorder()), "POST", CHAT, headers=[(b"x-nestedfp-precision", b"fp32")])
    assert unknown.status == 400
    assert error_of(unknown)["param"] == "x-nestedfp-precision"
    body = json.dumps({"vllm_xargs": {PRECISION_ARGUMENT: "fp16"}}).encode()
    for spelled in (body, body.replace(b"_precision", rb"\u005fprecision"), body.decode().encode("utf-16")):
        past = await ask(door(Recorder()), "POST", CHAT, body=(spelled,))
        assert past.status == 400
        assert error_of(past)["param"] == "vllm_xargs"


@pytest.mark.parametrize("salt", [STRICT_CACHE_SALT, f"{STRICT_CACHE_SALT}:mine", f"{STRICT_CACHE_SALT}2"])
@pytest.mark.parametrize("headers", [[], STRICT])
async def test_nobody_names_the_cache_of_strict_requests(salt: str, headers: Headers) -> None:
    """Whoever did could fill it with blocks that were computed in FP8."""
    body = json.dumps({"cache_salt": salt})
    for spelled in (body.encode(), body.replace("-", r"\u002d").encode(), body.encode("utf-16")):
        inner = Recorder()
        refused = await ask(door(inner), "POST", CHAT, headers=headers, body=(spelled,))
        assert (refused.status, inner.bodies) == (400, [])
        error = error_of(refused)
        assert error["param"] == "cache_salt"
        assert salt in error["message"]
        assert "choose another" in error["message"]


async def test_other_salts_are_the_clients_own() -> None:
    for salt in ("mine", f"my-{STRICT_CACHE_SALT}", None, 7):
        body = json.dumps({"cache_salt": salt}).encode()
        assert (await ask(door(Recorder()), "POST", CHAT, body=(body,))).status == 200


@pytest.mark.parametrize("value", [True, 1, "true", "yes"])
async def test_a_strict_request_may_not_search_beams_which_would_lose_the_pin(value: object) -> None:
    body = json.dumps({"use_beam_search": value, "n": 2}).encode()
    inner = Recorder()
    refused = await ask(door(inner), "POST", CHAT, headers=STRICT, body=(body,))
    assert (refused.status, inner.bodies) == (400, [])
    error = error_of(refused)
    assert error["param"] == "use_beam_search"
    assert json.dumps(value) in error["message"]
    assert "leave it out" in error["message"]


async def test_beams_are_for_all_others_and_for_plain_vllm() -> None:
    beams = b'{"use_beam_search": true}'
    assert (await ask(door(Recorder()), "POST", CHAT, body=(beams,))).status == 200
    assert (
        await ask(door(Recorder(), nested=False), "POST", CHAT, headers=STRICT, body=(beams,))
    ).status == 200
    for body in (b'{"use_beam_search": false}', b'{"use_beam_search": null}'):
        assert (await ask(door(Recorder()), "POST", CHAT, headers=STRICT, body=(body,))).status == 200


async def test_strict_places_are_bounded_and_given_back() -> None:
    release = asyncio.Event()

    async def slow(_scope: Scope, _receive: Receive, send: Send) -> None:
        await release.wait()
        await send_json(send, 200, b"{}")

    entry = door(slow)
    first = asyncio.create_task(ask(entry, "POST", CHAT, headers=STRICT, body=(b"{}",)))
    await asyncio.sleep(0)
    while entry.running == 0:
        await asyncio.sleep(0.001)
    refused = await ask(entry, "POST", CHAT, headers=STRICT, body=(b"{}",))
    assert refused.status == 503
    assert refused.headers["retry-after"] == "3"
    error_of(refused)
    release.set()
    assert (await first).status == 200
    assert entry.running == 0
    assert (await ask(entry, "POST", CHAT, headers=STRICT, body=(b"{}",))).status == 200


class Slow:
    """An application that holds every request until it is released."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await self.release.wait()
        await send_json(send, 200, b"{}")


def strict_request(entry: PrecisionClass) -> asyncio.Task[Answer]:
    return asyncio.create_task(ask(entry, "POST", CHAT, headers=STRICT, body=(b"{}",)))


async def until(entry: PrecisionClass, *, running: int, waiting: int) -> None:
    async with asyncio.timeout(5.0):
        while (entry.running, entry.waiting) != (running, waiting):
            await asyncio.sleep(0.001)


async def test_a_strict_request_waits_for_a_place_and_is_then_served() -> None:
    inner = Slow()
    entry = door(inner, wait_s=60.0)
    requests = [strict_request(entry) for _ in range(3)]
    await until(entry, running=1, waiting=2)
    inner.release.set()
    assert [answer.status for answer in await asyncio.gather(*requests)] == [200, 200, 200]
    assert (entry.running, entry.waiting) == (0, 0)


async def test_the_wait_is_bounded_and_ends_with_retry_after() -> None:
    inner = Slow()
    told: list[float] = []
    entry = PrecisionClass(inner, limit=1, wait_s=0.05, retry_after_s=3, nested=True, refused=told.append)
    first, second = strict_request(entry), strict_request(entry)
    refused = await second
    assert refused.status == 503
    assert [waited_s > 0.04 for waited_s in told] == [True]
    assert refused.headers["retry-after"] == "3"
    assert "0.05 s" in error_of(refused)["message"]
    inner.release.set()
    assert (await first).status == 200


async def test_who_leaves_while_waiting_takes_no_place() -> None:
    inner = Slow()
    entry = door(inner, wait_s=60.0)
    first, second, third = strict_request(entry), strict_request(entry), strict_request(entry)
    await until(entry, running=1, waiting=2)
    second.cancel()
    await until(entry, running=1, waiting=1)
    inner.release.set()
    assert ((await first).status, (await third).status) == (200, 200)
    assert (await strict_request(entry)).status == 200


async def test_a_place_is_given_back_after_a_failure() -> None:
    async def failing(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("engine")

    entry = door(failing)
    with pytest.raises(RuntimeError, match="engine"):
        await ask(entry, "POST", CHAT, headers=STRICT, body=(b"{}",))
    assert entry.running == 0


async def test_plain_vllm_is_always_in_16_bits() -> None:
    inner = Recorder()
    answer = await ask(door(inner, 0, nested=False), "POST", CHAT, headers=STRICT, body=(b"{}",))
    assert (answer.status, inner.bodies) == (200, [b"{}"])
