"""The Serve replica: one engine behind the OpenAI routes, following the policy actor.

The engine lives in the replica's event loop and serves requests there; its own processes are children of the
replica. If the engine dies, the replica exits at once: a replica that answers every request with an error is
the least loaded one and would attract all traffic until a health check notices.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from ray import serve

from nestedfp.deployments.asgi import App
from nestedfp.deployments.config import SIMULATED, SIMULATED_PREFIX, DeploymentSettings
from nestedfp.deployments.control_loop import ControlLoop
from nestedfp.deployments.metrics import ReplicaMetrics
from nestedfp.deployments.policy_actor import PolicyLink
from nestedfp.deployments.router import PRECISION_STAT
from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.roofline import described

_ENGINE_DEAD: Final = 70
_HUNG_S: Final = 120.0
"""It answers between two steps; no step takes this long."""
_ASSUMED: Final = (
    "step costs at first: %s, whatever runs here; only the steps seen correct them, and for autoscaling "
    "nothing does. Unless they fit, give policy.latency (deployments/README.md, Step costs)"
)

logger = logging.getLogger("ray.serve")


@serve.deployment
@serve.ingress()
class EngineReplica:
    """Made by Serve with the settings of the application as plain values."""

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._given = self._settings = DeploymentSettings.from_dict(settings)
        context = serve.get_replica_context()
        self._app_name = context.app_name
        simulated = self._settings.engine.device == SIMULATED
        self._replica = f"{SIMULATED_PREFIX if simulated else ''}{context.replica_id.unique_id}"
        self._metrics = ReplicaMetrics(self._replica)
        self._engine = await _start(self._settings, self._replica, self._metrics)
        self._death_watch = asyncio.create_task(self._exit_with_the_engine())
        self._loop: ControlLoop | None = None
        self._following: asyncio.Task[None] | None = None
        self._healthy = False
        self._latency_told = ""
        await self._follow()

    async def __serve_build_asgi_app__(self) -> App:
        app: App = self._engine.asgi
        return app

    async def reconfigure(self, user_config: Mapping[str, Any] | None, rank: Any = None) -> None:
        """Take over the policy settings of `user_config` (`{"policy": {...}}`) without a restart.

        They stand in for those that the replica was made with, which hold again without them: where it is
        empty, or None. Bad ones fail the start of a replica. One that serves keeps what it has and logs them:
        Serve would end it, and every other with it.
        """
        # Only with a parameter `rank`, here of no use, does Ray also call where user_config was removed.
        try:
            changed = with_user_config(self._given, user_config or {})
        except InvalidField as error:
            if not self._healthy:
                raise
            logger.error("user_config is not taken over: %s", error)
            return
        if changed != self._settings:
            self._settings = changed
            self._engine.adopt(changed)
            await self._follow()

    async def check_health(self) -> None:
        """Raises where the engine hangs or the control loop has ended.

        The engine's death ends the process before Serve asks.
        """
        if not self._settings.engine.nested:
            # No control loop asks it.
            await self._engine.refresh()
        if self._engine.silent_s > _HUNG_S:
            raise RuntimeError(f"the engine has not answered for {self._engine.silent_s:.0f} s")
        if self._following is not None and self._following.done():
            raise RuntimeError("the replica no longer follows the policy; see its log")
        self._healthy = True

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router needs."""
        return {PRECISION_STAT: self._engine.precision}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The facts that the scaling rule reads. Serve never hears of None or NaN, which would end them for
        good; while nothing is known it hears nothing, and the rule holds.
        """
        return {} if self._loop is None else self._loop.scaling_stats()

    async def control_status(self) -> dict[str, Any]:
        """The state of this replica's control loop and engine, as plain values."""
        status = self._engine.status
        return {
            "replica": self._replica,
            "simulated": self._settings.engine.device == SIMULATED,
            "pid": os.getpid(),
            "control": None if self._loop is None else self._loop.status(),
            "latency_model": self._engine.latency_model,
            "engine": None if status is None else status.to_dict(),
        }

    async def __del__(self) -> None:
        for task in (self._following, self._death_watch):
            if task is not None:
                task.cancel()
        self._engine.shutdown()

    async def _follow(self) -> None:
        policy = self._settings.policy
        if not self._settings.engine.nested:
            return
        if self._following is not None:
            # Two loops at once would give the engine orders in turn.
            self._following.cancel()
            await asyncio.wait((self._following,))
        self._tell_latency_model(described(policy.latency))
        link = PolicyLink(self._app_name, policy)
        found = None if self._loop is None else self._loop.given
        self._loop = ControlLoop(self._replica, policy, self._engine, link.sync, self._metrics, found=found)
        self._following = asyncio.create_task(self._loop.run())
        self._following.add_done_callback(_log_failure)

    def _tell_latency_model(self, model: str) -> None:
        if model == self._latency_told:
            return
        self._latency_told = model
        if self._settings.assumes_step_costs:
            logger.warning(_ASSUMED, model)
        else:
            logger.info("step costs at first: %s, corrected online by this engine's steps", model)

    async def _exit_with_the_engine(self) -> None:
        await self._engine.died()
        logger.error("the engine is dead: the replica exits, Serve starts another one")
        os._exit(_ENGINE_DEAD)


async def _start(settings: DeploymentSettings, replica: str, metrics: ReplicaMetrics) -> Any:
    """The engine that `engine.device` names. Only here is decided whether this process imports vLLM."""
    if settings.engine.device == SIMULATED:
        from nestedfp.deployments.simulated_app import SimulatedApp

        return await SimulatedApp.start(settings, replica=replica, served=metrics.request)
    from nestedfp.deployments.engine_app import EngineApp
    from nestedfp.deployments.vllm_openai import ray_stat_logger

    return await EngineApp.start(
        settings, replica=replica, served=metrics.request, stat_loggers=[ray_stat_logger()]
    )


def with_user_config(settings: DeploymentSettings, user_config: Mapping[str, Any]) -> DeploymentSettings:
    """The settings with another policy; raises InvalidField for anything else."""
    changed = checks.mapping("user_config", user_config, ("policy",))
    return DeploymentSettings.from_dict({**settings.to_dict(), **changed})


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the control loop has failed", exc_info=error)
