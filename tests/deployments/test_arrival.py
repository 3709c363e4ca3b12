"""When a request reached the proxy: stamped there, read at the engine."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.deployments.admission import READ, WAITED
from nestedfp.deployments.arrival import DELAYED, RECEIVED_HEADER, Arrival, Delays, arrived_at
from nestedfp.deployments.asgi import header
from nestedfp.deployments.front_door import FrontDoor
from nestedfp.deployments.vllm_openai import start_engine

CHAT = "/v1/chat/completions"
ways = st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 0.45)), min_size=1, max_size=60)


def scope(*headers: tuple[bytes, bytes], path: str = CHAT) -> dict[str, Any]:
    return {"type": "http", "path": path, "headers": list(headers)}


async def receive() -> dict[str, Any]:
    return {}


async def send(message: Any) -> None:
    pass


def stamped(value: bytes, **noted: float) -> dict[str, Any]:
    return {**scope((RECEIVED_HEADER, value)), **noted}


def passed(*requests: tuple[float, dict[str, Any]]) -> tuple[list[float | None], list[float | None]]:
    """What the application learned of each request, which comes to it at a time, and the delays noted."""
    learned: list[float | None] = []
    times = iter([now_s for now_s, _ in requests])

    async def app(*_: Any) -> None:
        learned.append(arrived_at())

    arrival = Arrival(app, wall=lambda: next(times))
    for _, request in requests:
        asyncio.run(arrival(request, receive, send))
        assert arrived_at() is None
    return learned, [request.get(DELAYED) for _, request in requests]


@given(ways, st.floats(-1e4, 1e4))
def test_a_delay_is_that_beyond_the_shortest_way_whatever_the_clocks(
    seen: list[tuple[float, float]], skew_s: float
) -> None:
    delays, now_s, shortest_s, begun_s = Delays(), 1e6, 1e9, None
    for gap_s, way_s in seen:
        now_s += gap_s
        begun_s = begun_s or now_s
        shortest_s = min(shortest_s, way_s)
        delay_s = delays.of(now_s - way_s + skew_s, now_s)
        # What counts as none grows by a thousandth of the time, as clocks may drift.
        assert way_s - shortest_s - 1e-3 * (now_s - begun_s) - 1e-6 <= delay_s <= way_s - shortest_s + 1e-6


def test_an_overload_of_a_minute_is_seen_to_its_end() -> None:
    delays = Delays()
    assert delays.of(0.0, 0.01) == 0.0
    for second in range(1, 60):
        assert delays.of(float(second), second + 0.41) == pytest.approx(0.4, abs=0.061)
    assert delays.of(60.0, 60.01) == pytest.approx(0.0, abs=1e-6)


def test_a_clock_that_was_set_misleads_for_a_while_only() -> None:
    delays = Delays()
    delays.of(100.0, 100.0)
    assert delays.of(97.0, 102.0) == pytest.approx(5.0, abs=0.01)
    assert delays.of(125.0, 130.0) == 0.0
    assert delays.of(131.0, 136.3) == pytest.approx(0.3, abs=0.01)
    assert delays.of(140.0, 140.0) == 0.0


def test_each_proxy_has_its_own_clock() -> None:
    sent = ((100.0, b"0.0 a"), (100.0, b"99.0 b"), (101.5, b"1.0 a"), (101.25, b"100.0 b"))
    _, told = passed(*((now_s, stamped(value)) for now_s, value in sent))
    assert told == pytest.approx([0.0, 0.0, 0.5, 0.25], abs=0.002)


def test_the_application_learns_when_a_request_reached_the_proxy() -> None:
    learned, told = passed((10.0, stamped(b"9.9 a")), (20.5, stamped(b"20.0 a")))
    assert learned == pytest.approx([10.0, 20.1], abs=0.02)
    assert told == pytest.approx([0.0, 0.4], abs=0.02)


def test_the_wait_of_a_strict_request_for_its_place_is_not_on_its_way() -> None:
    learned, _ = passed((10.0, stamped(b"10.0 a")), (20.5, stamped(b"20.0 a", **{WAITED: 0.3})))
    assert learned[1] == pytest.approx(20.3, abs=0.02)


def test_a_slow_upload_is_the_clients_and_a_quick_one_on_the_way() -> None:
    slow, quick = stamped(b"100.0 a", **{READ: 3.0}), stamped(b"103.0 a", **{READ: 0.4})
    _, told = passed((100.0, stamped(b"100.0 a")), (103.1, slow), (103.5, quick))
    assert told == pytest.approx([0.0, 0.1, 0.5], abs=0.01)


@pytest.mark.parametrize("value", [b"", b"soon a", b"nan a", b"inf a", b"12.0", b"12.0 "])
def test_what_no_proxy_has_written_is_no_stamp(value: bytes) -> None:
    assert passed((100.0, stamped(value))) == ([None], [None])


def test_without_a_stamp_and_on_other_routes_the_engine_counts_for_itself() -> None:
    assert passed((100.0, scope())) == ([None], [None])
    assert passed((100.0, scope((RECEIVED_HEADER, b"99.0 a"), path="/v1/models"))) == ([None], [None])


def test_a_way_of_minutes_is_a_clock_that_was_set() -> None:
    learned, _ = passed((100.0, stamped(b"100.0 a")), (100.0, stamped(b"39.0 a")))
    assert learned == [100.0, None]


def test_the_proxy_stamps_and_takes_a_clients_stamp_away() -> None:
    seen: list[Any] = []

    async def app(scope: Any, *_: Any) -> None:
        seen.append(scope["headers"])

    door = FrontDoor(app)
    for _ in range(2):
        asyncio.run(door(scope((RECEIVED_HEADER, b"1.0 mine")), receive, send))
    stamps = [[value for name, value in headers if name == RECEIVED_HEADER] for headers in seen]
    assert [len(found) for found in stamps] == [1, 1]
    (first, clock), (second, same) = (found[0].split() for found in stamps)
    assert 1e9 < float(first) <= float(second)
    assert clock == same != b"mine"
    assert header(seen[0], b"x-nestedfp-received") == stamps[0][0]


def test_vllm_counts_from_that_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM's class: which time reaches `add_request`, and that nothing else changes."""
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    async_llm = pytest.importorskip("vllm.v1.engine.async_llm")
    calls: list[Any] = []

    class Stub:
        @classmethod
        def from_engine_args(cls, *_: Any, **__: Any) -> Any:
            return cls()

        async def add_request(self, *given: Any, **named: Any) -> str:
            calls.append((given, named))
            return "queue"

    monkeypatch.setattr(async_llm, "AsyncLLM", Stub)
    monkeypatch.setattr(arg_utils.AsyncEngineArgs, "from_cli_args", lambda _: None)
    engine = start_engine(None, [])  # type: ignore[arg-type]

    async def app(*_: Any) -> None:
        assert await engine.add_request("id", "prompt", "params", lora_request=None, priority=3) == "queue"
        assert await engine.add_request("id", "prompt", "params", 7.0) == "queue"
        assert await engine.add_request("id-x-beam-0", "prompt", "params") == "queue"

    asyncio.run(app())
    arrival = Arrival(app, wall=lambda: 50.0)
    asyncio.run(arrival(stamped(b"49.0 a"), receive, send))
    more = {"lora_request": None, "priority": 3}
    own, proxys = ("id", "prompt", "params", None), ("id", "prompt", "params", 50.0)
    fixed = (("id", "prompt", "params", 7.0), {})
    beam = (("id-x-beam-0", "prompt", "params", None), {})
    assert calls == [(own, more), fixed, beam, (proxys, more), fixed, beam]
