"""What a replica knows about its recent requests: arrivals, TTFT and TPOT over a short window."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any


class RequestWindow:
    """Recent arrivals and latencies; all durations in seconds, `clock` monotonic.

    Written from the engine's output loop on every step, so each call costs time proportional to what it adds.
    """

    def __init__(
        self, window_s: float, percentile: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._percentile = percentile
        self._clock = clock
        self._started_s = clock()
        self._arrivals: deque[tuple[float, float]] = deque()
        self._ttft_s: deque[tuple[float, float]] = deque()
        self._tpot_s: deque[tuple[float, float]] = deque()
        self._step_itl_s: deque[tuple[float, float]] = deque()

    def arrived(self) -> None:
        self._add(self._arrivals, (1.0,))

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Takes the statistics of one engine step, as vLLM's stat loggers get them."""
        if iteration_stats is None:
            return
        self._add(self._ttft_s, iteration_stats.time_to_first_tokens_iter)
        self._add(
            self._tpot_s,
            [
                request.mean_time_per_output_token
                for request in iteration_stats.finished_requests
                if request.num_generation_tokens > 1
            ],
        )
        intervals = iteration_stats.inter_token_latencies_iter
        if intervals:
            self._add(self._step_itl_s, (sum(intervals) / len(intervals),))

    def arrivals_per_s(self) -> float:
        """Requests per second over the window, or since the start where that is shorter (at least 1 s)."""
        span_s = min(self._window_s, max(1.0, self._clock() - self._started_s))
        return len(self._recent(self._arrivals)) / span_s

    def ttft_s(self) -> float | None:
        """The percentile of TTFT over the window; None where no first token fell into it."""
        return percentile(self._recent(self._ttft_s), self._percentile)

    def tpot_s(self) -> float | None:
        """TPOT over the window; None where no request gave two tokens in it.

        The larger of two: the percentile over finished requests, and the mean interval between tokens of all
        requests, which answers for those that still run.
        """
        finished = percentile(self._recent(self._tpot_s), self._percentile)
        steps = self._recent(self._step_itl_s)
        known = [
            value for value in (finished, sum(steps) / len(steps) if steps else None) if value is not None
        ]
        return max(known, default=None)

    def _add(self, series: deque[tuple[float, float]], values: Iterable[float]) -> None:
        now = self._clock()
        series.extend((now, value) for value in values)
        self._drop_old(series, now)

    def _recent(self, series: deque[tuple[float, float]]) -> list[float]:
        self._drop_old(series, self._clock())
        return [value for _, value in series]

    def _drop_old(self, series: deque[tuple[float, float]], now: float) -> None:
        while series and series[0][0] < now - self._window_s:
            series.popleft()


def percentile(values: list[float], percent: float) -> float | None:
    """The smallest value that at least `percent` per cent of the values do not exceed; None for no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100.0) - 1)]
