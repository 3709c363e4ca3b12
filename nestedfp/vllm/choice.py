"""The choice between FP16 and FP8 for one step, while the target is `auto`. Pure.

The policy decides the mode in tenths of a second from what clients see; inside `auto` the scheduler
answers within one step to what it alone sees first: the step's own size, its queue, its KV cache, and how
far each running request is.

Two rules. By default thresholds with hysteresis on size, queue and cache. Where the policy sends a
`pace_s`, FP8 is spent only on the steps that need it: those that in 16 bits would leave a running request
further than `debt_s` behind its pace, and those that meet a queue or a prompt that has waited too long.
What is lost, with a first token later than `late_s`, is not among the facts and needs none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

PACE_LIMITS = (
    "pace_s",
    "memory_pace_s",
    "debt_s",
    "queue_tokens",
    "wait_s",
    "late_s",
    "overhead_s",
    "weights_s",
    "token_s",
    "sequence_s",
    "waiting_prompt_tokens",
)
"""Limits that the policy's controllers send."""


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
    pace_s: float = 0.0
    """Mean time per output token that every running request is kept to; 0: the marks above decide."""
    memory_pace_s: float = float("inf")
    """The same for steps bound by reading the weights, if that is less: FP8 gains most for a token there."""
    debt_s: float = 0.0
    """What a request may be behind its pace."""
    queue_tokens: float = float("inf")
    """Queued prompt tokens from which on steps are in FP8."""
    wait_s: float = float("inf")
    """Age of the oldest prompt without a first token from which on steps are in FP8."""
    late_s: float = float("inf")
    """Age from which on a request without a first token is lost, and asks for nothing."""
    overhead_s: float = 0.0
    weights_s: float = 0.0
    token_s: float = 0.0
    sequence_s: float = 0.0
    """A 16-bit step takes overhead + max(weights, tokens * token) + requests * sequence."""
    waiting_prompt_tokens: float = float("inf")
    """Bound of the queue, above which the replica refuses requests; not the scheduler's concern."""

    def __post_init__(self) -> None:
        for name in PACE_LIMITS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"limits: {name} is {getattr(self, name)}, expected at least 0")
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
    running: Sequence[tuple[int, float]] = ()
    """Of each request that decodes and is not lost: output tokens and seconds since it was first seen."""
    waiting_prompt_tokens: int = 0
    """Of the queue, unless all of it is lost."""
    oldest_wait_s: float = 0.0
    """Age of the oldest prompt without a first token, in such a queue or, unless it is lost, in the step."""


@dataclass(frozen=True)
class Choice:
    """The precision chosen, the steps it has been kept for, and what crossed a mark to bring it about."""

    fp8: bool = False
    steps: int = 0
    reason: str = "auto: start"


def choose(facts: StepFacts, last: Choice, limits: Limits) -> Choice:
    """The choice for this step, given the one for the step before."""
    if limits.pace_s > 0:
        reason = _behind(facts, limits)
        fp8 = reason is not None
        steps = last.steps + 1 if fp8 == last.fp8 else 1
        return Choice(fp8, steps, reason or "auto: every request keeps its pace in 16 bits")
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


def _behind(facts: StepFacts, limits: Limits) -> str | None:
    """Which limit a 16-bit step would break; None if it would break none."""
    if facts.kv_usage >= limits.kv_high:
        return f"auto: kv_usage {facts.kv_usage:.6g} >= {limits.kv_high:.6g}"
    if facts.waiting_prompt_tokens >= limits.queue_tokens:
        return f"auto: waiting_prompt_tokens {facts.waiting_prompt_tokens} >= {limits.queue_tokens:.6g}"
    if facts.oldest_wait_s >= limits.wait_s:
        return f"auto: oldest_wait_s {facts.oldest_wait_s:.3f} >= {limits.wait_s:.6g}"
    step_s = limits.overhead_s + max(limits.weights_s, facts.tokens * limits.token_s)
    step_s += len(facts.running) * limits.sequence_s
    memory_bound = facts.tokens * limits.token_s < limits.weights_s
    pace_s = min(limits.pace_s, limits.memory_pace_s) if memory_bound else limits.pace_s
    for made, since_s in facts.running:
        if since_s + step_s > (made + 1) * pace_s + limits.debt_s:
            return f"auto: {made} tokens in {since_s:.3f} s, behind a pace of {pace_s:.4g} s"
    return None
