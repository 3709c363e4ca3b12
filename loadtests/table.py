"""The table of a run beside its baseline: one list of rows, shown as text in a terminal and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nestedfp.loadtests.metrics import PERCENTILES

Better = Literal["lower", "higher"]
MARGIN = 0.05
"""Differences that a single run on each side cannot tell apart."""


@dataclass(frozen=True)
class Metric:
    """A number of a summary: where it stands in it, what it is called, its unit, and which way is better."""

    path: tuple[str, ...]
    label: str
    unit: str = ""
    better: Better | None = None

    def of(self, summary: Mapping[str, Any]) -> float | None:
        """Its value in a summary; None where it is missing or was not measured."""
        value: Any = summary
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, (int, float)) else None

    def text(self, value: float | None) -> str:
        """A value in its unit: counts whole, shares in per cent, others to about three digits."""
        if value is None:
            return "–"
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        digits = (
            0 if (value == int(value) and not self.unit) or abs(value) >= 100 else 2 if abs(value) < 10 else 1
        )
        return f"{value:,.{digits}f}" + (f" {self.unit}" if self.unit else "")


def _latency(name: str, label: str) -> list[Metric]:
    return [Metric((name, f"p{p}"), f"{label} p{p}", "ms", "lower") for p in PERCENTILES]


METRICS = (
    Metric(("requests", "sent"), "requests sent"),
    Metric(("requests", "ok"), "  answered"),
    Metric(("requests", "failed"), "  failed", better="lower"),
    Metric(("duration_s",), "duration", "s"),
    *_latency("ttft_ms", "TTFT"),
    *_latency("tpot_ms", "TPOT"),
    Metric(("e2el_ms", "p90"), "E2EL p90", "ms", "lower"),
    Metric(("goodput_rps",), "goodput under the SLO", "req/s", "higher"),
    Metric(("attainment", "any"), "SLO met, class any", "%", "higher"),
    Metric(("attainment", "fp16"), "SLO met, class fp16", "%", "higher"),
    Metric(("output_throughput_tps",), "output", "tok/s", "higher"),
    Metric(("tokens", "fp16"), "tokens in FP16"),
    Metric(("tokens", "fp8"), "tokens in FP8"),
    Metric(("fp8_token_share",), "  share in FP8", "%"),
    Metric(("fp8_time_share",), "replica time in FP8", "%"),
    Metric(("flips",), "flips"),
    Metric(("lag_ms", "p99"), "client lag p99", "ms"),
)


@dataclass(frozen=True)
class Row:
    """One line: label, each run's value as text, and last over first where one way is better."""

    label: str
    values: tuple[str, ...]
    ratio: float | None
    improved: bool | None


def rows(runs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The lines of a table of runs by name, the first of them the baseline; empty metrics are left out."""
    made = []
    for metric in METRICS:
        values = [metric.of(summary) for summary in runs.values()]
        if all(value is None for value in values):
            continue
        ratio = ratio_of(values[-1], values[0]) if metric.better and len(values) > 1 else None
        told = ratio is not None and abs(ratio - 1) > MARGIN
        improved = (ratio < 1) == (metric.better == "lower") if told and ratio is not None else None
        made.append(Row(metric.label, tuple(metric.text(value) for value in values), ratio, improved))
    return made


def ratio_of(value: float | None, base: float | None) -> float | None:
    """Run over baseline; None where either is missing or the baseline is 0."""
    return value / base if value is not None and base else None


def run_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries by name as aligned plain text for a terminal; the ratio is the last over the first."""
    lines = [("", *runs, "ratio" if len(runs) > 1 else "")]
    for row in rows(runs):
        lines.append((row.label, *row.values, "" if row.ratio is None else f"{row.ratio:.2f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for label, *values in lines:
        cells = "".join(f"  {text.rjust(width)}" for text, width in zip(values, widths[1:], strict=True))
        shown.append((label.ljust(widths[0]) + cells).rstrip())
    shown.insert(1, "-" * max(map(len, shown)))
    return "\n".join(shown)
