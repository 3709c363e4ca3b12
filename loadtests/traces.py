"""A trace: when requests arrive, how long they are, and which precision class they ask for.

A trace is columns of numbers, 17 bytes a request, so that the public traces of tens of millions of requests
fit in memory. Times are seconds since the start of the trace, lengths are tokens. Every change made to a
trace (scaling, cutting) is one line of its ``history``, which travels with the results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ANY = "any"
STRICT = "fp16"
"""Precision classes as the header ``x-nestedfp-precision`` spells them: any precision, or 16 bits only."""


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace: its place in it, arrival in seconds, lengths in tokens, precision class."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    precision_class: str = ANY


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival.

    ``arrival_s`` float64, ``prompt_tokens`` and ``output_tokens`` int32, ``strict`` bool, all of one length;
    arrivals are finite, not negative and do not decrease; lengths are at least 1. ValueError otherwise.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    strict: NDArray[np.bool_]
    history: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.arrival_s, self.prompt_tokens, self.output_tokens, self.strict)
        if any(column.shape != self.arrival_s.shape or column.ndim != 1 for column in columns):
            raise ValueError(
                f"trace {self.name!r}: columns have shapes {[column.shape for column in columns]}"
            )
        if not len(self):
            raise ValueError(f"trace {self.name!r} has no requests; widen the window or check the file")
        if (
            not np.isfinite(self.arrival_s).all()
            or self.arrival_s[0] < 0
            or (np.diff(self.arrival_s) < 0).any()
        ):
            raise ValueError(f"trace {self.name!r}: arrivals must be finite, not negative and in order")
        for name in ("prompt_tokens", "output_tokens"):
            shortest = int(getattr(self, name).min())
            if shortest < 1:
                raise ValueError(f"trace {self.name!r}: {name} holds {shortest}; lengths are at least 1")

    @classmethod
    def from_columns(
        cls,
        name: str,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        strict: ArrayLike | None = None,
        history: tuple[str, ...] = (),
    ) -> Trace:
        """A trace from columns in any order of arrival; requests of equal arrival keep their order."""
        arrival = np.asarray(arrival_s, dtype=np.float64)
        flags = np.zeros(arrival.shape, dtype=bool) if strict is None else np.asarray(strict, dtype=bool)
        columns = [
            np.asarray(prompt_tokens, dtype=np.int32),
            np.asarray(output_tokens, dtype=np.int32),
            flags,
        ]
        if (np.diff(arrival) < 0).any():
            order = np.argsort(arrival, kind="stable")
            arrival, columns = arrival[order], [column[order] for column in columns]
            history = (*history, "sorted by arrival")
        return cls(name, arrival, columns[0], columns[1], columns[2], history)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[TraceRequest]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> TraceRequest:
        return TraceRequest(
            index,
            float(self.arrival_s[index]),
            int(self.prompt_tokens[index]),
            int(self.output_tokens[index]),
            STRICT if self.strict[index] else ANY,
        )

    @property
    def duration_s(self) -> float:
        """Seconds from the start of the trace to its last arrival."""
        return float(self.arrival_s[-1])

    @property
    def rate_rps(self) -> float | None:
        """Mean arrivals per second between the first and the last; None with fewer than two or no span."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span if span > 0 else None

    @property
    def interarrival_cv(self) -> float | None:
        """Standard deviation over mean of the gaps between arrivals (1: Poisson); None with no span."""
        gaps = np.diff(self.arrival_s)
        return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else None

    def scaled(self, *, time: float = 1.0, length: float = 1.0) -> Trace:
        """Arrival times multiplied by ``time`` (0.5 doubles the rate), lengths by ``length``, at least 1."""
        _positive("time scale", time)
        _positive("length scale", length)
        result = self
        if time != 1.0:
            result = replace(
                result, arrival_s=result.arrival_s * time, history=(*result.history, f"time x {time:g}")
            )
        if length != 1.0:
            result = replace(
                result,
                prompt_tokens=_scaled_lengths(result.prompt_tokens, length),
                output_tokens=_scaled_lengths(result.output_tokens, length),
                history=(*result.history, f"lengths x {length:g}"),
            )
        return result

    def window(self, start_s: float, duration_s: float) -> Trace:
        """The requests that arrive in [start_s, start_s + duration_s), with ``start_s`` as the new zero."""
        _positive("window duration", duration_s)
        first, last = np.searchsorted(self.arrival_s, [start_s, start_s + duration_s])
        cut = self._take(slice(int(first), int(last)), f"window {start_s:g} s + {duration_s:g} s")
        return replace(cut, arrival_s=cut.arrival_s - start_s)

    def first(self, requests: int) -> Trace:
        """The first ``requests`` requests (all of them where there are fewer)."""
        _positive("number of requests", requests)
        return self if requests >= len(self) else self._take(slice(0, requests), f"first {requests} requests")

    def clipped(self, *, max_prompt_tokens: int | None = None, max_output_tokens: int | None = None) -> Trace:
        """Longer prompts and outputs cut down to these many tokens; the history counts how many were."""
        result = self
        for column, bound in (("prompt_tokens", max_prompt_tokens), ("output_tokens", max_output_tokens)):
            if bound is None:
                continue
            _positive(f"max {column}", bound)
            lengths: NDArray[np.int32] = getattr(result, column)
            over = int((lengths > bound).sum())
            if over:
                changes: dict[str, Any] = {
                    column: np.minimum(lengths, np.int32(bound)),
                    "history": (*result.history, f"{column} cut to {bound} in {over} requests"),
                }
                result = replace(result, **changes)
        return result

    def with_strict_share(self, share: float, seed: int = 0) -> Trace:
        """About ``share`` (0 to 1) of the requests, drawn with ``seed``, ask for 16 bits only."""
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"strict share is {share!r}; give a number from 0 to 1")
        strict = np.random.default_rng(seed).random(len(self)) < share
        return replace(self, strict=strict, history=(*self.history, f"strict share {share:g} (seed {seed})"))

    def describe(self) -> dict[str, Any]:
        """What to print and to keep beside results: counts, rate, burstiness, mean lengths, history."""
        return {
            "name": self.name,
            "requests": len(self),
            "duration_s": self.duration_s,
            "rate_rps": self.rate_rps,
            "interarrival_cv": self.interarrival_cv,
            "mean_prompt_tokens": float(self.prompt_tokens.mean()),
            "mean_output_tokens": float(self.output_tokens.mean()),
            "strict_requests": int(self.strict.sum()),
            "history": list(self.history),
        }

    def save(self, path: Path) -> None:
        """Write the trace as JSON lines: a header with name and history, then one line a request."""
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"trace": self.name, "history": list(self.history)}) + "\n")
            for request in self:
                line = {
                    "arrival_s": request.arrival_s,
                    "prompt_tokens": request.prompt_tokens,
                    "output_tokens": request.output_tokens,
                    "precision_class": request.precision_class,
                }
                file.write(json.dumps(line) + "\n")

    def _take(self, part: slice, note: str) -> Trace:
        return replace(
            self,
            arrival_s=self.arrival_s[part],
            prompt_tokens=self.prompt_tokens[part],
            output_tokens=self.output_tokens[part],
            strict=self.strict[part],
            history=(*self.history, note),
        )


def _scaled_lengths(lengths: NDArray[np.int32], factor: float) -> NDArray[np.int32]:
    scaled: NDArray[np.int32] = np.maximum(1, np.rint(lengths * factor)).astype(np.int32)
    return scaled


def _positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} is {value!r}; give a number greater than 0")
