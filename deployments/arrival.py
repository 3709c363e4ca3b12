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

from nestedfp.deployments.admission import GENERATION, READ, WAITED, route
from nestedfp.deployments.asgi import App, Receive, Scope, Send, header

RECEIVED_HEADER: Final = b"x-nestedfp-received"
"""Unix seconds on the proxy's clock, and a name of that clock. A client's own is taken away."""
DELAYED: Final = "nestedfp.delay_s"
"""In the scope of a request with a stamp: how long it took from the proxy to the engine."""
_RECENT_S: Final = 20.0
_DRIFT: Final = 1e-3
"""By so much a second what counts as no delay may grow: clocks drift less, and a crowd passes sooner."""
_JUMP_S: Final = 0.5
"""By so much nothing is late for so long, but by a clock that was set."""
_SLOW_BODY_S: Final = 1.0
"""A body that takes longer is the client's."""
_LONGEST_S: Final = 60.0
"""No request is that long on its way: a clock was set."""

_arrived: ContextVar[float | None] = ContextVar("nestedfp_arrived", default=None)


def arrived_at() -> float | None:
    """When the request being served reached the proxy, in Unix seconds on this machine's clock; None where no
    proxy said. The time that a strict request waited for its place is not counted, nor a slow upload."""
    return _arrived.get()


class Stamp:
    """A proxy's clock under a name of its own."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:8]

    def now(self) -> tuple[bytes, bytes]:
        """The header for a request that arrives now."""
        return RECEIVED_HEADER, f"{time.time():.6f} {self._name}".encode()


class Delays:
    """Time on the way from one proxy, whatever the difference of the clocks.

    The shortest way counts as none: what lies beneath it is that difference, and the few milliseconds that
    every request takes. It is the shortest ever, but for the drift of clocks, since in a long overload no
    request is fast; or, where all of the last seconds are far beyond it, the shortest of these.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()
        """(when, difference) with both ascending: the first is the least lately."""
        self._shortest_s = math.inf
        self._at_s = 0.0

    def of(self, sent_s: float, now_s: float) -> float:
        """Seconds that a request stamped `sent_s` was longer on its way than the shortest."""
        recent = self._recent
        difference_s = now_s - sent_s
        while recent and recent[-1][1] >= difference_s:
            recent.pop()
        recent.append((now_s, difference_s))
        while recent[0][0] < now_s - _RECENT_S:
            recent.popleft()
        least_s = recent[0][1]
        grown_s = self._shortest_s + _DRIFT * max(0.0, now_s - self._at_s)
        self._at_s = now_s
        self._shortest_s = least_s if least_s > grown_s + _JUMP_S else min(least_s, grown_s)
        return difference_s - self._shortest_s


class Arrival:
    """ASGI middleware around an engine's application, which learns the time by :func:`arrived_at`."""

    def __init__(self, app: App, *, wall: Callable[[], float] = time.time) -> None:
        self._app = app
        self._wall = wall
        self._delays: dict[str, Delays] = {}
        """By the name of the proxy's clock: as many as proxies have started meanwhile."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stamp = None
        if scope["type"] == "http" and route(scope) in GENERATION:
            stamp = _read(header(scope["headers"], RECEIVED_HEADER))
        if stamp is None:
            await self._app(scope, receive, send)
            return
        now_s = self._wall()
        sent_s, clock = stamp
        apart_s = scope.get(WAITED, 0.0)
        if (read_s := scope.get(READ, 0.0)) > _SLOW_BODY_S:
            apart_s += read_s
        delay_s = self._delays.setdefault(clock, Delays()).of(sent_s + apart_s, now_s)
        if delay_s > _LONGEST_S:
            await self._app(scope, receive, send)
            return
        scope[DELAYED] = delay_s
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
