"""What replicas and the policy actor say to each other.

A replica calls ``sync(report, known_epoch, wait_s)`` over and over; the answer is the target it must follow.
Registration, heartbeat and delivery are this one call, so for every message there is one rule:

- lost: the replica calls again; its target stays until the lease ends, then it decides by itself.
- late or repeated: an answer counts only for the newest call (``boot_id`` and ``sequence`` are echoed), and
  a report only if its sequence number is new.
- its sender died: a new boot id replaces the old one for good, and what an older boot sent late is refused,
  heard of or not (``booted_at``); a new actor adopts the epoch a replica reports.

Epochs count the targets of one replica and never fall; an epoch belongs to one owner, and an actor that
finds a replica under another owner's epoch takes it over with a newer one. A lease runs from the moment the
call was *sent*, so no delay on the way can stretch it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField

FP16: Final = "fp16"
FP8: Final = "fp8"
AUTO: Final = "auto"

_IDENTITY: Final = ("replica_id", "boot_id", "sequence", "mode", "epoch", "owner", "booted_at")
_IDENTITY_DEFAULTS: Final = {"owner": "", "booted_at": 0.0}
_COUNTS: Final = frozenset(
    {
        "running",
        "waiting",
        "waiting_prompt_tokens",
        "tokens_fp16",
        "tokens_fp8",
        "flips",
        "strict_running",
        "strict_waiting",
        "context_tokens",
        "batch_tokens",
        "applied_epoch",
    }
)
_FRACTIONS: Final = frozenset({"kv_usage", "slo_miss_share"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """The state of one replica as it reports it.

    The first five fields, ``owner`` and ``booted_at`` identify the message; wrong ones are refused. The rest
    are signals. The constructor refuses an unusable signal too; :meth:`from_dict`, which reads what came over
    the wire, keeps the message, replaces an unusable signal (missing, NaN, infinite, negative, of a wrong
    type) by its neutral value and names it in ``faults``: a heartbeat stays a heartbeat, and a controller
    makes no decision on it.
    """

    replica_id: str
    boot_id: str
    """Random per process start of the replica."""
    sequence: int
    """Number of this report within the boot, from 1."""
    mode: str
    """Mode the replica follows now (its engine's target): ``fp16``, ``fp8``, ``auto`` or a named plan."""
    epoch: int
    """Epoch of the last target it accepted; 0 before the first."""

    running: int
    """Requests being served by the engine."""
    waiting: int
    """Requests in the engine's queue."""
    waiting_prompt_tokens: int
    """Prompt tokens of the queue that are not computed yet."""
    oldest_waiting_s: float
    """Age of the oldest request in the queue; 0 for an empty queue."""
    kv_usage: float
    """Share of the KV cache in use, 0 to 1."""
    arrivals_per_s: float
    """Requests arriving per second, over the replica's short window."""
    ttft_p90_s: float | None
    """90th percentile of TTFT over the short window (10 s); None where no first token fell into it."""
    tpot_p90_s: float | None
    """90th percentile of TPOT over the short window (10 s); None where no request gave two tokens in it."""
    step_time_s: float | None
    """Recent duration of an engine step in the present mode; None before the first."""
    tokens_fp16: int
    """Tokens scheduled in executed 16-bit steps since the boot."""
    tokens_fp8: int
    """Tokens scheduled in executed FP8 steps since the boot."""
    flips: int
    """Changes of the precision in force since the boot, steps within ``auto`` included."""
    age_s: float
    """Age of these signals when the report was sent."""

    strict_running: int = 0
    """Requests being served that demand 16 bits."""
    strict_waiting: int = 0
    """Queued requests that demand 16 bits."""
    context_tokens: int | None = None
    """Tokens in the KV cache of the running requests together; None where the engine does not say."""
    batch_tokens: int | None = None
    """Tokens of the step, or of an average of the steps, that took ``step_time_s``; None where unknown."""
    arriving_prompt_tokens_per_s: float | None = None
    """Prompt tokens arriving per second, over the short window; None where unknown."""

    slo_miss_share: float | None = None
    """Share of the requests of the short window (10 s) whose first token was late, and of those that were
    slow when they ended, together at most 1: one that was both counts twice. None where unknown."""
    applied_epoch: int = 0
    """Epoch of the last target that the engine has taken; 0 before the first."""
    applied_s_ago: float | None = None
    """Seconds since it took that target when the report was sent; None before the first."""
    owner: str = ""
    """Owner of the last target it accepted; empty before the first."""
    booted_at: float = 0.0
    """When this boot began, Unix seconds: orders the boots of one replica. 0 where unknown."""
    faults: tuple[str, ...] = ()
    """Names of signals that came unusable; filled in by :meth:`from_dict`, never sent."""

    def __post_init__(self) -> None:
        for field in _IDENTITY:
            _check_identity(field, getattr(self, field))
        for field in _SIGNALS:
            _check_signal(field, getattr(self, field))

    def to_dict(self) -> dict[str, Any]:
        """The message as plain values (JSON types only)."""
        return {field: getattr(self, field) for field in _WIRE}

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> ReplicaReport:
        """Read a message; fields not known here are ignored, so that a newer replica may say more.

        Raises :class:`InvalidField` if the message is no mapping or does not identify its sender.
        """
        if not isinstance(message, Mapping):
            raise InvalidField("report", message, "send the dictionary made by ReplicaReport.to_dict()")
        values: dict[str, Any] = {}
        for field in _IDENTITY:
            values[field] = _check_identity(field, message.get(field, _IDENTITY_DEFAULTS.get(field)))
        faults: list[str] = []
        for field in _SIGNALS:
            if field not in message and field in _OPTIONAL:
                continue
            try:
                values[field] = _check_signal(field, message.get(field, _MISSING))
            except InvalidField:
                faults.append(field)
                values[field] = _NEUTRAL[field]
        return cls(**values, faults=tuple(faults))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The order of the policy to one replica: follow ``mode`` until ``lease_s`` after the call was sent."""

    epoch: int
    mode: str
    lease_s: float
    reason: str
    limits: Mapping[str, float] | None = None
    """Limits for ``auto`` and for shedding, for example ``{"waiting_prompt_tokens": 2048}``."""
    owner: str = ""
    """Boot id of the actor that speaks."""
    boot_id: str = ""
    """Echo of the report answered."""
    sequence: int = 0
    """Echo of the report answered."""
    fixed: bool = False
    """The mode stays whatever the load, so only more replicas would help one that is too slow."""

    def __post_init__(self) -> None:
        checks.integer("epoch", self.epoch)
        checks.name("mode", self.mode)
        checks.number("lease_s", self.lease_s, above=0.0)
        checks.integer("sequence", self.sequence)
        for field in ("reason", "owner", "boot_id"):
            if not isinstance(getattr(self, field), str):
                raise InvalidField(field, getattr(self, field), "give a string")
        checks.flag("fixed", self.fixed)
        if self.limits is None:
            return
        if not isinstance(self.limits, Mapping):
            raise InvalidField("limits", self.limits, "give a mapping from names to numbers, or nothing")
        for key, value in self.limits.items():
            checks.number(f"limits.{checks.name('limits', key)}", value)

    def to_dict(self) -> dict[str, Any]:
        """The message as plain values (JSON types only)."""
        message = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.limits is not None:
            message["limits"] = dict(self.limits)
        return message

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> Target:
        """Read an answer; unknown fields are ignored, a bad or missing one raises :class:`InvalidField`."""
        if not isinstance(message, Mapping):
            raise InvalidField("target", message, "send the dictionary made by Target.to_dict()")
        fields = [field.name for field in dataclasses.fields(cls)]
        for field in ("epoch", "mode", "lease_s", "reason"):
            if field not in message:
                raise InvalidField(field, None, "send the dictionary made by Target.to_dict()")
        return cls(**{field: message[field] for field in fields if field in message})


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


_MISSING: Final = _Missing()
_WIRE: Final = tuple(field.name for field in dataclasses.fields(ReplicaReport) if field.name != "faults")
_SIGNALS: Final = tuple(field for field in _WIRE if field not in _IDENTITY)
_OPTIONAL: Final = frozenset(
    field.name for field in dataclasses.fields(ReplicaReport) if field.default is not dataclasses.MISSING
)
_NULLABLE: Final = frozenset(
    {
        "ttft_p90_s",
        "tpot_p90_s",
        "step_time_s",
        "context_tokens",
        "batch_tokens",
        "arriving_prompt_tokens_per_s",
        "slo_miss_share",
        "applied_s_ago",
    }
)
_NEUTRAL: Final = {
    field: None if field in _NULLABLE else (0 if field in _COUNTS else 0.0) for field in _SIGNALS
}


def _check_identity(field: str, value: object) -> str | float:
    if field in ("replica_id", "boot_id"):
        return checks.text(field, value)
    if field == "owner":
        return checks.text(field, value) if value else ""
    if field == "mode":
        return checks.name(field, value)
    if field == "booted_at":
        return checks.number(field, value)
    return checks.integer(field, value, minimum=1 if field == "sequence" else 0)


def _check_signal(field: str, value: object) -> float | None:
    if value is None and field in _NULLABLE:
        return None
    if field in _COUNTS:
        return checks.integer(field, value)
    return checks.number(field, value, maximum=1.0 if field in _FRACTIONS else float("inf"))
