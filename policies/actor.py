"""The actor's end of the protocol: it keeps the last report of each replica and answers with targets.

A plain class with an injected clock; whoever runs the cluster wraps it (``ray.remote(PolicyActor)``). It
holds soft state only: killed and started again it learns everything from the next round of reports, and
adopts the modes it finds, so a restart flips nothing. It has no background task: it decides when facts
arrive, at most once every ``decide_interval_s``.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.clock import SteadyClock
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.guard import GuardedPolicy
from nestedfp.policies.policy import Assignment, Policy
from nestedfp.policies.protocol import ReplicaReport, Target
from nestedfp.policies.roofline import described
from nestedfp.policies.snapshot import Override, ReplicaView, Snapshot

logger = logging.getLogger(__name__)

FORGET_AFTER_S: Final = 60.0
LOG_LENGTH: Final = 1000
LONGEST_OVERRIDE_S: Final = 86_400.0
_RETIRED_BOOTS: Final = 8


class RetiredReplica(RuntimeError):
    """A call from a process of a replica that a newer process of the same replica has replaced."""


@dataclass(slots=True)
class _Entry:
    """One replica: its last report, its target, and the event that ends its long polls."""

    report: ReplicaReport
    received_s: float
    epoch: int
    mode: str
    reason: str
    limits: Mapping[str, float] | None = None
    held: str | None = None
    fixed: bool = False
    """The mode stays whatever the load; told with the next answer, as it asks nothing of the engine."""
    ordered_s: float = 0.0
    delivery_s: float | None = None
    """From the order of the present target until its engine had taken it; None while it has not."""
    retired: deque[str] = field(default_factory=lambda: deque(maxlen=_RETIRED_BOOTS))
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def order(self, mode: str, reason: str, limits: Mapping[str, float] | None, now: float) -> None:
        """Set a new target and end the long polls that wait for it."""
        self.epoch += 1
        self.mode, self.reason, self.limits = mode, reason, limits
        self.ordered_s, self.delivery_s = now, None
        self.changed.set()
        self.changed = asyncio.Event()

    def heard(self, report: ReplicaReport, now: float) -> None:
        """Take over a newer report."""
        self.report, self.received_s = report, now
        if (
            self.delivery_s is None
            and report.applied_epoch == self.epoch
            and report.applied_s_ago is not None
        ):
            # The report's way here is in this figure: it is never too small.
            self.delivery_s = max(0.0, now - report.applied_s_ago - self.ordered_s)


class PolicyActor:
    """Receives reports, decides, and delivers targets by long poll.

    ``clock`` is monotonic (leases, dwell times); ``wall`` dates the decision log (Unix seconds). ``owner``
    names this incarnation; by default it is random.
    """

    def __init__(
        self,
        config: PolicyConfig | Mapping[str, Any],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        owner: str | None = None,
    ) -> None:
        self._config = config if isinstance(config, PolicyConfig) else PolicyConfig.from_dict(config)
        self._policy = Policy(self._config)
        self._guarded = GuardedPolicy(self._policy)
        self._latency = described(self._config.latency)
        logger.info(
            "controller %s; step costs at first: %s, corrected online", self._config.controller, self._latency
        )
        self._state = self._policy.start()
        # A dry run orders nothing, limits no more than modes.
        self._limits = None if self._config.dry_run else self._policy.limits
        self._now = SteadyClock(clock)
        self._wall = wall
        self._owner = owner or uuid.uuid4().hex
        self._entries: dict[str, _Entry] = {}
        self._override: Override | None = None
        self._log: deque[dict[str, Any]] = deque(maxlen=LOG_LENGTH)
        self._changes = 0
        self._ignored_reports = 0
        self._decided_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    async def sync(self, report: Mapping[str, Any], known_epoch: int, wait_s: float) -> dict[str, Any]:
        """Take a report, and answer with the replica's target as a ``Target`` dictionary.

        Answers at once if the target's epoch differs from ``known_epoch``, else as soon as it changes, and
        after ``wait_s`` (at most a third of the lease) in any case. A report already seen is not taken
        again but is answered. Raises :class:`InvalidField` on a message that cannot be attributed,
        :class:`RetiredReplica` if a newer process has registered under the same replica id.
        """
        checks.integer("known_epoch", known_epoch)
        wait_s = min(checks.number("wait_s", wait_s), self._config.lease_s / 3)
        message = ReplicaReport.from_dict(report)
        entry = self._admit(message)
        self._decide_when_due()
        if entry.epoch == known_epoch and wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await entry.changed.wait()
            except TimeoutError:
                self._decide_when_due()
        if self._entries.get(message.replica_id) is not entry or entry.report.boot_id != message.boot_id:
            raise RetiredReplica(
                f"replica {message.replica_id}: boot {message.boot_id} was replaced or forgotten"
            )
        return self._answer(entry, message)

    async def set_override(self, mode: str, expires_s: float) -> None:
        """Pin every replica to ``mode`` for ``expires_s`` from now, at once and past every bound."""
        if self._config.dry_run:
            raise InvalidField("override", mode, "set dry_run to false to pin replicas by hand")
        checks.one_of("mode", mode, self._config.modes)
        checks.number("expires_s", expires_s, above=0.0, maximum=LONGEST_OVERRIDE_S)
        now = self._now()
        self._override = Override(mode, now + expires_s)
        logger.info("manual pin: %s for %g s", mode, expires_s)
        self._decide(now)

    async def clear_override(self) -> None:
        """End a manual pin now; the controller decides again."""
        self._override = None
        self._decide(self._now())

    def status(self) -> dict[str, Any]:
        """The whole state for dashboards: targets, last reports, what is held back and why, the log."""
        now = self._now()
        override = self._override
        active = override is not None and override.active(now)
        return {
            "owner": self._owner,
            "controller": self._config.controller,
            "latency_model": self._latency,
            "dry_run": self._config.dry_run,
            "override": {"mode": override.mode, "left_s": override.until_s - now}
            if override and active
            else None,
            "changes": self._changes,
            "ignored_reports": self._ignored_reports,
            **self._guarded.status(),
            "replicas": {
                replica_id: self._describe(entry, now) for replica_id, entry in self._entries.items()
            },
            "log": list(self._log),
        }

    def _admit(self, message: ReplicaReport) -> _Entry:
        """Store a report, registering its sender first where it is new, restarted or on its own."""
        now = self._now()
        entry = self._entries.get(message.replica_id)
        if entry is None:
            entry = self._entries[message.replica_id] = _Entry(
                report=message,
                received_s=now,
                epoch=message.epoch,
                mode=message.mode,
                reason="registered",
            )
            self._adopt(entry, message, now)
            return entry
        if message.boot_id in entry.retired or message.booted_at < entry.report.booted_at:
            raise RetiredReplica(f"replica {message.replica_id}: boot {message.boot_id} was replaced")
        if message.boot_id != entry.report.boot_id:
            entry.retired.append(entry.report.boot_id)
            self._state = self._state.without(message.replica_id)
            self._adopt(entry, message, now)
        elif message.sequence <= entry.report.sequence:
            self._ignored_reports += 1
            return entry
        elif now - entry.received_s > self._config.lease_s or self._follows_another(entry, message):
            self._adopt(entry, message, now)
        entry.heard(message, now)
        return entry

    def _follows_another(self, entry: _Entry, message: ReplicaReport) -> bool:
        """Whether the replica's present target came from another actor."""
        if message.epoch == entry.epoch:
            return message.owner not in ("", self._owner)
        return message.epoch > entry.epoch

    def _adopt(self, entry: _Entry, message: ReplicaReport, now: float) -> None:
        """Take over a replica in the mode it is in, under an epoch newer than any it has seen."""
        entry.epoch = max(entry.epoch, message.epoch)
        entry.order(message.mode, "registered in the mode it was in", self._limits, now)
        self._state = self._state.adopt(
            message.replica_id, message.mode, self._limits, now, fresh=message.epoch == 0
        )

    def _answer(self, entry: _Entry, message: ReplicaReport) -> dict[str, Any]:
        return Target(
            epoch=entry.epoch,
            mode=entry.mode,
            lease_s=self._config.lease_s,
            reason=entry.reason,
            limits=entry.limits,
            owner=self._owner,
            boot_id=message.boot_id,
            sequence=message.sequence,
            fixed=entry.fixed,
        ).to_dict()

    def _decide_when_due(self) -> None:
        """Decide now, or set the one timer that does so once the interval is over."""
        now = self._now()
        due_in = self._decided_s + self._config.decide_interval_s - now
        if due_in <= 0:
            self._decide(now)
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(due_in, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._decide(self._now())

    def _decide(self, now: float) -> None:
        self._decided_s = now
        for replica_id in [
            key for key, entry in self._entries.items() if now - entry.received_s > FORGET_AFTER_S
        ]:
            del self._entries[replica_id]
        snapshot = Snapshot(
            replicas=tuple(
                ReplicaView(entry.report, entry.report.age_s + now - entry.received_s)
                for entry in self._entries.values()
            ),
            override=self._override,
        )
        assignments, self._state = self._guarded.decide(snapshot, self._state, now)
        for replica_id, assignment in assignments.items():
            self._apply(replica_id, self._entries[replica_id], assignment)

    def _apply(self, replica_id: str, entry: _Entry, assignment: Assignment) -> None:
        entry.held = assignment.held
        entry.fixed = assignment.fixed or self._config.dry_run
        if assignment.changed:
            self._record(replica_id, assignment)
        if self._config.dry_run:
            return
        if assignment.changed or assignment.limits != entry.limits:
            entry.order(assignment.mode, assignment.reason, assignment.limits, self._decided_s)

    def _record(self, replica_id: str, assignment: Assignment) -> None:
        """Log a mode change with the signal that crossed."""
        self._changes += 1
        record: dict[str, Any] = {
            "at": self._wall(),
            "replica_id": replica_id,
            "from": assignment.previous,
            "to": assignment.mode,
            "reason": assignment.reason,
            "signal": assignment.signal,
            "value": assignment.value,
            "threshold": assignment.threshold,
        }
        if self._config.dry_run:
            record["dry_run"] = True
        self._log.append(record)
        logger.info(
            "%s%s: %s -> %s, %s",
            "dry run: " if self._config.dry_run else "",
            replica_id,
            assignment.previous,
            assignment.mode,
            assignment.reason,
        )

    def _describe(self, entry: _Entry, now: float) -> dict[str, Any]:
        age_s = now - entry.received_s
        return {
            "target": {
                "epoch": entry.epoch,
                "mode": entry.mode,
                "reason": entry.reason,
                "limits": entry.limits,
            },
            "delivery_s": entry.delivery_s,
            "held": entry.held,
            "heard_s_ago": age_s,
            "leased": age_s <= self._config.lease_s,
            "faults": list(entry.report.faults),
            "report": entry.report.to_dict(),
        }
