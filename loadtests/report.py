"""The report of a run: one HTML file that needs nothing else.

``python -m nestedfp.loadtests.report FOLDER`` draws it again from a folder's requests.jsonl, timeline.jsonl
and summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from nestedfp.loadtests.charts import element
from nestedfp.loadtests.comparison import compare
from nestedfp.loadtests.metrics import Slo, summarize_records, summarize_timeline
from nestedfp.loadtests.picture import crossed, picture, short_name
from nestedfp.loadtests.records import RecordError, RequestRecord, Timeline, read_requests, read_timeline
from nestedfp.loadtests.table import Metric, rows

BASELINE = "static_fp16"
"""Where a summary keeps the summary of the same trace served in FP16 throughout."""
STATIC = {BASELINE: "static FP16", "static_fp8": "static FP8"}
"""Where a summary keeps those of the same trace in one precision throughout, and what they are called."""

_TILES = (
    Metric(("goodput_rps",), "goodput under the SLO", "req/s"),
    Metric(("ttft_ms", "p90"), "TTFT p90", "ms"),
    Metric(("tpot_ms", "p90"), "TPOT p90", "ms"),
    Metric(("fp8_token_share",), "of the tokens in FP8", "%"),
    Metric(("flips",), "flips"),
)
# What was measured is shown as such; the rest of a summary are the conditions it was measured under.
_MEASURED = {*summarize_records([], Slo()), *summarize_timeline(Timeline(), 0.0)} - {"slo", "replicas"}
_NOT_SETTINGS = {*STATIC, "comparison", *_MEASURED}
# Of a picture in the docs: so many requests a panel make 0.2 MB, and more would look the same.
_DOTS_IN_A_FILE = 500
_FLIP_HEAD = ("at", "replica", "change", "signal", "reason")


def write_report(
    requests_path: Path,
    timeline_path: Path,
    summary: Mapping[str, Any],
    path: Path,
    *,
    baseline_requests: Path | None = None,
) -> None:
    """Write the report of a run to ``path``.

    ``summary`` is what :func:`~nestedfp.loadtests.metrics.summarize` gives, with whatever else is to be shown
    (engine, model, policy, machine, versions, ...); under the names of `STATIC` it may hold the summaries of
    the same trace in one precision. ``baseline_requests``, the records in static FP16, come into the picture.
    OSError where a file cannot be read, :class:`~nestedfp.loadtests.records.RecordError` on a broken line.
    """
    timeline = read_timeline(timeline_path) if timeline_path.exists() else Timeline()
    behind = read_requests(baseline_requests) if baseline_requests else []
    path.write_text(render(read_requests(requests_path), timeline, summary, behind), encoding="utf-8")


def write_picture(
    requests_path: Path,
    timeline_path: Path,
    slo: Slo,
    path: Path,
    *,
    baseline_requests: Path | None = None,
) -> None:
    """Write the report's picture alone, an SVG file that brings its own style. Errors as `write_report`."""
    behind = read_requests(baseline_requests) if baseline_requests else []
    records, timeline = read_requests(requests_path), read_timeline(timeline_path)
    drawn = picture(records, timeline, slo, behind, _DOTS_IN_A_FILE)
    start, _, rest = drawn.partition(">")
    style = element("style", _asset("report.css"))
    path.write_text(f'{start} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n', encoding="utf-8")


