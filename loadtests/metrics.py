"""What a run came to, from its files: latencies, goodput, tokens by precision. Pure.

Names and formulas are those of ``vllm bench serve``: TPOT = (E2EL - TTFT) / (output tokens - 1) over answers
of two tokens or more, percentiles interpolated linearly, goodput the complete answers per second that meet
every limit (an answer of one token has TPOT 0 there, one without ``usage`` the mean gap between its chunks).
Two things differ and are stated: latencies run from the scheduled time, and the duration from the replay's
second 0 to the last answer's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nestedfp.loadtests.records import RequestRecord, Timeline, read_requests
from nestedfp.loadtests.traces import STRICT

PERCENTILES = (50, 90, 99)
FP16 = "fp16"
FP8 = "fp8"


@dataclass(frozen=True)
class Slo:
    """Limits that a request must meet, in seconds; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
                raise ValueError(f"slo.{name} is {limit!r}; give seconds greater than 0, or leave it out")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Slo:
        """From ``ttft_s``, ``tpot_s``, ``e2el_s``; a ``percentile``, which concerns policies, is ignored."""
        unknown = set(values) - {"ttft_s", "tpot_s", "e2el_s", "percentile"}
        if unknown:
            raise ValueError(f"slo has unknown fields {sorted(unknown)}; give ttft_s, tpot_s or e2el_s")
        return cls(values.get("ttft_s"), values.get("tpot_s"), values.get("e2el_s"))

    def met_by(self, record: RequestRecord) -> bool:
        """Whether a request was answered to its end within every limit."""
        if not record.ok:
            return False
        measured = (record.ttft_s, _judged_tpot_s(record), record.e2el_s)
        limits = (self.ttft_s, self.tpot_s, self.e2el_s)
        return all(
            limit is None or (value is not None and value <= limit)
            for value, limit in zip(measured, limits, strict=True)
        )


def summarize(requests_path: Path, slo: Slo | Mapping[str, Any]) -> dict[str, Any]:
    """The summary of the run whose records lie at ``requests_path``; see :func:`summarize_records`."""
    return summarize_records(
        read_requests(requests_path), slo if isinstance(slo, Slo) else Slo.from_dict(slo)
    )


def summarize_records(records: Sequence[RequestRecord], slo: Slo) -> dict[str, Any]:
    """Counts, latencies in ms, rates per second. A value that no request supports is None.

    ``tokens`` sums what each answer's ``usage`` says was computed in each precision. ``attainment`` is, for
    each precision class, the share of *sent* requests that met the SLO: a failed request misses it. Requests
    ``without_usage`` are judged by the mean gap between their chunks and have no part in ``tpot_ms``.
    ``strict_in_fp8`` counts requests of the strict class of which any token was computed in FP8: always 0 if
    the servers keep their word.
    """
    good = [record for record in records if record.ok]
    met = [record for record in good if slo.met_by(record)]
    duration_s = max((record.ended_s for record in records), default=0.0)
    tokens = {mode: _tokens(records, mode) for mode in (FP16, FP8)}
    output_tokens = sum(record.output_tokens or 0 for record in good)
    return {
        "requests": {
            "sent": len(records),
            "ok": len(good),
            "failed": len(records) - len(good),
            "without_usage": sum(record.output_tokens is None for record in good),
        },
        "slo": asdict(slo),
        "duration_s": duration_s,
        "goodput_rps": _rate(len(met), duration_s),
        "request_throughput_rps": _rate(len(good), duration_s),
        "output_throughput_tps": _rate(output_tokens, duration_s),
        "attainment": _attainment(records, slo),
        "strict_in_fp8": sum(
            record.precision_class == STRICT and (record.tokens_by_precision or {}).get(FP8, 0) > 0
            for record in records
        ),
        "tokens": tokens,
        "fp8_token_share": _share(tokens[FP8], tokens[FP16] + tokens[FP8]),
        "ttft_ms": distribution_ms(record.ttft_s for record in good),
        "tpot_ms": distribution_ms(record.tpot_s for record in good),
        "itl_ms": distribution_ms(gap for record in good for gap in record.itl_s),
        "e2el_ms": distribution_ms(record.e2el_s for record in good),
        "lag_ms": distribution_ms(record.lag_s for record in records),
        "errors": _errors(records),
    }


