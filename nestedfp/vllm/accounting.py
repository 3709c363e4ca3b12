"""Counts of what was executed: steps, tokens, flips, and tokens by request."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from nestedfp.vllm.step import StepReport, StepTag

_EWMA_WEIGHT = 0.1

# vLLM derives its internal id from the one that the client sees: `-<8 hex digits>` is appended to every
# request, `-<i>` before that to each prompt of a completion, and `<i>_` is put in front of each sample.
_SAMPLE = re.compile(r"^\d+_(?=.)")
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
_PROMPT = re.compile(r"[-_]\d+$")


def client_ids(request_id: str) -> list[str]:
    """The ids by which a client may know the request that vLLM calls `request_id`."""
    whole = [request_id, _SAMPLE.sub("", request_id)]
    bare = [_SUFFIX.sub("", name) for name in whole]
    prompts = [_PROMPT.sub("", name) for name in bare]
    return list(dict.fromkeys([*whole, *bare, *prompts]))


class RequestTokens:
    """Executed tokens by request and plan, for at most `capacity` requests; the oldest go first.

    A request that was taken or evicted is forgotten: late steps of it are not counted again. Every step goes
    through `add` with its whole batch, so a plan has a count for each open request from the start.
    """

    def __init__(self, capacity: int = 16384) -> None:
        self._capacity = capacity
        self._open: dict[str, None] = {}
        self._tokens: dict[str, Counter[str]] = {"fp16": Counter(), "fp8": Counter()}
        self._ids: dict[str, list[str]] = {}

    def open(self, request_id: str) -> None:
        if request_id in self._open:
            return
        self._open[request_id] = None
        for tokens in self._tokens.values():
            tokens[request_id] = 0
        for name in client_ids(request_id):
            self._ids.setdefault(name, []).append(request_id)
        if len(self._open) > self._capacity:
            self._drop(next(iter(self._open)))

    def add(self, scheduled: Mapping[str, int], plan: str) -> None:
        tokens = self._tokens.get(plan)
        if tokens is None:
            tokens = self._tokens[plan] = Counter(dict.fromkeys(self._open, 0))
        # Counting keys runs in C, and all but a few requests of a large batch have one token.
        tokens.update(scheduled.keys())
        if sum(scheduled.values()) != len(scheduled):
            for request_id, count in scheduled.items():
                if count != 1:
                    tokens[request_id] += count - 1
        if len(tokens) != len(self._open):
            for forgotten in tokens.keys() - self._open.keys():
                del tokens[forgotten]

    def take(self, client_id: str) -> dict[str, int] | None:
        """The tokens of all requests that the client knows by this id, removed; None if there are none."""
        request_ids = self._ids.get(client_id)
        if request_ids is None:
            return None
        total: dict[str, int] = dict.fromkeys(self._tokens, 0)
        for request_id in list(request_ids):
            for plan, tokens in self._drop(request_id).items():
                total[plan] += tokens
        return {plan: tokens for plan, tokens in total.items() if tokens or plan in ("fp16", "fp8")}

    def _drop(self, request_id: str) -> dict[str, int]:
        for name in client_ids(request_id):
            siblings = self._ids[name]
            siblings.remove(request_id)
            if not siblings:
                del self._ids[name]
        del self._open[request_id]
        return {plan: tokens.pop(request_id) for plan, tokens in self._tokens.items()}


class StepCounts:
    """Totals over executed steps, as the workers reported them."""

    def __init__(self, plans: Iterable[str]) -> None:
        names = list(plans)
        self.steps = dict.fromkeys(names, 0)
        self.tokens = dict.fromkeys(names, 0)
        self.step_time_s: dict[str, float | None] = dict.fromkeys(names)
        self.batch_tokens: dict[str, float | None] = dict.fromkeys(names)
        self.bounded_steps = 0
        """Steps that were held to fewer tokens than the engine takes at most."""
        self.current = "fp16"
        self.flips = 0
        self.last_flip_seconds: float | None = None
        self.last_flip_reason: str | None = None
        self.mixed_steps: int | None = None
        self.loads = 0
        self._last_output_at = 0.0

    def add(self, tag: StepTag, report: StepReport, tokens: int, now: float) -> None:
        """Counts one executed step of `tokens`, whose output arrived at `now`."""
        plan = report.plan
        self.loads = report.loads
        self.steps[plan] += 1
        self.tokens[plan] += tokens
        if plan != self.current:
            self.flips += 1
            self.current = plan
            self.last_flip_reason = tag.reason
            self.last_flip_seconds = report.flip_seconds
        if report.mismatches is not None:
            mixed = report.mismatches > 0 or plan != tag.plan
            self.mixed_steps = (self.mixed_steps or 0) + mixed
        # With asynchronous scheduling a step is scheduled while its predecessor runs: its own time
        # starts with the predecessor's output.
        seconds = now - max(tag.scheduled_at, self._last_output_at)
        # Averaged alike, so that one can be compared with what a model gives for the other.
        self.step_time_s[plan] = _averaged(self.step_time_s[plan], seconds)
        self.batch_tokens[plan] = _averaged(self.batch_tokens[plan], tokens)
        self._last_output_at = now


def _averaged(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _EWMA_WEIGHT * (value - mean)
