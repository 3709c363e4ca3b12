"""A clock that never runs backwards, for leases and dwell times."""

from __future__ import annotations

from collections.abc import Callable


class SteadyClock:
    """``clock`` (seconds) with every jump back taken out: what it would repeat counts as no time.

    A jump forwards, as after a suspension of the process, passes: leases end early and dwell times are over,
    both of which are safe. What it proves of the load is up to the controllers: no calm, if nothing was seen
    for longer than ``max_signal_age_s``.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._read_s = self._now_s = clock()

    def __call__(self) -> float:
        read_s = self._clock()
        self._now_s += max(0.0, read_s - self._read_s)
        self._read_s = read_s
        return self._now_s
