"""The joint rule with the state that it keeps, and rows of what replicas publish."""

from __future__ import annotations

from collections.abc import Mapping

from nestedfp.policies.autoscaling import Scaling, ScalingConfig, ScalingState, desired_replicas
from nestedfp.policies.config import Slo
from nestedfp.policies.roofline import latency_model

CONFIG = ScalingConfig(
    min_replicas=1,
    max_replicas=8,
    overload_s=5.0,
    fp8_patience_s=60.0,
    spare_s=100.0,
    start_patience_s=400.0,
    headroom=0.7,
)
MODEL = latency_model()
IDLE = {
    "in_fp8": 0.0,
    "fixed": 0.0,
    "mode_s": 10.0,
    "strain": 0.1,
    "prompt_per_s": 500.0,
    "decode_per_s": 100.0,
    "prompt_tokens": 1000.0,
    "context": 800.0,
}
BUSY = {**IDLE, "prompt_per_s": 17_000.0, "decode_per_s": 2_000.0}
FP8 = {**BUSY, "in_fp8": 1.0, "strain": 0.5}
OVER = {**FP8, "strain": 2.0, "prompt_per_s": 30_000.0}
STUCK = {**OVER, "in_fp8": 0.0, "fixed": 1.0, "strain": 50.0}


class Rule:
    def __init__(self) -> None:
        self.state = ScalingState()

    def at(
        self, now: float, rows: list[Mapping[str, float]], current: int | None = None, starting: int = 0
    ) -> Scaling:
        wanted, self.state = desired_replicas(
            rows,
            self.state,
            current=len(rows) if current is None else current,
            starting=starting,
            config=CONFIG,
            slo=Slo(),
            model=MODEL,
            now=now,
        )
        return wanted
