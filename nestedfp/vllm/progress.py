"""How far the running requests are, for the pace that `auto` keeps. Pure."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


class Progress:
    """When each decoding request was first seen, and with how many tokens. Lives in the scheduler.

    Counting starts when the request is first seen to decode under a pace: what came before it is not known
    and not held against anyone. One that is seen with its first token alone is lost if that is late.
    """

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int] | None] = {}
        """None for a request that is lost."""

    def of(
        self,
        scheduled: Iterable[str],
        requests: Mapping[str, Any],
        now: float,
        wall: float,
        late_s: float = math.inf,
    ) -> tuple[list[tuple[int, float]], float]:
        """Of what in `scheduled` is not lost: tokens made and seconds gone since the start of each that has a
        first token, and the age of the oldest without one, 0 without any. A first token is late after
        `late_s`. `now` is monotonic, `wall` Unix seconds."""
        made: list[tuple[int, float]] = []
        started, oldest = self._started, wall
        lost_before = wall - late_s
        for request_id in scheduled:
            request = requests.get(request_id)
            if request is None:
                continue
            tokens = request.num_output_tokens
            if not tokens:
                if request.arrival_time >= lost_before:
                    oldest = min(oldest, request.arrival_time)
                continue
            if request_id not in started:
                late = tokens == 1 and request.arrival_time < lost_before
                started[request_id] = None if late else (now, tokens)
            start = started[request_id]
            if start is not None:
                made.append((tokens - start[1], now - start[0]))
        return made, wall - oldest

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._started.pop(request_id, None)

    def clear(self) -> None:
        """No pace is kept any more."""
        self._started.clear()


def queued_tokens(waiting: Iterable[Any], enough: float) -> int:
    """Prompt tokens of the queue that are not computed yet, counted until there are `enough`."""
    tokens = 0
    for request in waiting:
        tokens += max(0, request.num_prompt_tokens - request.num_computed_tokens)
        if tokens >= enough:
            break
    return tokens


def all_late(waiting: Iterable[Any], arrived_before: float) -> bool:
    """Whether every request of the queue arrived before this Unix time; True without any."""
    return all(request.arrival_time < arrived_before for request in waiting)
