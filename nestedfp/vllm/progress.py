"""What there is to do and how far it is, for the bounds of the next step. Pure."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from nestedfp.policies.steps import StepBounds, StepTerms, StepWork, pace_of


class Progress:
    """When each decoding request was first seen, and with how many tokens. Lives in the scheduler.

    Counting starts when the request is first seen to decode under bounds: what came before is not known, and
    not held against anyone. One that is seen with its first token alone is lost if that is late.
    """

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int] | None] = {}
        """None for a request that is lost."""

    def work(
        self,
        running: Sequence[Any],
        waiting: Iterable[Any],
        bounds: StepBounds,
        fast: StepTerms,
        *,
        now: float,
        wall: float,
        ahead_s: float,
        most_tokens: int,
        crowded: bool,
    ) -> StepWork:
        """What the requests of vLLM's scheduler ask of the next step, which starts in `ahead_s`.

        `fast` are the terms of FP8. `now` is monotonic, `wall` Unix seconds. Tokens that are still in flight
        count as made by then. What the prefix cache holds of a queued prompt is not known yet, and counts as
        not computed.
        """
        context = sum([request.num_computed_tokens for request in running])
        pace_s, tpot_s = pace_of(bounds, fast, len(running), context), bounds.tpot_s
        pace_left_s = slo_left_s = math.inf
        prompts: list[tuple[float, float, float]] = []
        decodes = 0
        start_s, start_wall_s = now + ahead_s, wall + ahead_s
        started = self._started
        # Runs before every step, over every request: nothing here is called that need not be.
        for request in running:
            computed = request.num_computed_tokens
            left = request.num_prompt_tokens - computed
            if left > 0:
                prompts.append((left, computed, _age(request, start_wall_s)))
                continue
            decodes += 1
            made = request.num_output_tokens
            if not made:
                # Its first token is still in flight.
                continue
            key = request.request_id
            if key not in started:
                late = made == 1 and wall - request.arrival_time > bounds.late_s
                started[key] = None if late else (now, made)
            start = started[key]
            if start is None:
                continue
            made += getattr(request, "num_output_placeholders", 0) + 1 - start[1]
            since_s = start_s - start[0]
            left_s = made * pace_s - since_s
            if left_s < pace_left_s:
                pace_left_s = left_s
            left_s = made * tpot_s - since_s
            if 0.0 < left_s < slo_left_s:
                slo_left_s = left_s
        for request in waiting:
            left = request.num_tokens - request.num_computed_tokens
            if left > 0:
                prompts.append((left, request.num_computed_tokens, _age(request, start_wall_s)))
        tokens, contexts, ages = zip(*prompts, strict=True) if prompts else ((), (), ())
        return StepWork(
            pace_left_s=pace_left_s,
            slo_left_s=slo_left_s,
            prompt_tokens=tokens,
            prompt_context=contexts,
            prompt_age_s=ages,
            decodes=decodes,
            requests=len(running),
            context=context,
            most_tokens=most_tokens,
            crowded=crowded,
        )

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._started.pop(request_id, None)

    def clear(self) -> None:
        """No bounds hold any more."""
        self._started.clear()


def _age(request: Any, start_s: float) -> float:
    """How long its first token will have been waited for; nobody waits for one that was preempted."""
    return -math.inf if request.num_output_tokens else max(0.0, start_s - request.arrival_time)
