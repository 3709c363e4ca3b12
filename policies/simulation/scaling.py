"""Autoscaling of simulated replicas: the joint rule, and Ray Serve's own policy to compare it with.

:class:`ServeScaler` is Serve's default policy written anew from its documentation: the replicas wanted are
the requests in progress over ``target_ongoing_requests``, averaged over the look-back period; a change is
made once it has been wanted without a break for the delay of its direction.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nestedfp.policies import checks
from nestedfp.policies.autoscaling import ScalingConfig, ScalingState, desired_replicas, scaling_stats
from nestedfp.policies.config import Slo
from nestedfp.policies.latency import LatencyModel
from nestedfp.policies.snapshot import ReplicaView


class Scaler(Protocol):
    """Says every ``interval_s`` how many replicas there should be."""

    interval_s: float
    min_replicas: int
    max_replicas: int

    def replicas(
        self, views: Sequence[ReplicaView], ordered: int, now: float, fixed: Collection[str] = ()
    ) -> int:
        """Replicas wanted; ``views`` are those that serve, ``ordered`` counts those that start as well.

        ``fixed`` names those whose mode stays whatever the load.
        """


@dataclass(slots=True, kw_only=True)
class ServeScaler:
    """Serve's default policy. Durations are seconds; the defaults are Serve's."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    look_back_s: float = 30.0
    interval_s: float = 1.0
    _ongoing: deque[tuple[float, int]] = field(default_factory=deque)
    _wanted_since: tuple[int, float] = (0, 0.0)
    """Direction of the change that is wanted, and since when."""

    def __post_init__(self) -> None:
        checks.number("target_ongoing_requests", self.target_ongoing_requests, above=0.0)
        for name in ("upscale_delay_s", "downscale_delay_s", "look_back_s"):
            checks.number(name, getattr(self, name))

    def replicas(
        self, views: Sequence[ReplicaView], ordered: int, now: float, fixed: Collection[str] = ()
    ) -> int:
        self._ongoing.append((now, sum(view.report.running + view.report.waiting for view in views)))
        while self._ongoing[0][0] < now - self.look_back_s:
            self._ongoing.popleft()
        mean = sum(count for _, count in self._ongoing) / len(self._ongoing)
        wanted = math.ceil(mean / self.target_ongoing_requests - 1e-9)
        wanted = min(self.max_replicas, max(self.min_replicas, wanted))
        direction = (wanted > ordered) - (wanted < ordered)
        if direction != self._wanted_since[0]:
            self._wanted_since = (direction, now)
        delay_s = self.upscale_delay_s if direction > 0 else self.downscale_delay_s
        if direction == 0 or now - self._wanted_since[1] < delay_s:
            return ordered
        self._wanted_since = (0, now)
        return wanted


@dataclass(slots=True, kw_only=True)
class JointScaler:
    """The joint rule on what the replicas report."""

    config: ScalingConfig
    slo: Slo
    model: LatencyModel
    interval_s: float = 1.0
    _state: ScalingState = field(default_factory=ScalingState)
    _modes: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Mode of each replica, and since when."""

    @property
    def min_replicas(self) -> int:
        return self.config.min_replicas

    @property
    def max_replicas(self) -> int:
        return self.config.max_replicas

    def replicas(
        self, views: Sequence[ReplicaView], ordered: int, now: float, fixed: Collection[str] = ()
    ) -> int:
        modes = {}
        for view in views:
            mode, since = self._modes.get(view.replica_id, ("", now))
            modes[view.replica_id] = (view.report.mode, since if mode == view.report.mode else now)
        self._modes = modes
        scaling, self._state = desired_replicas(
            [
                scaling_stats(
                    view.report,
                    now - modes[view.replica_id][1],
                    self.slo,
                    fixed=view.replica_id in fixed,
                )
                for view in views
            ],
            self._state,
            current=ordered,
            starting=max(0, ordered - len(views)),
            config=self.config,
            slo=self.slo,
            model=self.model,
            now=now,
        )
        return scaling.replicas
