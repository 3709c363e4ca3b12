"""What a controller is: a pure function from facts to wishes, with a memory it hands from call to call.

A controller says what it wants and why. Whether a wish is granted now (dwell time, bound on flips, one
return at a time, manual pin, unusable signals) is decided once for all controllers, in
``nestedfp.policies.policy``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from nestedfp.policies.protocol import FP16
from nestedfp.policies.snapshot import ReplicaView, Snapshot

Memory = Any
"""A controller's own state between decisions: an immutable value that only this controller reads."""


class Wish(NamedTuple):
    """The mode wanted for one replica, with the signal that asks for it."""

    mode: str
    reason: str
    signal: str | None = None
    value: float | None = None
    threshold: float | None = None
    urgent: bool = False
    """Overrides the dwell time and the gap between returns, never the bound on flips."""
    limits: Mapping[str, float] | None = None
    """Limits sent with the target, for ``auto`` or for shedding."""
    fixed: bool = False
    """The mode stays whatever the load: no faster one may be hoped for."""


class Controller(ABC):
    """One way to choose modes."""

    @property
    def limits(self) -> Mapping[str, float] | None:
        """Limits that every mode is sent with, whatever the signals say; None where there are none."""
        return None

    @abstractmethod
    def start(self) -> Memory:
        """The memory before the first decision."""

    @abstractmethod
    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        """Wishes by replica id; a replica without one stays as it is.

        ``snapshot`` holds only replicas with usable signals, ``modes`` the mode each is ordered to be in.
        The same arguments give the same result.
        """


def by_load(views: Sequence[ReplicaView]) -> list[ReplicaView]:
    """The replicas, least loaded first: queued prompt tokens, then queue, then batch; ties by id."""
    return sorted(views, key=_LOAD)


_LOAD: Final = attrgetter(
    "report.waiting_prompt_tokens", "report.waiting", "report.running", "report.replica_id"
)


KEPT: Final = Wish(FP16, "kept for requests that demand 16 bits", fixed=True)
"""Of a replica in 16 bits that stays there for these requests."""

STRICT_ROOM: Final = 2.0
"""Replicas kept in 16 bits over the share of requests that demand it: others are served there as well."""


def kept_for_strict(views: Sequence[ReplicaView], modes: Sequence[str]) -> frozenset[str]:
    """Replicas that stay in 16 bits for requests that demand it: their share, with room.

    ``views``, with the mode of each, come least loaded first; among equals those already in 16 bits are kept.
    """
    strict = sum(view.report.strict_running + view.report.strict_waiting for view in views)
    if strict == 0:
        return frozenset()
    everything = sum(view.report.running + view.report.waiting for view in views)
    count = math.ceil(len(views) * min(1.0, STRICT_ROOM * strict / max(everything, 1)))
    ordered = sorted(range(len(views)), key=lambda row: modes[row] != FP16)
    return frozenset(views[row].replica_id for row in ordered[:count])
