"""Builds the Serve application: `serve deploy` imports :func:`build_app`, `nestedfp serve` calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from nestedfp.deployments.autoscaling import autoscaling_config
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.replica import EngineReplica
from nestedfp.deployments.router import ROUTING_STATS_PERIOD_S, PrecisionRouter

_IDLE_CHECK_S: Final = 0.5
"""How often a replica that must go looks whether its requests have ended."""


def build_app(args: Mapping[str, Any]) -> Application:
    """The application with the settings `args` (see
    :class:`~nestedfp.deployments.config.DeploymentSettings`).

    Raises :class:`~nestedfp.policies.checks.InvalidField` where a setting cannot be used.
    """
    settings = DeploymentSettings.from_dict(args)
    replicas = settings.replicas
    number: dict[str, Any] = {"num_replicas": settings.replicas_at_start}
    if settings.autoscaling is not None:
        number = {"autoscaling_config": autoscaling_config(settings)}
    deployment: Any = EngineReplica
    application: Application = deployment.options(
        **number,
        ray_actor_options={
            "num_cpus": replicas.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": settings.environment},
        },
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=replicas.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=settings.http.retry_after_s),
        health_check_period_s=replicas.health_check_period_s,
        health_check_timeout_s=replicas.health_check_timeout_s,
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=min(_IDLE_CHECK_S, replicas.graceful_shutdown_timeout_s),
        max_constructor_retry_count=replicas.start_attempts,
        request_router_config=RequestRouterConfig(
            request_router_class=PrecisionRouter,  # type: ignore[arg-type]
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,  # type: ignore[arg-type]
        ),
    ).bind(settings.to_dict())
    return application
