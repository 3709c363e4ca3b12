"""What travels with a step: the tag from scheduler to workers, the report back."""

from dataclasses import dataclass

TAG = "nestedfp_tag"
"""Attribute of vLLM's `SchedulerOutput` that holds the step's `StepTag`."""

REPORT = "nestedfp_report"
"""Attribute of vLLM's `ModelRunnerOutput` that holds the step's `StepReport`."""


@dataclass(frozen=True)
class StepTag:
    """The plan every rank runs this step under, why, and when the step was scheduled (monotonic s)."""

    plan: str
    reason: str
    scheduled_at: float


@dataclass(frozen=True)
class StepReport:
    """What the worker did: the plan that was in force, the time of a flip (None without one), and the
    number of layers that ran something else (None where steps are not checked). `loads` grows with each
    reload of weights, after which the worker's facts may be others."""

    plan: str
    flip_seconds: float | None
    mismatches: int | None
    loads: int = 0