def summarize_timeline(timeline: Timeline, duration_s: float) -> dict[str, Any]:
    """Flips, and how long the replicas were up and in FP8, in replica-seconds within [0, duration_s].

    A replica counts from its first sample on; see :func:`mode_spans` for when it was in which precision.
    """
    up_s = fp8_s = 0.0
    for replica in timeline.replicas:
        for start, end, mode in mode_spans(timeline, replica, duration_s):
            up_s += end - start
            fp8_s += (end - start) * (mode == FP8)
    return {
        "flips": len(timeline.flips),
        "flips_to": {
            mode: sum(flip.after == mode for flip in timeline.flips)
            for mode in sorted({flip.after for flip in timeline.flips})
        },
        "replicas": len(timeline.replicas),
        "replica_seconds": up_s,
        "fp8_time_share": _share(fp8_s, up_s),
    }


def mode_spans(timeline: Timeline, replica: str, until_s: float) -> list[tuple[float, float, str]]:
    """(start, end, mode) of one replica in order, in seconds, cut to [0, until_s]; equal neighbours joined.

    Samples say which precision was in force; a flip recorded between two samples that differ dates the change
    better than the second of them. Without samples the flips alone tell.
    """
    samples = [sample for sample in timeline.samples if sample.replica == replica]
    flips = [flip for flip in timeline.flips if flip.replica == replica]
    if samples:
        changes = [(samples[0].t, samples[0].mode)]
        for earlier, later in pairwise(samples):
            if later.mode != earlier.mode:
                dated = [f.t for f in flips if earlier.t < f.t <= later.t and f.after == later.mode]
                changes.append((dated[-1] if dated else later.t, later.mode))
    else:
        changes = [(0.0, flips[0].before)] if flips else []
        changes += [(flip.t, flip.after) for flip in flips]
    spans: list[tuple[float, float, str]] = []
    ends = [at for at, _ in changes[1:]] + [until_s]
    for (at, mode), end in zip(changes, ends, strict=True):
        start, end = max(at, 0.0), min(end, until_s)
        if end <= start:
            continue
        if spans and spans[-1][2] == mode and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end, mode)
        else:
            spans.append((start, end, mode))
    return spans


def distribution_ms(seconds: Iterable[float | None]) -> dict[str, float | int | None]:
    """Count, mean and the 50th, 90th and 99th percentile in ms of the values that are there."""
    values = np.array([value for value in seconds if value is not None], dtype=np.float64) * 1e3
    names = [f"p{percentile}" for percentile in PERCENTILES]
    if not len(values):
        return {"n": 0, "mean": None, **dict.fromkeys(names)}
    at = np.percentile(values, PERCENTILES)
    return {"n": len(values), "mean": float(values.mean()), **dict(zip(names, map(float, at), strict=True))}


def _judged_tpot_s(record: RequestRecord) -> float:
    """The TPOT that is held against the limit; 0 for an answer of one token, or one that came at once.

    Without a server's count of tokens, which may come several in a chunk, it is the mean gap between chunks:
    TPOT is that at most, so nothing is taken for met that was not.
    """
    if record.tpot_s is not None:
        return record.tpot_s
    if record.output_tokens == 1 or not record.itl_s:
        return 0.0
    return sum(record.itl_s) / len(record.itl_s)


def _tokens(records: Sequence[RequestRecord], mode: str) -> int:
    return sum((record.tokens_by_precision or {}).get(mode, 0) for record in records)


def _attainment(records: Sequence[RequestRecord], slo: Slo) -> dict[str, float | None]:
    classes = sorted({record.precision_class for record in records})
    of_class = {name: [record for record in records if record.precision_class == name] for name in classes}
    return {
        name: _share(sum(slo.met_by(record) for record in members), len(members))
        for name, members in of_class.items()
    }


def _errors(records: Sequence[RequestRecord]) -> dict[str, int]:
    """Failures by message, the commonest first, at most ten."""
    counts: dict[str, int] = {}
    for record in records:
        if not record.ok:
            text = f"{record.status or 'no status'}: {record.error}"
            counts[text] = counts.get(text, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:10])


def _rate(count: float, duration_s: float) -> float | None:
    return count / duration_s if duration_s > 0 else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
