"""A simulated engine with the interface of :class:`~nestedfp.deployments.engine_app.EngineApp`.

Chosen by `engine.device: simulated`. The control loop, the door, the signals and the metrics are those of a
real replica; neither torch nor vLLM is imported, so that eight of them share two cores. Whatever it gives out
is labelled: the replica's id begins with :data:`~nestedfp.deployments.config.SIMULATED_PREFIX`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from nestedfp.deployments.asgi import App
from nestedfp.deployments.config import DeploymentSettings, SimulatedArguments
from nestedfp.deployments.door import Door
from nestedfp.deployments.precision_report import Served
from nestedfp.deployments.signals import RequestWindow, report_signals
from nestedfp.deployments.simulated_engine import SimulatedEngine, StepStatistics, compile_steps
from nestedfp.deployments.simulated_openai import SimulatedOpenAI
from nestedfp.policies.replica import Order
from nestedfp.policies.roofline import LABEL, described, latency_model
from nestedfp.policies.simulation.state import EngineSettings
from nestedfp.vllm.status import EngineStatus


class SimulatedApp:
    """An engine that steps in real time, and `asgi`, which serves it. Made by :meth:`start`."""

    def __init__(self, settings: DeploymentSettings, *, replica: str, served: Served) -> None:
        given = SimulatedArguments.from_dict(settings.engine.arguments)
        self._window = RequestWindow(settings.replicas.signal_window_s)
        self._slo = settings.policy.slo
        self._costs = described(settings.policy.latency)
        self._engine = SimulatedEngine(
            EngineSettings(
                model=settings.policy.latency or latency_model(given.max_num_batched_tokens),
                max_sequences=given.max_num_seqs,
                kv_tokens=given.kv_tokens,
            ),
            places=settings.max_ongoing_requests,
            seed=given.seed,
            stepped=self._stepped,
            arrived=self._window.prompts_arrived,
        )
        self._openai = SimulatedOpenAI(
            self._engine,
            model=settings.engine.served_model_name,
            max_model_len=given.max_model_len,
            stream_interval=given.stream_interval,
            retry_after_s=settings.http.retry_after_s,
            label=LABEL,
        )
        self._door = Door(
            self._openai,
            settings,
            replica=replica,
            precision=lambda: self.precision,
            tokens=self.request_tokens,
            window=self._window,
            served=served,
        )
        self._running = asyncio.create_task(self._engine.run())

    @classmethod
    async def start(cls, settings: DeploymentSettings, *, replica: str, served: Served) -> SimulatedApp:
        """Load the compiled step loop and begin."""
        app = cls(settings, replica=replica, served=served)
        await asyncio.to_thread(compile_steps)
        return app

    @property
    def latency_model(self) -> dict[str, Any]:
        """Whose step costs these steps have; nothing corrects them, as they are what it measures."""
        return {"costs": self._costs, "correction": {}}

    @property
    def asgi(self) -> App:
        return self._door.app

    @property
    def status(self) -> EngineStatus | None:
        return self._engine.status()

    @property
    def precision(self) -> str:
        """The precision in force."""
        return self._engine.current

    def adopt(self, settings: DeploymentSettings) -> None:
        """Take over settings whose policy has changed; the steps keep their times."""
        self._slo = settings.policy.slo
        self._door.adopt(settings)

    @property
    def silent_s(self) -> float:
        """It lives in this process and always answers."""
        return 0.0

    async def refresh(self) -> bool:
        """It has answered."""
        return True

    async def apply(self, order: Order) -> None:
        """Set the engine's target."""
        self._engine.set_target(order.mode, epoch=order.epoch, reason=order.reason, limits=order.limits)

    async def signals(self) -> dict[str, Any]:
        """The signals of a report."""
        signals = report_signals(self._window, self._slo, self._engine.status(), age_s=0.0)
        extra = self._engine.extra_signals()
        extra["strict_waiting"] += self._door.strict_waiting
        return {**signals, **extra}

    async def request_tokens(self, request_id: str) -> Mapping[str, int] | None:
        """Tokens of a finished request by precision; None where they are not known."""
        return self._openai.take_tokens(request_id)

    async def died(self) -> None:
        """Returns where the step loop has ended; it should not."""
        await asyncio.wait((self._running,))

    def shutdown(self) -> None:
        """Stop time."""
        self._running.cancel()

    def _stepped(self, step: StepStatistics) -> None:
        self._window.record(None, step)
