"""The files a run leaves: one JSON line a request, one JSON line a sample or flip of the servers.

All times are seconds since the replay's start. A request's latencies run from its *scheduled* time, not from
when the client got round to sending it: a client or server that falls behind must not hide it. ``lag_s`` is
the difference, so a latency from the moment of sending is ``ttft_s - lag_s``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nestedfp.loadtests.traces import ANY


class RecordError(ValueError):
    """A line of a result file that cannot be used; the message names file, line and field."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")


@dataclass(frozen=True)
class RequestRecord:
    """What became of one request.

    ``ok``: the answer was streamed to its end. ``ttft_s``, ``e2el_s`` (first and last token) and ``itl_s``
    (gaps between chunks that carry tokens) are filled as far as the stream got; ``tpot_s`` is
    (e2el_s - ttft_s) / (output_tokens - 1) for two tokens or more. ``prompt_tokens`` and ``output_tokens``
    are the server's own count from ``usage`` (None where it sent none); ``trace_prompt_tokens`` and
    ``max_tokens`` are what the trace asked for. ``tokens_by_precision`` counts the tokens computed in each.
    """

    index: int
    scheduled_s: float
    sent_s: float
    lag_s: float
    ended_s: float
    trace_prompt_tokens: int
    max_tokens: int
    precision_class: str = ANY
    ok: bool = False
    status: int | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    ttft_s: float | None = None
    e2el_s: float | None = None
    tpot_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    precision_at_start: str | None = None
    tokens_by_precision: dict[str, int] | None = None
    replica: str | None = None
    request_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestRecord:
        """The record with these fields, unknown ones ignored; TypeError where a needed one is missing."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})


@dataclass(frozen=True)
class Sample:
    """One replica's state at a moment: precision in force, requests running and waiting, tokens so far."""

    t: float
    replica: str
    mode: str
    running: int = 0
    waiting: int = 0
    tokens_fp16: int = 0
    tokens_fp8: int = 0


@dataclass(frozen=True)
class Flip:
    """One change of a replica's precision, and the signal that crossed its threshold."""

    t: float
    replica: str
    before: str
    after: str
    reason: str = ""
    signal: str | None = None
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Samples and flips of all replicas, each in order of time."""

    samples: tuple[Sample, ...] = ()
    flips: tuple[Flip, ...] = ()

    @property
    def replicas(self) -> list[str]:
        """Replica names in order."""
        return sorted({item.replica for item in self.samples} | {item.replica for item in self.flips})


def read_requests(path: Path) -> list[RequestRecord]:
    """All records of a run in order of index; :class:`RecordError` on a line that is none."""
    records = []
    for line, values in _lines(path):
        try:
            records.append(RequestRecord.from_dict(values))
        except TypeError as error:
            raise RecordError(path, line, f"not a request record: {error}") from error
    return sorted(records, key=lambda record: record.index)


def read_timeline(path: Path) -> Timeline:
    """Samples and flips of a run; :class:`RecordError` on a line that is neither."""
    samples: list[Sample] = []
    flips: list[Flip] = []
    for line, values in _lines(path):
        kind = values.get("kind")
        try:
            if kind == "sample":
                samples.append(Sample(**_known(Sample, values)))
            elif kind == "flip":
                renamed = {**values, "before": values.get("from"), "after": values.get("to")}
                flips.append(Flip(**_known(Flip, renamed)))
            else:
                raise RecordError(path, line, f"kind is {kind!r}; expected 'sample' or 'flip'")
        except TypeError as error:
            raise RecordError(path, line, f"not a {kind}: {error}") from error
    return Timeline(
        tuple(sorted(samples, key=lambda sample: sample.t)), tuple(sorted(flips, key=lambda flip: flip.t))
    )


def _known(kind: type[Sample] | type[Flip], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.name in values}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except ValueError as error:
                raise RecordError(path, number, f"not JSON: {error}") from error
            if not isinstance(values, dict):
                raise RecordError(path, number, "not a JSON object")
            yield number, values
