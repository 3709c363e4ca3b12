"""The choice between FP16 and FP8 for one step, while the target is `auto`. Pure.

The policy decides the mode in tenths of a second from what clients see; inside `auto` the scheduler
answers within one step to what it alone sees first: the step's own size, its queue and its KV cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self


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
    """Share of the KV-cache blocks in use."""
    kv_low: float = 0.75
    min_steps: int = 16
    """Steps that a choice is kept at least before the engine returns to FP16."""

    def __post_init__(self) -> None:
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
        known = {f.name for f in fields(self)}
        for name, value in data.items():
            if name not in known:
                raise ValueError(f"limits: unknown name {name!r}, expected one of {sorted(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"limits: {name} is {value!r}, expected a number")
        return replace(self, **data)


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
    """The choice for this step, given the one for the step before."""
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
