"""Which plan a step runs under: the target, strict requests, and the choice inside `auto`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nestedfp.precision import Precision
from nestedfp.vllm.choice import Choice, Limits, StepFacts, choose
from nestedfp.vllm.plan import AUTO
from nestedfp.vllm.settings import Settings

_FP16, _FP8 = Precision.FP16.value, Precision.FP8.value


class PlanSelection:
    """The target and the requests that insist on 16 bits. Lives in the scheduler; not thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
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
        """Takes a target; ValueError for an unknown mode or limit, and for an epoch that has passed.

        A repeated target changes nothing. `limits` holds until a target of another mode comes.
        """
        self._settings.check_mode(mode)
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

    def select(self, request_ids: Mapping[str, int], facts: Callable[[], StepFacts]) -> tuple[str, str]:
        """The plan of the step that holds `request_ids`, and the reason. `facts` is asked only in `auto`."""
        if self.mode == AUTO:
            self._choice = choose(facts(), self._choice, self._limits)
            plan, reason = (_FP8 if self._choice.fp8 else _FP16), self._choice.reason
        else:
            plan, reason = self.mode, self._reason
        if plan != _FP16 and self._strict and not self._strict.isdisjoint(request_ids):
            return _FP16, "strict request in the step"
        return plan, reason
