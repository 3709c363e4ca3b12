"""What a replica knows about its recent requests: arrivals, TTFT and TPOT over a short window."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from nestedfp.policies.config import Slo
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.vllm.status import EngineStatus

ARRIVAL_WINDOW_S: Final = 5.0


class _Seen(NamedTuple):
    """A value, and when it was seen."""

    at_s: float
    value: float


class RequestWindow:
    """Recent arrivals and latencies; all durations in seconds, `clock` monotonic.

    Rates are those of the last :data:`ARRIVAL_WINDOW_S` seconds, or of the window where that is shorter.

    Written from the engine's output loop on every step, so each call costs time proportional to what it adds.
    """

    def __init__(self, window_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._arrival_window_s = min(window_s, ARRIVAL_WINDOW_S)
        self._clock = clock
        self._started_s = clock()
        self._arrivals: deque[_Seen] = deque()
        self._prompt_tokens: deque[_Seen] = deque()
        self._ttft_s: deque[_Seen] = deque()
        self._tpot_s: deque[_Seen] = deque()
        self._step_itl_s: deque[_Seen] = deque()

    def arrived(self) -> None:
        self._add(self._arrivals, (1.0,))

    def prompts_arrived(self, tokens: int) -> None:
        """Prompt tokens became known: at arrival, or with vLLM at the first token."""
        self._add(self._prompt_tokens, (float(tokens),))

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Takes the statistics of one engine step, as vLLM's stat loggers get them."""
        if iteration_stats is None:
            return
        if iteration_stats.num_prompt_tokens:
            self.prompts_arrived(iteration_stats.num_prompt_tokens)
        self._add(self._ttft_s, iteration_stats.time_to_first_tokens_iter)
        finished = [
            request for request in iteration_stats.finished_requests if request.num_generation_tokens > 1
        ]
        self._add(self._tpot_s, [request.mean_time_per_output_token for request in finished])
        intervals = iteration_stats.inter_token_latencies_iter
        if intervals:
            self._add(self._step_itl_s, (sum(intervals) / len(intervals),))

    def arrivals_per_s(self) -> float:
        """Requests per second, lately or since the start where that is shorter (at least 1 s)."""
        return len(self._arrived(self._arrivals)) / self._span_s()

    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens per second over the same time."""
        return sum(self._arrived(self._prompt_tokens)) / self._span_s()

    def ttft_s(self, percent: float) -> float | None:
        """That percentile of TTFT over the window; None where no first token fell into it."""
        return percentile(self._recent(self._ttft_s), percent)

    def tpot_s(self, percent: float) -> float | None:
        """TPOT over the window; None where no request gave two tokens in it.

        The larger of two: the percentile over finished requests, and the mean interval between tokens of all
        requests, which answers for those that still run.
        """
        finished = percentile(self._recent(self._tpot_s), percent)
        steps = self._recent(self._step_itl_s)
        known = [
            value for value in (finished, sum(steps) / len(steps) if steps else None) if value is not None
        ]
        return max(known, default=None)

    def miss_share(self, slo: Slo) -> float | None:
        """`slo_miss_share` of a report: the shares of the window's first tokens and of its ends over a
        limit of `slo`, together at most 1; None where there were none."""
        ttft_s, tpot_s = self._recent(self._ttft_s), self._recent(self._tpot_s)
        if not ttft_s and not tpot_s:
            return None
        late = sum(value > slo.ttft_s for value in ttft_s) / max(1, len(ttft_s))
        slow = sum(value > slo.tpot_s for value in tpot_s) / max(1, len(tpot_s))
        return min(1.0, late + slow)

    def _span_s(self) -> float:
        return min(self._arrival_window_s, max(1.0, self._clock() - self._started_s))

    def _arrived(self, series: deque[_Seen]) -> list[float]:
        since_s = self._clock() - self._arrival_window_s
        return [seen.value for seen in series if seen.at_s >= since_s]

    def _add(self, series: deque[_Seen], values: Iterable[float]) -> None:
        now = self._clock()
        series.extend(_Seen(now, value) for value in values)
        self._drop_old(series, now)

    def _recent(self, series: deque[_Seen]) -> list[float]:
        self._drop_old(series, self._clock())
        return [seen.value for seen in series]

    def _drop_old(self, series: deque[_Seen], now: float) -> None:
        while series and series[0].at_s < now - self._window_s:
            series.popleft()


def report_signals(
    window: RequestWindow,
    slo: Slo,
    status: EngineStatus | None,
    *,
    age_s: float,
) -> dict[str, Any]:
    """The signals of a report; without a `status` (`age_s` old) only what the window knows."""
    signals: dict[str, Any] = {
        "arrivals_per_s": window.arrivals_per_s(),
        "arriving_prompt_tokens_per_s": window.prompt_tokens_per_s(),
        "ttft_p90_s": window.ttft_s(slo.percentile),
        "tpot_p90_s": window.tpot_s(slo.percentile),
        "slo_miss_share": window.miss_share(slo),
    }
    if status is None:
        return signals
    tokens = status.batch_tokens.get(status.current)
    return {
        **signals,
        "batch_tokens": None if tokens is None else round(tokens),
        "running": status.running,
        "waiting": status.waiting,
        "waiting_prompt_tokens": status.waiting_prompt_tokens,
        "oldest_waiting_s": status.oldest_waiting_s,
        "kv_usage": status.kv_usage,
        "step_time_s": status.step_time_s.get(status.current),
        "tokens_fp16": status.tokens.get(FP16, 0),
        "tokens_fp8": status.tokens.get(FP8, 0),
        "flips": status.flips,
        "strict_running": status.strict_running,
        "context_tokens": status.context_tokens,
        "age_s": age_s,
    }


def percentile(values: list[float], percent: float) -> float | None:
    """The smallest value that at least `percent` per cent of the values do not exceed; None for no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100.0) - 1)]
