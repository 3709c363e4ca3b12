"""One vLLM engine and its OpenAI application, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, Final

from nestedfp import models
from nestedfp.deployments import vllm_openai
from nestedfp.deployments.admission import QueueBound
from nestedfp.deployments.asgi import App
from nestedfp.deployments.config import DeploymentSettings, EngineSettings
from nestedfp.deployments.door import Door
from nestedfp.deployments.precision_report import Served
from nestedfp.deployments.signals import RequestWindow, report_signals
from nestedfp.policies.protocol import AUTO, FP16
from nestedfp.policies.replica import Order
from nestedfp.policies.roofline import described
from nestedfp.vllm import engine_arguments
from nestedfp.vllm.control import EngineControl
from nestedfp.vllm.status import EngineStatus

QUEUE_BOUND: Final = "waiting_prompt_tokens"
"""The limit of an order that the replica keeps, not the engine."""
_ANSWER_TIMEOUT_S: Final = 5.0
_DEATH_CHECK_S: Final = 0.1

logger = logging.getLogger(__name__)


class EngineApp:
    """An engine, the way to steer it, and `asgi`, the application that serves it.

    Made by :meth:`start`, inside the event loop that will serve the requests.
    """

    def __init__(self, engine: Any, settings: DeploymentSettings, window: RequestWindow) -> None:
        self._engine = engine
        self._control = EngineControl(engine) if settings.engine.nested else None
        self._window = window
        self._mode = FP16
        self._slo = settings.policy.slo
        self._latency = settings.policy.latency
        self._queue_bound = math.inf
        self._answered_s = time.monotonic()
        self._status: EngineStatus | None = None
        self._door: Door

    @classmethod
    async def start(
        cls,
        settings: DeploymentSettings,
        *,
        replica: str,
        served: Served,
        stat_loggers: list[Callable[..., Any]],
    ) -> EngineApp:
        """Load the model and build the application; takes from half a minute to many minutes."""
        window = RequestWindow(settings.replicas.signal_window_s)
        arguments = _arguments(settings.engine)
        engine = vllm_openai.start_engine(arguments, [vllm_openai.stat_logger(window.record), *stat_loggers])
        try:
            app = cls(engine, settings, window)
            app.open(await vllm_openai.build_openai_app(engine, arguments), settings, replica, served)
            await app.refresh()
        except BaseException:
            engine.shutdown()
            raise
        return app

    def open(self, openai: App, settings: DeploymentSettings, replica: str, served: Served) -> None:
        """Put the door before `openai`, the engine's own application."""
        bounded = QueueBound(
            openai,
            queued=lambda: 0 if self._status is None else self._status.waiting_prompt_tokens,
            bound=lambda: self._queue_bound,
            retry_after_s=settings.http.retry_after_s,
        )
        self._door = Door(
            bounded,
            settings,
            replica=replica,
            precision=lambda: self.precision,
            tokens=self.request_tokens,
            window=self._window,
            served=served,
        )

    def adopt(self, settings: DeploymentSettings) -> None:
        """Take over settings whose policy has changed."""
        self._slo = settings.policy.slo
        self._latency = settings.policy.latency
        self._door.adopt(settings)

    @property
    def status(self) -> EngineStatus | None:
        """The engine's last known status; None for plain vLLM, or before the first answer."""
        return self._status

    @property
    def latency_model(self) -> dict[str, Any]:
        """What step times are predicted by: whose costs, and by mode the factor on them learned so far."""
        correction = {} if self._status is None else dict(self._status.step_corrections)
        return {"costs": described(self._latency), "correction": correction}

    @property
    def asgi(self) -> App:
        return self._door.app

    @property
    def precision(self) -> str:
        """The precision in force: the target, or within `auto` the last one seen."""
        if self._mode == AUTO and self._status is not None:
            return self._status.current
        return self._mode

    @property
    def silent_s(self) -> float:
        """How long the engine has not answered :meth:`refresh`."""
        return time.monotonic() - self._answered_s

    async def apply(self, order: Order) -> None:
        """Set the engine's target. Raises what :class:`EngineControl` raises."""
        if self._control is None:
            return
        limits = None if order.limits is None else dict(order.limits)
        await self._control.set_target(order.mode, epoch=order.epoch, reason=order.reason, limits=limits)
        self._mode = order.mode
        self._queue_bound = (limits or {}).get(QUEUE_BOUND, math.inf)

    async def refresh(self) -> bool:
        """Ask the engine for its status, plain vLLM for a sign of life; False if it did not answer."""
        try:
            await asyncio.wait_for(self._ask(), _ANSWER_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the engine has not answered for %g s", _ANSWER_TIMEOUT_S)
            return False
        self._answered_s = time.monotonic()
        return True

    async def _ask(self) -> None:
        if self._control is None:
            # Answered as the control's calls are, by the core between two steps, and without its workers.
            await self._engine.is_sleeping()
        else:
            self._status = await self._control.status()

    async def signals(self) -> dict[str, Any]:
        """The signals of a report; without an answer from the engine only what this process knows."""
        asked_s = time.monotonic()
        status = self._status if await self.refresh() else None
        age_s = time.monotonic() - asked_s
        signals = report_signals(self._window, self._slo, status, age_s=age_s)
        # Those that the engine holds are all in its batch or queue; these wait before it.
        return {**signals, "strict_waiting": self._door.strict_waiting}

    async def request_tokens(self, request_id: str) -> Mapping[str, int] | None:
        """Tokens of a finished request by precision; None where they are not known."""
        if self._control is None:
            return None
        try:
            return await asyncio.wait_for(self._control.take_request_tokens(request_id), _ANSWER_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the engine did not say which precision served %s", request_id)
            return None

    async def died(self) -> None:
        """Returns once the engine is dead."""
        while not self._engine.errored:
            await asyncio.sleep(_DEATH_CHECK_S)

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self._engine.shutdown()


def _arguments(engine: EngineSettings) -> Namespace:
    given = dict(engine.arguments)
    if engine.nested:
        plugin = engine_arguments(engine.device, **engine.plugin)
        plugin["hf_overrides"] = {**given.get("hf_overrides", {}), **plugin["hf_overrides"]}
        given |= plugin
    return vllm_openai.server_arguments(models.resolve(engine.model), engine.served_model_name, given)
