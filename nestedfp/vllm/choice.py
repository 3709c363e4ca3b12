"""Which precision a step has while the target is `auto`: the limits, and the rule without a policy. Pure.

Where the policy sends the bounds of steps, these decide (`nestedfp.policies.steps`). Without them, thresholds
with hysteresis on the step's size, the queue and the KV cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from nestedfp.policies.steps import LIMIT_NAMES, StepBounds, StepTerms, from_limits


@dataclass(frozen=True)
class BoundedSteps:
    """The bounds of steps, and what a step costs in either precision before the engine's own steps tell."""

    bounds: StepBounds
    terms: Mapping[str, StepTerms]

    @classmethod
    def from_dict(cls, data: Mapping[str, float]) -> Self:
        """From the names of `LIMIT_NAMES`; ValueError if one lacks."""
        missing = [name for name in LIMIT_NAMES if name not in data]
        if missing:
            raise ValueError(
                f"limits: {missing[0]} is not given, but {next(iter(data))} is; give all or none"
            )
        return cls(*from_limits(data))


@dataclass(frozen=True)
class Limits:
    """Thresholds with hysteresis: FP8 from any high mark up, FP16 once every signal is below its low mark."""

    tokens_high: int = 1024
    """Scheduled tokens of the step."""
    tokens_low: int = 256
    waiting_high: int = 4
    """Requests in the queue."""
    waiting_low: int = 1
    kv_high: float = 0.90
    """Share of the KV-cache blocks in use; holds under bounds as well."""
    kv_low: float = 0.75
    min_steps: int = 16
    """Steps that a choice is kept at least before the engine returns to FP16."""
    waiting_prompt_tokens: float = float("inf")
    """Bound of the queue, above which the replica refuses requests; not the scheduler's concern."""
    steps: BoundedSteps | None = None
    """Given by the flat names of its parts. In any mode it bounds the size of steps; in `auto` it decides in
    place of the marks."""

    def __post_init__(self) -> None:
        if not self.waiting_prompt_tokens >= 0:
            raise ValueError(
                f"limits: waiting_prompt_tokens is {self.waiting_prompt_tokens}, expected at least 0"
            )
        for signal in ("tokens", "waiting", "kv"):
            low, high = getattr(self, f"{signal}_low"), getattr(self, f"{signal}_high")
            if not 0 <= low <= high:
                raise ValueError(
                    f"limits: {signal}_low {low} and {signal}_high {high}, expected 0 <= low <= high"
                )
        if self.min_steps < 1:
            raise ValueError(f"limits: min_steps is {self.min_steps}, expected at least 1")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Defaults for what `data` leaves out; raises ValueError for an unknown name or a bad value."""
        return cls().override(data)

    def override(self, data: Mapping[str, Any]) -> Self:
        marks = {f.name for f in fields(self)} - {"steps"}
        for name, value in data.items():
            if name not in marks and name not in LIMIT_NAMES:
                known = sorted([*marks, *LIMIT_NAMES])
                raise ValueError(f"limits: unknown name {name!r}, expected one of {known}")
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"limits: {name} is {value!r}, expected a number")
            if name in LIMIT_NAMES and value < 0:
                raise ValueError(f"limits: {name} is {value}, expected at least 0")
        changed: dict[str, Any] = {name: value for name, value in data.items() if name in marks}
        bounds = {name: float(value) for name, value in data.items() if name in LIMIT_NAMES}
        if bounds:
            changed["steps"] = BoundedSteps.from_dict(bounds)
        return replace(self, **changed)


@dataclass(frozen=True)
class StepFacts:
    """What the scheduler knows about the step it has just composed."""

    tokens: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True)
class Choice:
    """The precision chosen, the steps it has been kept for, and what crossed a mark to bring it about."""

    fp8: bool = False
    steps: int = 0
    reason: str = "auto: start"


def choose(facts: StepFacts, last: Choice, limits: Limits) -> Choice:
    """The choice by the marks for this step, given the one for the step before."""
    signals = (
        ("tokens", facts.tokens, limits.tokens_low, limits.tokens_high),
        ("waiting", facts.waiting, limits.waiting_low, limits.waiting_high),
        ("kv_usage", facts.kv_usage, limits.kv_low, limits.kv_high),
    )
    if not last.fp8:
        for name, value, _, high in signals:
            if value >= high:
                return Choice(True, 1, f"auto: {name} {value:.6g} >= {high:.6g}")
    elif last.steps >= limits.min_steps and all(value < low for _, value, low, _ in signals):
        return Choice(False, 1, "auto: tokens, waiting and kv_usage below their low marks")
    return replace(last, steps=last.steps + 1)
