"""Keeps an engine in the mode that the policy orders, and the replica's metrics current.

Control is pull: the replica calls the policy actor in a long poll, and the answer is its target. See
`nestedfp.policies.protocol` for what happens to messages that are lost, late or repeated.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from nestedfp.policies.autoscaling import scaling_stats
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.replica import Order, ReplicaControl, follow
from nestedfp.vllm.status import EngineStatus

Sync = Callable[[dict[str, Any], int, float], Awaitable[Mapping[str, Any]]]


class Engine(Protocol):
    """What the loop needs of an engine."""

    @property
    def status(self) -> EngineStatus | None: ...

    async def apply(self, order: Order) -> None: ...

    async def signals(self) -> dict[str, Any]: ...


class Metrics(Protocol):
    """Where the loop tells what it saw."""

    def engine(self, status: EngineStatus) -> None: ...

    def order(self, order: Order, lag_s: float) -> None: ...

    def policy_up(self, up: bool) -> None: ...

    def latencies(self, slo: Any, ttft_s: float | None, tpot_s: float | None) -> None: ...


class ControlLoop:
    """One replica's loop; :meth:`run` ends by being cancelled, or with the error of an engine that fails.

    One that takes over from another, which has ended, is told the last order that the engine was given.
    """

    def __init__(
        self,
        replica: str,
        config: PolicyConfig,
        engine: Engine,
        sync: Sync,
        metrics: Metrics,
        found: Order | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._sync = sync
        self._metrics = metrics
        self._control = ReplicaControl(replica, config, found=found)
        self.given = found
        """The newest order that the engine was given, answered or not; None before the first."""
        self._signals: Mapping[str, Any] = {}

    async def run(self) -> None:
        await follow(self._control, self._sync, self._collect, self._apply)

    def status(self) -> dict[str, Any]:
        """The order in force and the last signals, as plain values."""
        return {**self._control.status(), "boot_id": self._control.boot_id, "signals": dict(self._signals)}

    def scaling_stats(self) -> dict[str, float]:
        """The facts for autoscaling, finite numbers only; empty while the signals are unusable."""
        view = self._control.view()
        if view is None or view.fault(self._config.max_signal_age_s) is not None:
            return {}
        control = self._control
        return scaling_stats(view.report, control.mode_s, self._config.slo, fixed=control.fixed)

    async def _collect(self) -> Mapping[str, Any]:
        self._signals = signals = await self._engine.signals()
        if self._engine.status is not None:
            self._metrics.engine(self._engine.status)
        self._metrics.latencies(self._config.slo, signals.get("ttft_p90_s"), signals.get("tpot_p90_s"))
        self._metrics.policy_up(self._control.owner is not None)
        return signals

    async def _apply(self, order: Order) -> None:
        came_s = time.monotonic()
        # A loop that is cancelled here has ordered all the same: the engine refuses what is older than this.
        self.given = order
        await self._engine.apply(order)
        self._metrics.order(order, time.monotonic() - came_s)
