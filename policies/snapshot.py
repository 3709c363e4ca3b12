"""What a decision sees: every replica as last reported, and the standing orders."""

from __future__ import annotations

from dataclasses import dataclass

from nestedfp.policies.protocol import ReplicaReport


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at the moment of a decision.

    ``age_s`` is the age of its signals now (age when sent plus time since), so it grows while nothing is
    heard.
    """

    report: ReplicaReport
    age_s: float

    @property
    def replica_id(self) -> str:
        return self.report.replica_id

    def fault(self, max_age_s: float) -> str | None:
        """Why these signals must not be decided on; None if they are usable."""
        if self.report.faults:
            return f"unusable signals: {', '.join(self.report.faults)}"
        if not 0.0 <= self.age_s <= max_age_s:
            return f"signals are {self.age_s:.2f} s old, limit {max_age_s:g} s"
        return None


@dataclass(frozen=True, slots=True)
class Override:
    """A manual pin: every replica in ``mode`` until ``until_s`` on the decision clock."""

    mode: str
    until_s: float

    def active(self, now: float) -> bool:
        return now < self.until_s


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All facts of one decision. Times are seconds on one monotonic clock."""

    replicas: tuple[ReplicaView, ...]
    override: Override | None = None
