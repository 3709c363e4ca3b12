"""The router's choice, without Serve around it."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import StreamingHTTPRequest

from nestedfp.deployments.router import PrecisionRouter, demands_16_bits, two_of


def proxy_request(*headers: tuple[bytes, bytes], path: str = "/v1/chat/completions") -> bytes:
    """A request as Serve's proxy hands it to a router."""
    scope = {"type": "http", "path": path, "headers": list(headers)}
    return pickle.dumps(StreamingHTTPRequest(asgi_scope=scope, proxy_actor_name="proxy"))


STRICT = proxy_request((b"x-nestedfp-precision", b"fp16"))


class Router(PrecisionRouter):
    """The router with the locality rule of a single node: all replicas are near."""

    def __init__(self, replicas: list[Any]) -> None:
        self.near = {replica.replica_id for replica in replicas}

    def apply_locality_routing(self, pending_request: object = None) -> set[str]:
        return self.near


def replica(name: str, precision: str | None) -> Any:
    stats = {} if precision is None else {"precision": precision}
    return SimpleNamespace(replica_id=name, routing_stats=stats)


async def ranks_of(replicas: list[Any], *args: object) -> list[set[str]]:
    pending: Any = SimpleNamespace(args=list(args))
    ranks = await Router(replicas).choose_replicas(replicas, pending)
    return [{chosen.replica_id for chosen in rank} for rank in ranks]


@pytest.mark.parametrize(
    ("args", "strict"),
    [
        ([STRICT], True),
        ([proxy_request((b"X-NestedFP-Precision", b" FP16 "))], False),
        ([proxy_request((b"x-nestedfp-precision", b"FP16 "))], True),
        ([proxy_request((b"x-nestedfp-precision", b"any"))], False),
        ([proxy_request(path="/x-nestedfp-precision")], False),
        ([proxy_request()], False),
        ([], False),
        (["a call through a handle"], False),
    ],
)
def test_the_class_is_read_from_the_pickled_request(args: list[object], strict: bool) -> None:
    assert demands_16_bits(args) is strict


async def test_strict_requests_prefer_replicas_in_16_bits() -> None:
    replicas = [replica("a", "fp16"), replica("b", "fp8"), replica("c", "fp16"), replica("d", None)]
    assert await ranks_of(replicas, STRICT) == [{"a", "c"}, {"b", "d"}]


async def test_strict_requests_fall_back_rather_than_wait_for_ever() -> None:
    assert await ranks_of([replica("a", "fp8")], STRICT) == [{"a"}]
    assert await ranks_of([replica("a", "fp16")], STRICT) == [{"a"}]


async def test_other_requests_may_go_anywhere() -> None:
    replicas = [replica("a", "fp16"), replica("b", "fp8"), replica("c", "fp8")]
    seen: set[str] = set()
    for _ in range(200):
        (rank,) = await ranks_of(replicas, proxy_request())
        assert len(rank) == 2
        seen |= rank
    assert seen == {"a", "b", "c"}


async def test_only_near_replicas_are_chosen() -> None:
    replicas = [replica("a", "fp16"), replica("b", "fp16")]
    router = Router(replicas)
    router.near = {"b"}
    pending: Any = SimpleNamespace(args=[STRICT])
    assert await router.choose_replicas(replicas, pending) == [[replicas[1]]]


def test_two_of_fewer() -> None:
    assert two_of([]) == []
    only: Any = replica("a", None)
    assert two_of([only]) == [only]
