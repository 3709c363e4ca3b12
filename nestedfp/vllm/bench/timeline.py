"""What kernels add to the time of a step where one starts before the last has ended."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any, NamedTuple


class Span(NamedTuple):
    """One run of a kernel, in microseconds on the device's clock."""

    name: str
    start: float
    end: float


def added_time(spans: Iterable[Span], steps: int, most: int) -> dict[str, Any]:
    """`total`, the microseconds a step in which any kernel ran; `idle`, those between them; and `kernels`: of
    the `most` names with the largest share, `us` a step and `launches` a step.

    A moment belongs to that kernel, of all that run then, which ends first. So shares add up to the total,
    and a kernel that starts early and waits for the one before (programmatic dependent launch) has what it
    takes behind that one's end.
    """
    waiting = sorted(spans, key=lambda span: span.start, reverse=True)
    launches = Counter(span.name for span in waiting)
    added: defaultdict[str, float] = defaultdict(float)
    running: list[tuple[float, str]] = []
    idle = 0.0
    for moment, following in pairwise(sorted({time for span in waiting for time in span[1:]})):
        while waiting and waiting[-1].start <= moment:
            span = waiting.pop()
            heappush(running, (span.end, span.name))
        while running and running[0][0] <= moment:
            heappop(running)
        if running:
            added[running[0][1]] += following - moment
        else:
            idle += following - moment
    longest = sorted(added, key=lambda name: -added[name])[:most]
    return {
        "total": sum(added.values()) / steps,
        "idle": idle / steps,
        "kernels": [
            {"name": name[:90], "us": added[name] / steps, "launches": launches[name] / steps}
            for name in longest
        ],
    }
