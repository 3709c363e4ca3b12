"""Whether a load grows, told from its recent past so that noise does not count as growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

BUCKET_S: Final = 10.0
"""Values within so long are averaged: a point of the line."""
POINTS: Final = 18
"""The line goes through so many of the latest points, and is not drawn through fewer."""
MOST_GROWTH: Final = 2.0
"""A line of three minutes says little about more than this."""
_DEVIATIONS: Final = 2.0
_MOST_ALIKE: Final = 0.9


class Point(NamedTuple):
    """What was seen within one bucket: its number, the sum of the values and how many."""

    bucket: int
    total: float
    values: int


@dataclass(frozen=True, slots=True)
class Trend:
    """The latest points of one quantity. Times are in seconds of one clock."""

    points: tuple[Point, ...] = ()

    def seen(self, value: float, now: float) -> Trend:
        """With one more value; where the clock was set back or a bucket is missing, begun anew."""
        bucket = math.floor(now / BUCKET_S)
        last = self.points[-1] if self.points else None
        if last is not None and bucket == last.bucket:
            return Trend((*self.points[:-1], Point(bucket, last.total + value, last.values + 1)))
        kept = self.points[-POINTS:] if last is not None and bucket == last.bucket + 1 else ()
        return Trend((*kept, Point(bucket, value, 1)))

    def growth(self, ahead_s: float) -> float:
        """The factor, 1 to ``MOST_GROWTH``, by which the quantity will have grown in ``ahead_s``.

        Least squares through the complete buckets; of the slope, two standard errors less count, so that a
        load which only varies is seldom taken for one that grows. 1 until there are enough of them.
        """
        complete = [point.total / point.values for point in self.points[:-1]]
        if len(complete) < POINTS:
            return 1.0
        level, slope = _line(complete)
        if level <= 0.0 or slope <= 0.0:
            return 1.0
        return min(MOST_GROWTH, 1.0 + slope * ahead_s / BUCKET_S / level)


def _line(values: Sequence[float]) -> tuple[float, float]:
    """The line's last value, and its slope a point less two standard errors.

    Where the deviations of neighbours are alike there is less to learn from as many: by their correlation r,
    the error is the larger by sqrt((1 + r) / (1 - r)).
    """
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((place - middle) ** 2 for place in range(count))
    slope = sum((place - middle) * (value - mean) for place, value in enumerate(values)) / spread
    rest = [value - mean - slope * (place - middle) for place, value in enumerate(values)]
    squares = sum(deviation**2 for deviation in rest)
    alike = sum(before * after for before, after in pairwise(rest)) / squares if squares > 0.0 else 0.0
    r = min(_MOST_ALIKE, max(0.0, alike))
    error = math.sqrt(squares / (count - 2) / spread * (1 + r) / (1 - r))
    return mean + slope * middle, slope - _DEVIATIONS * error
