"""The router's choice on Serve's own router, with neither a cluster nor replicas around it."""

from __future__ import annotations

import asyncio
import pickle
import uuid
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    StreamingHTTPRequest,
)
from ray.serve.request_router import PendingRequest

from nestedfp.deployments.router import PrecisionRouter, demands_16_bits, two_of

DEPLOYMENT = DeploymentID("d", "a")


def proxy_request(*headers: tuple[bytes, bytes], path: str = "/v1/chat/completions") -> bytes:
    """A request as Serve's proxy hands it to a router."""
    scope = {"type": "http", "path": path, "headers": list(headers)}
    return pickle.dumps(StreamingHTTPRequest(asgi_scope=scope, proxy_actor_name="proxy"))


STRICT = proxy_request((b"x-nestedfp-precision", b"fp16"))


class Replica:
    """What a router asks of a replica: where it is, its precision, and how many requests it holds."""

    max_ongoing_requests = 8
    multiplexed_model_ids: frozenset[str] = frozenset()

    def __init__(self, name: str, precision: str | None, *, node: str = "here", load: int = 0) -> None:
        self.name = name
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats = {} if precision is None else {"precision": precision}
        self.node_id = node
        self.availability_zone = f"zone of {node}"
        self.load = load
        self.asked = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        return self.load


def router_of(replicas: list[Replica]) -> PrecisionRouter:
    """Serve's router on the node `here`, which prefers its own node and zone as Serve's proxies do."""
    router = PrecisionRouter(
        self_node_id="here",
        prefer_local_node_routing=True,
        prefer_local_az_routing=True,
        self_availability_zone="zone of here",
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        initial_backoff_s=0.02,
        max_backoff_s=0.02,
    )
    known: Any = replicas
    router.update_replicas(known)
    for replica in replicas:
        router.on_new_queue_len_info(replica.replica_id, replica.load)
    return router


def pending(*args: object) -> PendingRequest:
    name = str(uuid.uuid4())
    return PendingRequest(list(args), {}, RequestMetadata(name, name))


async def ranks_of(replicas: list[Replica], *args: object) -> list[list[str]]:
    known: Any = replicas
    ranks: Any = await router_of(replicas).choose_replicas(known, pending(*args))
    return [[chosen.name for chosen in rank] for rank in ranks]


async def chosen(router: PrecisionRouter, *args: object) -> str:
    """The replica that Serve gives a request to."""
    found: Any = await asyncio.wait_for(router._choose_replica_for_request(pending(*args)), 5.0)
    name: str = found.name
    return name


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
    replicas = [Replica("a", "fp16"), Replica("b", "fp8"), Replica("c", "fp16"), Replica("d", None)]
    assert [set(rank) for rank in await ranks_of(replicas, STRICT)] == [{"a", "c"}, {"b", "d"}]


async def test_strict_requests_fall_back_rather_than_wait_for_ever() -> None:
    assert await ranks_of([Replica("a", "fp8")], STRICT) == [["a"]]
    assert await ranks_of([Replica("a", "fp16")], STRICT) == [["a"]]


async def test_other_requests_may_go_anywhere() -> None:
    replicas = [Replica("a", "fp16"), Replica("b", "fp8"), Replica("c", "fp8", node="there")]
    seen: set[str] = set()
    for _ in range(200):
        (rank,) = await ranks_of(replicas, proxy_request())
        assert len(rank) == 2
        seen |= set(rank)
    assert seen == {"a", "b", "c"}


async def test_without_a_request_two_of_all_are_chosen() -> None:
    replicas: Any = [Replica("a", "fp16"), Replica("b", "fp8", node="there")]
    (rank,) = await router_of(replicas).choose_replicas(replicas)
    assert set(rank) == set(replicas)


async def test_a_strict_request_goes_to_16_bits_on_another_node_rather_than_to_fp8_on_this_one() -> None:
    router = router_of([Replica("near", "fp8"), Replica("far", "fp16", node="there", load=5)])
    assert [await chosen(router, STRICT) for _ in range(20)] == ["far"] * 20


async def test_the_less_loaded_replica_is_taken_whichever_node_it_is_on() -> None:
    router = router_of([Replica("near", "fp16", load=3), Replica("far", "fp16", node="there", load=1)])
    for request in (proxy_request(), STRICT):
        assert [await chosen(router, request) for _ in range(20)] == ["far"] * 20


async def test_among_equals_the_nearer_replica_is_taken() -> None:
    replicas = [Replica("far", "fp16", node="there", load=1), Replica("near", "fp16", load=1)]
    for request in (proxy_request(), STRICT):
        assert [await chosen(router_of(replicas), request) for _ in range(20)] == ["near"] * 20


async def test_a_strict_request_falls_back_to_fp8_where_16_bits_refuse() -> None:
    router = router_of([Replica("full", "fp16", load=8), Replica("free", "fp8", node="there")])
    assert await chosen(router, STRICT) == "free"


@pytest.mark.parametrize("request_", [proxy_request(), STRICT], ids=["any", "strict"])
async def test_replicas_that_refuse_are_asked_again_after_a_pause(request_: bytes) -> None:
    full = [Replica("a", "fp16", load=8), Replica("b", "fp8", node="there", load=8)]
    routing = asyncio.create_task(chosen(router_of(full), request_))
    await asyncio.sleep(0.2)
    # Pauses are 0.02 s; without them there would be thousands of attempts.
    assert 2 <= full[0].asked < 50
    full[0].load = 7
    assert await routing == "a"


def test_two_of_fewer() -> None:
    assert two_of([]) == []
    only: Any = Replica("a", None)
    assert two_of([only]) == [only]
