"""When a request reached the proxy, as the engine that serves it is told.

Between the proxy and the engine lie two event loops, which send the answers' events, too. A client counts
from the start of that way, and an engine would count from its end: under a burst, tenths of a second later.
So the proxy stamps each request, and the engine's TTFT, the age of its queue and the steps that follow from
it begin at the stamp.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from nestedfp.deployments.admission import GENERATION, WAITED, route
from nestedfp.deployments.asgi import App, Receive, Scope, Send, header

RECEIVED_HEADER: Final = b"x-nestedfp-received"
"""Unix seconds on the proxy's clock, and a name of that clock. A client's own is taken away."""
_MEMORY_S: Final = 20.0
"""For so long a clock that was set misleads."""
_LONGEST_S: Final = 60.0
"""No request is that long on its way: a clock was set."""

_arrived: ContextVar[float | None] = ContextVar("nestedfp_arrived", default=None)


def arrived_at() -> float | None:
    """When the request being served reached the proxy, in Unix seconds on this machine's clock; None where no
    proxy said. The time that a strict request waited for its place is not counted."""
    return _arrived.get()


class Stamp:
    """A proxy's clock under a name of its own."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:8]

    def now(self) -> tuple[bytes, bytes]:
        """The header for a request that arrives now."""
        return RECEIVED_HEADER, f"{time.time():.6f} {self._name}".encode()


class Delays:
    """Time on the way from each proxy, whatever the difference of the clocks.

    The shortest way of the last seconds counts as none: what lies beneath it is that difference, and the few
    milliseconds that every request takes.
    """

    def __init__(self) -> None:
        self._least: dict[str, deque[tuple[float, float]]] = {}
        """By clock, (when, difference) with both ascending: the first is the least lately."""

    def of(self, clock: str, sent_s: float, now_s: float) -> float:
        """Seconds that a request stamped `sent_s` by `clock` was longer on its way than the shortest."""
        for name in [name for name, least in self._least.items() if least[-1][0] < now_s - _MEMORY_S]:
            del self._least[name]
        least = self._least.setdefault(clock, deque())
        difference_s = now_s - sent_s
        while least and least[-1][1] >= difference_s:
            least.pop()
        least.append((now_s, difference_s))
        while least[0][0] < now_s - _MEMORY_S:
            least.popleft()
        return difference_s - least[0][1]


class Arrival:
    """ASGI middleware around an engine's application, which learns the time by :func:`arrived_at`.

    `delayed` hears of each request's delay in seconds.
    """

    def __init__(
        self, app: App, delayed: Callable[[float], None], *, wall: Callable[[], float] = time.time
    ) -> None:
        self._app = app
        self._delayed = delayed
        self._wall = wall
        self._delays = Delays()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stamp = None
        if scope["type"] == "http" and route(scope) in GENERATION:
            stamp = _read(header(scope["headers"], RECEIVED_HEADER))
        if stamp is None:
            await self._app(scope, receive, send)
            return
        now_s = self._wall()
        sent_s, clock = stamp
        delay_s = self._delays.of(clock, sent_s, now_s - scope.get(WAITED, 0.0))
        if delay_s > _LONGEST_S:
            await self._app(scope, receive, send)
            return
        self._delayed(delay_s)
        before = _arrived.set(now_s - delay_s)
        try:
            await self._app(scope, receive, send)
        finally:
            _arrived.reset(before)


def _read(value: bytes | None) -> tuple[float, str] | None:
    """Time and clock of a stamp; None for none, and for what no proxy of ours has written."""
    sent, _, clock = (value or b"").decode("latin-1").partition(" ")
    try:
        sent_s = float(sent)
    except ValueError:
        return None
    return (sent_s, clock) if math.isfinite(sent_s) and clock else None
