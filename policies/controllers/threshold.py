"""Thresholds with hysteresis, replica by replica.

A replica goes to FP8 as soon as one watched signal reaches its high water, and back to 16 bits once all of
them have stayed at or below low water for ``calm_s``. The queue (length, age of its oldest request) is
watched as well as the measured percentiles: percentiles speak only of requests that were already served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from nestedfp.policies.config import PolicyConfig, Water
from nestedfp.policies.controllers.base import Controller, Memory, Wish
from nestedfp.policies.protocol import FP8, FP16, ReplicaReport
from nestedfp.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class _Reading:
    """One watched signal against its thresholds."""

    signal: str
    value: float
    water: Water

    @property
    def pressure(self) -> float:
        return self.value / self.water.high

    @property
    def calm(self) -> bool:
        return self.value <= self.water.low


class ThresholdController(Controller):
    """Threshold control; its memory is since when each replica has been calm."""

    def __init__(self, config: PolicyConfig) -> None:
        self._water = config.water
        self._calm_s = config.calm_s
        self._panic_factor = config.panic_factor

    def start(self) -> Memory:
        return {}

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        calm_before = cast(Mapping[str, float], memory)
        calm_since: dict[str, float] = {}
        wishes: dict[str, Wish] = {}
        for view in snapshot.replicas:
            readings = self._read(view.report)
            worst = max(readings, key=lambda reading: reading.pressure, default=None)
            if worst is not None and worst.pressure >= 1.0:
                wishes[view.replica_id] = self._relief(worst)
                continue
            if all(reading.calm for reading in readings):
                since = calm_since[view.replica_id] = calm_before.get(view.replica_id, now)
                if now - since >= self._calm_s:
                    wishes[view.replica_id] = self._return(worst, now - since)
        return wishes, calm_since

    def _read(self, report: ReplicaReport) -> list[_Reading]:
        values = ((signal, getattr(report, signal), water) for signal, water in self._water.items())
        return [_Reading(signal, value, water) for signal, value, water in values if value is not None]

    def _relief(self, worst: _Reading) -> Wish:
        return Wish(
            mode=FP8,
            reason=f"{worst.signal} {worst.value:.4g} reached high water {worst.water.high:.4g}",
            signal=worst.signal,
            value=worst.value,
            threshold=worst.water.high,
            urgent=worst.pressure >= self._panic_factor,
        )

    def _return(self, highest: _Reading | None, calm_s: float) -> Wish:
        return Wish(
            mode=FP16,
            reason=f"every signal at or below low water for {calm_s:.1f} s",
            signal=highest.signal if highest else None,
            value=highest.value if highest else None,
            threshold=highest.water.low if highest else None,
        )