def render(
    records: Sequence[RequestRecord],
    timeline: Timeline,
    summary: Mapping[str, Any],
    baseline: Sequence[RequestRecord] = (),
) -> str:
    """The report as HTML."""
    slo = Slo.from_dict(summary.get("slo", {}))
    title = "NestedFP load test"
    body = [
        element("h1", title),
        element("p", _subtitle(summary), class_="soft"),
        _verdict(summary),
        _tiles(summary),
        element("figure", picture(records, timeline, slo, baseline) + '<div id="tip"></div>'),
        element(
            "div",
            element("section", _numbers(summary))
            + element("section", _flips(timeline) + _errors(summary) + _settings(summary)),
            class_="columns",
        ),
        element("h2", "How to read it"),
        _notes(summary, len(records)),
    ]
    head = element("meta", charset="utf-8") + element("title", title)
    head += element("meta", name="viewport", content_="width=device-width")
    head += element("style", _asset("report.css"))
    script = element("script", _asset("report.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}{script}</body></html>\n'
    )


def beside_static(summary: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    """The run's summary under ``name``, behind those of the same trace in one precision that it holds."""
    static = {title: summary[key] for key, title in STATIC.items() if isinstance(summary.get(key), Mapping)}
    return {**static, name: summary}


def _asset(name: str) -> str:
    return resources.files("nestedfp.loadtests").joinpath("assets", name).read_text(encoding="utf-8")


def _subtitle(summary: Mapping[str, Any]) -> str:
    facts = [summary.get("model"), summary.get("engine")]
    if summary.get("replicas"):
        facts.append(f"{summary['replicas']} replicas")
    machine = summary.get("machine")
    if isinstance(machine, Mapping):
        facts.append(machine.get("processor"))
    facts.append(summary.get("date"))
    return escape(" · ".join(str(fact) for fact in facts if fact))


def _verdict(summary: Mapping[str, Any]) -> str:
    baseline = summary.get(BASELINE)
    if not isinstance(baseline, Mapping):
        return ""
    sentences = compare(baseline, summary)["sentences"]
    return element("div", "".join(element("p", escape(text)) for text in sentences), class_="verdict")


def _tiles(summary: Mapping[str, Any]) -> str:
    counts = summary.get("requests", {})
    shown = [(f"{counts.get('ok', 0):,} of {counts.get('sent', 0):,}", "requests answered")]
    shown += [(metric.text(metric.of(summary)), metric.label) for metric in _TILES]
    made = [
        element("div", f"<b>{escape(value)}</b><span>{label}</span>", class_="tile") for value, label in shown
    ]
    return element("div", "".join(made), class_="tiles")


def _numbers(summary: Mapping[str, Any]) -> str:
    runs = beside_static(summary, "this run")
    lines = []
    for row in rows(runs):
        ratio = None if row.ratio is None else f"{row.ratio:.2f}"
        tone = {True: "better", False: "worse", None: None}[row.improved]
        cells = "".join(element("td", escape(value)) for value in row.values)
        if len(runs) > 1:
            cells += element("td", ratio or "", class_=tone)
        lines.append(element("td", escape(row.label)) + cells)
    return element("h2", "The run in numbers") + _table(
        ["", *runs, *(["ratio"] if len(runs) > 1 else [])], lines
    )


def _flips(timeline: Timeline) -> str:
    if not timeline.flips:
        return element("h2", "Flips") + element("p", "None.")
    lines = []
    for flip in timeline.flips:
        change = f"{flip.before} → {flip.after}"
        cells = (f"{flip.t:.1f} s", short_name(flip.replica), change, crossed(flip), flip.reason)
        lines.append("".join(element("td", escape(cell)) for cell in cells))
    return element("h2", "Flips and the signal that crossed") + _table(_FLIP_HEAD, lines, "text")


def _errors(summary: Mapping[str, Any]) -> str:
    errors = summary.get("errors")
    if not errors:
        return ""
    lines = [element("td", escape(text)) + element("td", str(count)) for text, count in errors.items()]
    return element("h2", "Failures") + _table(("status and message", "requests"), lines, "text")


def _settings(summary: Mapping[str, Any]) -> str:
    left_out = {name: value for name, value in summary.items() if name not in _NOT_SETTINGS}
    lines = []
    for name, value in left_out.items():
        for path, leaf in _leaves(name, value):
            lines.append(element("td", escape(path)) + element("td", escape(leaf)))
    return element("h2", "Settings") + _table(("setting", "value"), lines, "text")


def _leaves(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [leaf for name, item in value.items() for leaf in _leaves(f"{path}.{name}", item)]
    if isinstance(value, list):
        return [(path, "; ".join(str(item) for item in value))]
    return [(path, f"{value:.4g}" if isinstance(value, float) else str(value))]


def _notes(summary: Mapping[str, Any], count: int) -> str:
    counts = summary.get("requests", {})
    notes = [
        f"n = {count} requests, {counts.get('ok', 0)} answered. Latencies are of answered requests; a failed "
        "one counts as missing the SLO.",
        "Open loop: requests are sent at the trace's times whether or not earlier ones were answered. "
        "Latencies run from the scheduled time; the client's lag is in the table.",
        "TTFT: to the first token. E2EL: to the last. TPOT = (E2EL − TTFT) / (output tokens − 1). "
        "Percentiles are interpolated linearly. Goodput: answers per second within every limit of the SLO.",
        "Tokens are scheduled tokens of executed steps, prompt and output. A request drawn as both had "
        "tokens computed in each precision.",
        "Ratios are this run over static FP16, one run each.",
    ]
    return "".join(element("p", escape(note), class_="soft") for note in notes)


def _table(head: Sequence[str], lines: Sequence[str], class_: str | None = None) -> str:
    top = element("tr", "".join(element("th", escape(name)) for name in head))
    return element("table", top + "".join(element("tr", line) for line in lines), class_=class_)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a file is missing or broken."""
    parser = argparse.ArgumentParser(prog="python -m nestedfp.loadtests.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds requests.jsonl, timeline.jsonl and summary.json")
    parser.add_argument("--baseline", type=Path, help="requests.jsonl of the same trace in static FP16")
    parser.add_argument("--out", type=Path, help="the HTML file; without it, report.html in the folder")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    out = options.out or folder / "report.html"
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        timeline = folder / "timeline.jsonl"
        write_report(folder / "requests.jsonl", timeline, summary, out, baseline_requests=options.baseline)
    except (OSError, RecordError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
