"""The joint scaling rule as Ray Serve's autoscaling policy of the deployment.

Serve's controller calls :class:`JointScaling` several times a second with what replicas have published; the
rule itself is `nestedfp.policies.autoscaling`. Serve would delay a change until it has been asked for without
a break; the rule has delays of its own and asks once, so Serve's are zero.

Points are dated by their replica's clock, which may be far from the controller's: a replica is fresh while it
keeps publishing new ones, whatever their dates say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from nestedfp.deployments.config import DeploymentSettings
from nestedfp.policies.autoscaling import STATS, ScalingConfig, ScalingState, desired_replicas
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.roofline import latency_model

_STALE_INTERVALS: Final = 5.0
"""A replica that has published nothing for so many intervals is not counted on."""
_WINDOW_INTERVALS: Final = 10.0
"""How many intervals of facts Serve keeps."""

Metrics = Mapping[str, Mapping[Any, Sequence[Any]]]
"""Serve's: name -> replica -> points with `timestamp` (Unix seconds of the replica) and `value`."""

logger = logging.getLogger("ray.serve")


class Heard(NamedTuple):
    """The newest point of a replica: its date, and when it was first seen by the controller's clock."""

    point_s: float
    seen_s: float


class JointScaling:
    """Called by Serve with an `AutoscalingContext`; answers with the number of replicas and what to remember.

    Made by Serve from plain values: the rule's settings, the policy's, and the age in seconds from which a
    replica's facts are stale. Between calls everything is kept in Serve's policy state.
    """

    def __init__(self, scaling: Mapping[str, Any], policy: Mapping[str, Any], stale_s: float) -> None:
        self._config = ScalingConfig(**scaling)
        settings = PolicyConfig.from_dict(policy)
        self._slo = settings.slo
        self._model = settings.latency or latency_model()
        self._stale_s = stale_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now = time.time() if context.current_time is None else context.current_time
        metrics, before = context.raw_metrics or {}, context.policy_state
        heard = heard_of(metrics, before.get("heard", {}), now)
        rows = latest_rows(metrics, heard, now, self._stale_s)
        scaling, state = desired_replicas(
            rows,
            ScalingState(**before.get("scaling", {})),
            current=context.target_num_replicas,
            # One that says nothing does not serve as far as is known.
            starting=max(0, context.target_num_replicas - len(rows)),
            config=self._config,
            slo=self._slo,
            model=self._model,
            now=now,
        )
        name = f"{context.app_name}/{context.deployment_name}"
        if scaling.replicas != context.target_num_replicas:
            change = f"{context.target_num_replicas} -> {scaling.replicas}"
            logger.info("%s: replicas wanted: %s, %s", name, change, scaling.reason)
        return scaling.replicas, {
            "scaling": {field: getattr(state, field) for field in ScalingState.__dataclass_fields__},
            "reason": scaling.reason,
            "heard": heard,
            "silence": None if rows else self._silence(name, context, now),
        }

    def _silence(self, name: str, context: AutoscalingContext, now: float) -> dict[str, Any] | None:
        """Since when the replicas that run have published nothing usable, and whether that was told."""
        running = context.current_num_replicas
        if not running:
            return None
        before = context.policy_state.get("silence") or {"since_s": now, "told": False}
        since_s, told = min(before["since_s"], now), before["told"]
        # Those that have just started may not have published yet.
        if told or now - since_s <= self._stale_s:
            return {"since_s": since_s, "told": told}
        message = "%s: no usable reports from %d running replicas for %g s: their number stays as it is"
        logger.warning(message, name, running, self._stale_s)
        return {"since_s": since_s, "told": True}


def heard_of(metrics: Metrics, before: Mapping[Any, Heard], now: float) -> dict[Any, Heard]:
    """The newest point of each replica; one known from `before` was first seen then."""
    heard: dict[Any, Heard] = {}
    for replica, points in metrics.get(STATS[0], {}).items():
        if not points:
            continue
        known, newest_s = before.get(replica), points[-1].timestamp
        seen_s = known.seen_s if known is not None and known.point_s == newest_s else now
        # The controller's own clock may be set back: that must not keep a silent replica fresh for as long.
        heard[replica] = Heard(newest_s, min(seen_s, now))
    return heard


def latest_rows(
    metrics: Metrics, heard: Mapping[Any, Heard], now: float, stale_s: float
) -> list[dict[str, float]]:
    """The newest published facts of each replica; replicas with none, or without a new point for more than
    `stale_s`, are left out.
    """
    rows: list[dict[str, float]] = []
    for replica, newest in heard.items():
        series = {name: metrics.get(name, {}).get(replica) for name in STATS}
        if now - newest.seen_s <= stale_s and all(series.values()):
            rows.append({name: found[-1].value for name, found in series.items() if found})
    return rows


def autoscaling_config(settings: DeploymentSettings) -> AutoscalingConfig:
    """What Serve needs to scale the deployment of `settings` by the rule."""
    autoscaling = settings.autoscaling
    if autoscaling is None:
        raise InvalidField("autoscaling", None, "give at least min_replicas and max_replicas")
    # No initial_replicas: Serve would go back to them whenever anything of the deployment changes.
    return AutoscalingConfig(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas,
        metrics_interval_s=autoscaling.interval_s,
        look_back_period_s=_WINDOW_INTERVALS * autoscaling.interval_s,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=JointScaling,
            policy_kwargs={
                "scaling": autoscaling.scaling,
                "policy": settings.policy.to_dict(),
                "stale_s": _STALE_INTERVALS * autoscaling.interval_s,
            },
        ),
    )
