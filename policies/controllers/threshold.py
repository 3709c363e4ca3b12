"""Thresholds with hysteresis, replica by replica.

A replica goes to FP8 as soon as one watched signal reaches its high water, and back to 16 bits once all of
them have stayed at or below low water for ``calm_s``, seen at least once in ``max_signal_age_s``. The queue
(length, age of its oldest request) is watched as well as the measured percentiles: percentiles speak only of
requests that were already served.
Replicas that are kept for requests that demand 16 bits count as calm whatever their signals say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.base import KEPT, Controller, Memory, Wish, kept_for_strict
from nestedfp.policies.protocol import FP8, FP16, ReplicaReport
from nestedfp.policies.snapshot import Snapshot


class _Reading(NamedTuple):
    """One watched signal against its thresholds."""

    signal: str
    value: float
    high: float
    low: float


class _Calm(NamedTuple):
    """What is remembered: the time of the last decision, and since when each replica has been calm."""

    at_s: float
    since_s: Mapping[str, float]


class ThresholdController(Controller):
    """Threshold control; its memory is since when each replica has been calm."""

    def __init__(self, config: PolicyConfig) -> None:
        self._water = [(signal, water.high, water.low) for signal, water in config.water.items()]
        self._calm_s = config.calm_s
        self._panic_factor = config.panic_factor
        self._longest_gap_s = config.max_signal_age_s

    def start(self) -> Memory:
        return _Calm(-math.inf, {})

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        before = cast(_Calm, memory)
        calm_before = before.since_s if now - before.at_s <= self._longest_gap_s else {}
        calm_since: dict[str, float] = {}
        wishes: dict[str, Wish] = {}
        views = snapshot.replicas
        kept = kept_for_strict(views, [modes[view.report.replica_id] for view in views])
        for view in views:
            replica_id = view.report.replica_id
            worst, calm = self._read(view.report)
            if worst is not None and worst.value >= worst.high and replica_id not in kept:
                if modes[replica_id] != FP8:
                    wishes[replica_id] = self._relief(worst)
            elif calm or replica_id in kept:
                since = calm_since[replica_id] = calm_before.get(replica_id, now)
                if modes[replica_id] == FP16 and replica_id in kept:
                    wishes[replica_id] = KEPT
                elif now - since >= self._calm_s and modes[replica_id] != FP16:
                    wishes[replica_id] = _return(worst, now - since, kept=replica_id in kept)
        return wishes, _Calm(now, calm_since)

    def _read(self, report: ReplicaReport) -> tuple[_Reading | None, bool]:
        """The signal furthest up its scale, and whether all of them are calm."""
        worst: _Reading | None = None
        worst_pressure = -1.0
        calm = True
        for signal, high, low in self._water:
            value = getattr(report, signal)
            if value is None:
                continue
            calm = calm and value <= low
            if value / high > worst_pressure:
                worst, worst_pressure = _Reading(signal, value, high, low), value / high
        return worst, calm

    def _relief(self, worst: _Reading) -> Wish:
        return Wish(
            mode=FP8,
            reason=f"{worst.signal} {worst.value:.4g} reached high water {worst.high:.4g}",
            signal=worst.signal,
            value=worst.value,
            threshold=worst.high,
            urgent=worst.value >= self._panic_factor * worst.high,
        )


def _return(highest: _Reading | None, calm_s: float, *, kept: bool) -> Wish:
    why = "kept for requests that demand 16 bits" if kept else "every signal at or below low water"
    return Wish(
        mode=FP16,
        reason=f"{why} for {calm_s:.1f} s",
        signal=highest.signal if highest else None,
        value=highest.value if highest else None,
        threshold=highest.low if highest else None,
    )
