"""How long steps take, and when those in flight will have ended. Pure."""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from nestedfp.policies.latency import corrected_factor
from nestedfp.policies.steps import StepTerms


class _InFlight(NamedTuple):
    plan: str
    predicted_s: float
    scheduled_s: float


class StepTimes:
    """The terms of a step by precision, corrected by the steps that were seen, and the steps in flight.

    With asynchronous scheduling a step is composed while one or two before it run; the time until they end is
    time in which every request waits.
    """

    def __init__(self, terms: Mapping[str, StepTerms]) -> None:
        self.terms = terms
        """As given."""
        self.corrections: dict[str, float] = {}
        """Measured over given step times, by precision; of those that ran."""
        self._corrected = dict(terms)
        self._in_flight: deque[_InFlight] = deque()
        self._free_s = 0.0
        """When the engine is expected to have nothing in flight."""
        self._last_output_s = 0.0

    def of(self, plan: str) -> StepTerms:
        """The terms as corrected; those of 16 bits, the slower, for a plan in between."""
        return self._corrected.get(plan) or self._corrected["fp16"]

    def ahead_s(self, now: float) -> float:
        """How long the engine is still busy with what was scheduled."""
        return max(0.0, self._free_s - now) if self._in_flight else 0.0

    def scheduled(self, plan: str, tokens: int, requests: int, context: float, now: float) -> None:
        terms = self.of(plan)
        predicted_s = terms.overhead_s + max(terms.weights_s, tokens * terms.token_s)
        predicted_s += requests * terms.sequence_s + context * terms.context_token_s
        self._free_s = now + self.ahead_s(now) + predicted_s
        self._in_flight.append(_InFlight(plan, predicted_s, now))

    def finished(self, scheduled_s: float, now: float) -> None:
        """The step scheduled then has given its output; one from before there were bounds is not known."""
        began_s = max(scheduled_s, self._last_output_s)
        self._last_output_s = now
        if not self._in_flight or self._in_flight[0].scheduled_s != scheduled_s:
            return
        step = self._in_flight.popleft()
        took_s = now - began_s
        self._free_s = now + sum(each.predicted_s for each in self._in_flight)
        # A plan in between says nothing of either precision.
        if step.plan in self.terms and step.predicted_s > 0.0 and took_s > 0.0:
            before = self.corrections.get(step.plan, 1.0)
            factor = self.corrections[step.plan] = corrected_factor(before, step.predicted_s, took_s)
            self._corrected[step.plan] = StepTerms(*(factor * term for term in self.terms[step.plan]))
