"""Which requests missed the SLO, and which of them would have met it without what 16-bit steps cost.

A request that FP8 loses as well says nothing against 16 bits. So a replica adds up what its 16-bit steps took
longer than FP8 would have (:class:`LostTime`), and takes from each time over its limit what was lost while it
ran (:func:`shares`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.latency import LatencyModel
from nestedfp.policies.protocol import FP8, FP16

Floats = NDArray[np.float64]

Steps = Mapping[str, Sequence[Sequence[float]]]
"""By mode, for each size class of steps, totals since the boot: steps, tokens, sequences, seconds."""

SAMPLES_KEPT: Final = 4096
_NONE_BEFORE: Final = (0.0, 0.0, 0.0, 0.0)


def shares(
    ttft_s: Floats,
    ttft_lost_s: Floats,
    tpot_s: Floats,
    tpot_lost_s: Floats,
    ttft_limit_s: float,
    tpot_limit_s: float,
) -> tuple[float, float]:
    """The share of requests over a limit, and of those that would have met it, had nothing been lost.

    ``*_lost_s`` is what 16-bit steps added to each time. NaN for both where there are no times. The simulator
    compiles it, so it calls nothing that is not compiled.
    """
    firsts, finished = ttft_s.size, tpot_s.size
    if firsts == 0 and finished == 0:
        return math.nan, math.nan
    late, slow = ttft_s > ttft_limit_s, tpot_s > tpot_limit_s
    late_cost = late & (ttft_s - ttft_lost_s <= ttft_limit_s)
    slow_cost = slow & (tpot_s - tpot_lost_s <= tpot_limit_s)
    missed = late.sum() / max(1, firsts) + slow.sum() / max(1, finished)
    cost = late_cost.sum() / max(1, firsts) + slow_cost.sum() / max(1, finished)
    return min(1.0, float(missed)), min(1.0, float(cost))


class LostTime:
    """What a replica's 16-bit steps took longer than FP8 would have, over time.

    :meth:`note` reads the engine's counts a few times a second; the engine itself only adds them up. Of the
    time that a 16-bit step took, the part is lost that ``model`` says FP8 saves. ``model`` is corrected by
    the steps seen, each mode by its own: before both have been seen, what one is off by counts for the other,
    so that a model of a faster machine does not call everything lost.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self._seen: set[str] = set()
        self._before: Steps | None = None
        # Points of a line: the time, what was lost by then, and since when requests had been queued.
        self._points: deque[tuple[float, float, float]] = deque(maxlen=SAMPLES_KEPT)

    @property
    def model(self) -> LatencyModel:
        """The model with what was learned so far."""
        return self._model

    def note(self, now: float, steps: Steps, *, context: float, queued_s: float) -> None:
        """Take over the counts at ``now``.

        ``context`` is the KV tokens of the running requests together, ``queued_s`` how long the queue has not
        been empty. The first call only begins the count.
        """
        before, self._before = self._before, steps
        total_s = self._points[-1][1] if self._points else 0.0
        if before is not None:
            total_s += sum(self._lost(mode, before, steps, context) for mode in (FP8, FP16) if mode in steps)
        flat = len(self._points) > 1 and self._points[-2][1] == total_s
        if flat:
            self._points.pop()
        self._points.append((now, total_s, now - queued_s))

    def within(self, ends: Floats, spans: Floats, *, queued: bool = False) -> Floats:
        """Seconds lost in each span of time that ended then.

        With ``queued`` a span that began behind a queue reaches back to where the queue began: what earlier
        requests had lost by then is waited for as well. What is older than what is kept counts as not lost.
        """
        if not self._points:
            return np.zeros_like(ends)
        at, lost, queue_began = np.array(self._points).T
        starts = ends - spans
        if queued:
            following = np.minimum(np.searchsorted(at, starts), len(at) - 1)
            starts = np.minimum(starts, queue_began[following])
        within: Floats = np.interp(ends, at, lost) - np.interp(starts, at, lost)
        return within

    def _lost(self, mode: str, before: Steps, steps: Steps, context: float) -> float:
        """Seconds lost in the steps of ``mode`` that are new, from which the model learns."""
        lost_s = 0.0
        earlier = before.get(mode, ())
        for place, totals in enumerate(steps[mode]):
            known = earlier[place] if place < len(earlier) else _NONE_BEFORE
            count, tokens, sequences, seconds = (now - was for now, was in zip(totals, known, strict=True))
            if count <= 0:
                continue
            batch = (tokens / count, sequences / count, context)
            self._learn(mode, float(self._model.of(mode).step_s(*batch)), seconds / count)
            if mode == FP16:
                fast, slow = (float(self._model.of(each).step_s(*batch)) for each in (FP8, FP16))
                lost_s += seconds * max(0.0, 1.0 - fast / slow) if slow > 0 else 0.0
        return lost_s

    def _learn(self, mode: str, predicted_s: float, measured_s: float) -> None:
        self._model = self._model.corrected(mode, predicted_s, measured_s)
        self._seen.add(mode)
        if self._seen == {mode}:
            alike = dict.fromkeys(self._model.costs, self._model.correction.get(mode, 1.0))
            self._model = replace(self._model, correction=alike)
