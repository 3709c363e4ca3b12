"""Which plan a step runs under: the target, strict requests, and the choice inside `auto`."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from nestedfp.policies.steps import CACHE, FIRST_TOKEN, IN_TIME, PACE, StepTerms, StepWork, cut
from nestedfp.policies.steps import choose as choose_within
from nestedfp.precision import Precision
from nestedfp.vllm.choice import Choice, Limits, StepFacts, choose
from nestedfp.vllm.plan import AUTO
from nestedfp.vllm.settings import Settings

_FP16, _FP8 = Precision.FP16.value, Precision.FP8.value
_REASONS = {
    PACE: "auto: 16 bits would compute {:.0f} tokens before a request falls behind its pace",
    FIRST_TOKEN: "auto: in FP8 a first token would come after {:.3f} s",
    CACHE: "auto: the KV cache is nearly full",
    IN_TIME: "auto: all is in time in 16 bits",
}


class BoundedStep(NamedTuple):
    """The most tokens of a step that is yet to be composed, and its precision where the bounds choose it."""

    tokens: int
    plan: str
    reason: str


class PlanSelection:
    """The target and the requests that insist on 16 bits. Lives in the scheduler; not thread-safe."""

    def __init__(self, settings: Settings, *, prompts_split: bool = True) -> None:
        """`prompts_split`: steps may be cut. Else bounds choose the precision alone, of whole steps."""
        self._settings = settings
        self._prompts_split = prompts_split
        self._limits = settings.limits
        self._choice = Choice()
        self._strict: set[str] = set()
        self.mode = settings.target
        self.epoch = 0
        self._reason = "target at start"

    @property
    def strict_count(self) -> int:
        return len(self._strict)

    @property
    def limits(self) -> Limits:
        return self._limits

    def set_target(
        self, mode: str, epoch: int, reason: str = "", limits: Mapping[str, Any] | None = None
    ) -> None:
        """Takes a target; ValueError for an unknown mode, a bad limit, and an epoch that has passed.

        A target is whole: `limits` overrides the configured ones until the next target, of whatever mode, and
        one without brings the configured ones back. The same target again, limits included, changes nothing.
        """
        self._settings.check_mode(mode)
        if not isinstance(epoch, int):
            raise ValueError(f"epoch is {epoch!r}, expected a whole number")
        if not isinstance(limits, Mapping | None):
            raise ValueError(f"limits is {limits!r}, expected a mapping from names to numbers")
        if epoch < self.epoch:
            raise ValueError(f"epoch is {epoch}, but {self.epoch} is already in force; read the status first")
        limits_now = self._settings.limits.override(limits or {})
        if mode != self.mode:
            self._choice = Choice()
        self.mode, self.epoch, self._limits = mode, epoch, limits_now
        self._reason = f"target {mode}: {reason}" if reason else f"target {mode}"

    def pin(self, request_id: str) -> None:
        """Every step that holds this request runs in 16 bits."""
        self._strict.add(request_id)

    def unpin(self, request_ids: Iterable[str]) -> None:
        if self._strict:
            self._strict.difference_update(request_ids)

    def bound(
        self,
        work: StepWork,
        terms: Callable[[str], StepTerms],
        request_ids: Iterable[str],
        queue: Iterable[tuple[str, int]] = (),
    ) -> BoundedStep | None:
        """What the next step may be, before it is composed; None where no bounds hold.

        `terms` gives those of a precision, `request_ids` are those of the batch, `queue` the ids that wait
        and their tokens, both part of `work`. A plan in between is taken to be as slow as 16 bits.

        An FP8 step that would reach a strict request of the queue is no larger than a 16-bit one: what vLLM
        admits, and so the precision, shows only once it is composed. What the prefix cache holds counts as
        not computed, so that a step may reach further than this tells.
        """
        if self._limits.steps is None:
            return None
        bounds = self._limits.steps.bounds
        if not self._prompts_split:
            bounds = bounds._replace(least_tokens=math.inf)
        slow, fast = terms(_FP16), terms(_FP8)
        if self._strict and not self._strict.isdisjoint(request_ids):
            return BoundedStep(cut(bounds, slow, work), _FP16, "strict request in the step")
        if self.mode != AUTO:
            given = fast if self.mode == _FP8 else slow
            bounded = BoundedStep(cut(bounds, given, work), self.mode, self._reason)
        else:
            tokens, cause, value = choose_within(bounds, slow, fast, work)
            plan = _FP16 if cause == IN_TIME else _FP8
            bounded = BoundedStep(tokens, plan, _REASONS[cause].format(value))
        if bounded.plan == _FP8 and self._reaches_strict(bounded.tokens, work, queue):
            return bounded._replace(tokens=min(bounded.tokens, cut(bounds, slow, work)))
        return bounded

    def _reaches_strict(self, tokens: int, work: StepWork, queue: Iterable[tuple[str, int]]) -> bool:
        """Whether a step of `tokens` has room for the queue up to its first strict request."""
        if not self._strict:
            return False
        waiting = list(queue)
        queued = sum(left for _, left in waiting)
        room = tokens - work.decodes - (sum(work.prompt_tokens) - queued)
        for request_id, left in waiting:
            if room <= 0:
                return False
            if request_id in self._strict:
                return True
            room -= left
        return False

    def select(
        self,
        request_ids: Mapping[str, int],
        facts: Callable[[], StepFacts],
        bounded: BoundedStep | None = None,
    ) -> tuple[str, str]:
        """The plan of the step that holds `request_ids`, and the reason.

        `bounded` is what it was bounded by, if it was. `facts` is asked only in `auto` without bounds.
        """
        if bounded is not None:
            plan, reason = bounded.plan, bounded.reason
        elif self.mode == AUTO:
            self._choice = choose(facts(), self._choice, self._limits)
            plan, reason = (_FP8 if self._choice.fp8 else _FP16), self._choice.reason
        else:
            plan, reason = self.mode, self._reason
        if plan != _FP16 and self._strict and not self._strict.isdisjoint(request_ids):
            return _FP16, "strict request in the step"
        return plan, reason
