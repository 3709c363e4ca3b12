"""One vLLM engine and its OpenAI application, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, Final

from nestedfp import models
from nestedfp.deployments import vllm_openai
from nestedfp.deployments.admission import ApiKeys, BodyLimit, KnownRoutes, PrecisionClass
from nestedfp.deployments.asgi import App
from nestedfp.deployments.config import DeploymentSettings, EngineSettings
from nestedfp.deployments.precision_report import PrecisionReport, Served
from nestedfp.deployments.signals import RequestWindow
from nestedfp.policies.protocol import AUTO, FP8, FP16
from nestedfp.policies.replica import Order
from nestedfp.vllm import engine_arguments
from nestedfp.vllm.control import EngineControl
from nestedfp.vllm.status import EngineStatus

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
        self._status: EngineStatus | None = None
        self.asgi: App

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
        window = RequestWindow(settings.replicas.signal_window_s, settings.policy.slo.percentile)
        arguments = _arguments(settings.engine)
        engine = vllm_openai.start_engine(arguments, [vllm_openai.stat_logger(window.record), *stat_loggers])
        try:
            app = cls(engine, settings, window)
            openai = await vllm_openai.build_openai_app(engine, arguments)
            app.asgi = app._wrap(openai, settings, replica, served)
            await app.refresh()
        except BaseException:
            engine.shutdown()
            raise
        return app

    @property
    def status(self) -> EngineStatus | None:
        """The engine's last known status; None for plain vLLM, or before the first answer."""
        return self._status

    @property
    def window(self) -> RequestWindow:
        return self._window

    @property
    def precision(self) -> str:
        """The precision in force: the target, or within `auto` the last one seen."""
        if self._mode == AUTO and self._status is not None:
            return self._status.current
        return self._mode

    async def apply(self, order: Order) -> None:
        """Set the engine's target. Raises what :class:`EngineControl` raises."""
        if self._control is None:
            return
        limits = None if order.limits is None else dict(order.limits)
        await self._control.set_target(order.mode, epoch=order.epoch, reason=order.reason, limits=limits)
        self._mode = order.mode

    async def refresh(self) -> bool:
        """Ask the engine for its status; False if it did not answer."""
        if self._control is None:
            return False
        try:
            self._status = await asyncio.wait_for(self._control.status(), _ANSWER_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the engine has not answered for %g s", _ANSWER_TIMEOUT_S)
            return False
        return True

    async def signals(self) -> dict[str, Any]:
        """The signals of a report; without an answer from the engine only what this process knows."""
        asked_s = time.monotonic()
        signals: dict[str, Any] = {
            "arrivals_per_s": self._window.arrivals_per_s(),
            "ttft_p90_s": self._window.ttft_s(),
            "tpot_p90_s": self._window.tpot_s(),
        }
        if not await self.refresh() or self._status is None:
            return signals
        status = self._status
        return {
            **signals,
            "running": status.running,
            "waiting": status.waiting,
            "waiting_prompt_tokens": status.waiting_prompt_tokens,
            "oldest_waiting_s": status.oldest_waiting_s,
            "kv_usage": status.kv_usage,
            "step_time_s": status.step_time_s.get(status.current),
            "tokens_fp16": status.tokens.get(FP16, 0),
            "tokens_fp8": status.tokens.get(FP8, 0),
            "flips": status.flips,
            "strict_running": status.strict_running,
            "age_s": time.monotonic() - asked_s,
        }

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

    def _wrap(self, openai: App, settings: DeploymentSettings, replica: str, served: Served) -> App:
        http = settings.http
        keys = [key for key in os.environ.get(http.api_keys_variable, "").split(",") if key]
        report = PrecisionReport(
            openai,
            replica=replica,
            precision=lambda: self.precision,
            tokens=self.request_tokens,
            arrived=self._window.arrived,
            served=served,
        )
        classes = PrecisionClass(
            report,
            limit=http.max_strict_requests,
            retry_after_s=http.retry_after_s,
            nested=settings.engine.nested,
        )
        return KnownRoutes(ApiKeys(BodyLimit(classes, http.max_body_bytes), keys))


def _arguments(engine: EngineSettings) -> Namespace:
    given = dict(engine.arguments)
    if engine.nested:
        plugin = engine_arguments(engine.device, **engine.plugin)
        plugin["hf_overrides"] = {**given.get("hf_overrides", {}), **plugin["hf_overrides"]}
        given |= plugin
    return vllm_openai.server_arguments(models.resolve(engine.model), engine.served_model_name, given)
