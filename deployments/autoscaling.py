"""The joint scaling rule as Ray Serve's autoscaling policy of the deployment.

Serve's controller calls :class:`JointScaling` several times a second with what replicas have published; the
rule itself is `nestedfp.policies.autoscaling`. Serve would delay a change until it has been asked for without
a break; the rule has delays of its own and asks once, so Serve's are zero.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

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
        rows = latest_rows(context.raw_metrics or {}, now, self._stale_s)
        remembered = context.policy_state.get("scaling", {})
        scaling, state = desired_replicas(
            rows,
            ScalingState(**remembered),
            current=context.target_num_replicas,
            # One that says nothing does not serve as far as is known.
            starting=max(0, context.target_num_replicas - len(rows)),
            config=self._config,
            slo=self._slo,
            model=self._model,
            now=now,
        )
        remember = {name: getattr(state, name) for name in ScalingState.__dataclass_fields__}
        return scaling.replicas, {"scaling": remember, "reason": scaling.reason}


def latest_rows(
    metrics: Mapping[str, Mapping[Any, Sequence[Any]]], now: float, stale_s: float
) -> list[dict[str, float]]:
    """The newest published facts of each replica; replicas with none, or with stale ones, are left out.

    `metrics` is Serve's: name -> replica -> points with `timestamp` (Unix seconds) and `value`.
    """
    rows: list[dict[str, float]] = []
    for replica, points in metrics.get(STATS[0], {}).items():
        if not points or abs(now - points[-1].timestamp) > stale_s:
            continue
        series = {name: metrics.get(name, {}).get(replica) for name in STATS}
        if all(series.values()):
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
