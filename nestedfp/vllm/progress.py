"""How far the running requests are, for the pace that `auto` keeps. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any


class Progress:
    """When each decoding request was first seen, and with how many tokens. Lives in the scheduler.

    Counting starts when the request is first seen to decode under a pace: what came before it is not known
    and not held against anyone.
    """

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int]] = {}

    def running(
        self, scheduled: Iterable[str], requests: Mapping[str, Any], now: float
    ) -> list[tuple[int, float]]:
        """Tokens made and seconds gone since the start, of each of `scheduled` that has a first token."""
        made: list[tuple[int, float]] = []
        for request_id in scheduled:
            request = requests.get(request_id)
            tokens = request.num_output_tokens if request is not None else 0
            if tokens:
                started_s, before = self._started.setdefault(request_id, (now, tokens))
                made.append((tokens - before, now - started_s))
        return made

    def oldest_prompt_s(self, scheduled: Iterable[str], requests: Mapping[str, Any], wall: float) -> float:
        """Age of the oldest of `scheduled` without a first token; 0 without any. `wall` is Unix seconds."""
        ages = [
            wall - request.arrival_time
            for request_id in scheduled
            if (request := requests.get(request_id)) is not None and not request.num_output_tokens
        ]
        return max(ages, default=0.0)

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
