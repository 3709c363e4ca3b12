"""Chooses a replica for each request by its precision class, among two by their load.

Strict requests (`x-nestedfp-precision: fp16`) go to replicas in 16 bits while there are any that accept; all
others go anywhere. What a router knows of a replica's precision is up to a second old, so this only spares
FP8 replicas from being held in 16 bits: the replica enforces the class (`nestedfp.deployments.admission`).

Nearness comes last: Serve's own router asks the replicas of the proxy's node before all others, which would
give a strict request to an FP8 replica there, and fill that node while others idle. A request takes seconds,
the way to another node next to nothing.

Serve's own power-of-two router hands a replica that it found to whichever request waits longest. Here the
replica belongs to the request it was chosen for, which is the base router's rule.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any, Final

from ray.serve.request_router import LocalityMixin, PendingRequest, RequestRouter, RunningReplica

from nestedfp.deployments.admission import PRECISION_HEADER, is_strict
from nestedfp.policies.protocol import FP16

ROUTING_STATS_PERIOD_S: Final = 1.0
PRECISION_STAT: Final = "precision"


class PrecisionRouter(LocalityMixin, RequestRouter):
    """Power of two choices within the replicas that suit the request's precision class."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of at most two replicas; Serve asks the first rank and, where both refuse, the next.

        Within a rank Serve takes the less loaded one, and the first where it knows both to be alike.
        """
        if pending_request is not None:
            # Every replica is among those chosen from, so after a refusal Serve has to pause.
            pending_request.routing_context.should_backoff = True
        if pending_request is None or not demands_16_bits(pending_request.args):
            return [self._nearest_first(two_of(candidate_replicas))]
        in_16_bits = [
            replica for replica in candidate_replicas if replica.routing_stats.get(PRECISION_STAT) == FP16
        ]
        others = [replica for replica in candidate_replicas if replica not in in_16_bits]
        return [self._nearest_first(two_of(rank)) for rank in (in_16_bits, others) if rank]

    def _nearest_first(self, replicas: list[RunningReplica]) -> list[RunningReplica]:
        return [replica for rank in self.rank_replicas_via_locality(replicas) for replica in rank]


def two_of(replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
    """Two different replicas at random, in random order; fewer where there are fewer."""
    return random.sample(replicas, min(2, len(replicas)))


def demands_16_bits(request_args: Sequence[Any]) -> bool:
    """Whether a request from the HTTP proxy demands 16 bits.

    The proxy pickles the request before it reaches the router; unpickling every one would double that cost,
    and the header's name shows in the bytes.
    """
    request = request_args[0] if request_args else None
    if isinstance(request, bytes):
        if PRECISION_HEADER not in request:
            return False
        request = pickle.loads(request)
    scope = getattr(request, "asgi_scope", None)
    return scope is not None and is_strict(scope)
