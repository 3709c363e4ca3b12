"""The picture of a run: load, latency and precision on one time axis, as one SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nestedfp.loadtests.charts import Axis, element, label, number, steps
from nestedfp.loadtests.metrics import FP8, FP16, Slo, mode_spans
from nestedfp.loadtests.records import Flip, RequestRecord, Timeline

WIDTH = 1160
_LEFT, _RIGHT = 72, 1148
_HEAD, _GAP, _LANE = 26, 12, 26
_MOST_DOTS = 6000


@dataclass(frozen=True)
class View:
    """What every panel shares: the time axis, the end of the run in seconds, and the flips."""

    time: Axis
    end_s: float
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class Panel:
    """A strip of the picture: a title, a height, and what draws it below a given y."""

    title: str
    height: float
    draw: Callable[[float], str]


def picture(
    records: Sequence[RequestRecord],
    timeline: Timeline,
    slo: Slo,
    baseline: Sequence[RequestRecord] = (),
    most_dots: int = _MOST_DOTS,
) -> str:
    """The SVG. ``baseline`` are the requests of another run of the same trace, drawn grey behind. Of more
    than ``most_dots`` requests every n-th is drawn."""
    end_s = max([1.0, *(r.ended_s for r in records), *(s.t for s in timeline.samples)])
    view = View(Axis(0.0, end_s, _LEFT, _RIGHT), end_s, timeline.flips)
    panels = [
        _arrivals(view, records),
        _in_engines(view, timeline),
        _latency(view, "TTFT", "ttft_s", slo.ttft_s, records, baseline, 176, most_dots),
        _latency(view, "TPOT", "tpot_s", slo.tpot_s, records, baseline, 150, most_dots),
        _lanes(view, timeline),
    ]
    y = 4.0
    parts = []
    for panel in panels:
        parts.append(label(_LEFT, y + 15, panel.title, "title"))
        parts.append(panel.draw(y + _HEAD))
        y += _HEAD + panel.height + _GAP
    bottom = y - _GAP
    parts.append(_time_axis(view, bottom))
    parts.append(element("line", x1=0.0, x2=0.0, y1=_HEAD, y2=bottom, class_="cross", id="cross"))
    return element(
        "svg",
        "".join(parts),
        id="picture",
        viewBox=f"0 0 {WIDTH} {bottom + 44:.0f}",
        role="img",
        aria_label="Load, latency and precision over time",
        data_left=float(_LEFT),
        data_right=float(_RIGHT),
        data_end=f"{end_s:.4f}",
    )


def served_in(record: RequestRecord) -> str:
    """``fp16``, ``fp8``, ``both`` where a flip fell into the answer, ``unknown`` where nothing tells."""
    counts = record.tokens_by_precision or {}
    used = [mode for mode in (FP16, FP8) if counts.get(mode)]
    if used:
        return used[0] if len(used) == 1 else "both"
    return record.precision_at_start if record.precision_at_start in (FP16, FP8) else "unknown"


def crossed(flip: Flip) -> str:
    """The signal that caused a flip, its value and its threshold; empty where none was recorded."""
    if flip.signal is None or flip.value is None:
        return ""
    limit = "" if flip.threshold is None else f" (threshold {flip.threshold:.4g})"
    return f"{flip.signal} {flip.value:.4g}{limit}"


def short_name(replica: str) -> str:
    """What tells a replica from others: its name after the last ``#``, the end of it if that is long."""
    last = replica.rsplit("#", 1)[-1]
    return last if len(last) <= 9 else "…" + last[-8:]


def _arrivals(view: View, records: Sequence[RequestRecord]) -> Panel:
    height = 62.0
    # Bins of a round width, at most 120 of them.
    round_widths = (0.5, 1, 2, 5, 10, 30, 60, 300, 600, 3600)
    width = next((w for w in round_widths if view.end_s / w <= 120), view.end_s / 120)
    counts: dict[int, int] = {}
    for record in records:
        counts[int(record.scheduled_s / width)] = counts.get(int(record.scheduled_s / width), 0) + 1

    def draw(top: float) -> str:
        axis = Axis(0.0, max([1.0, *counts.values()]) / width * 1.05, top + height, top)
        parts = [_frame(view, axis, top, height, 2)]
        for bin_, count in sorted(counts.items()):
            left, right = view.time.at(bin_ * width), view.time.at((bin_ + 1) * width)
            y = axis.at(count / width)
            tip = f"{bin_ * width:g} to {(bin_ + 1) * width:g} s: {count} arrivals"
            parts.append(_box(left, y, max(right - left - 1, 1.0), top + height - y, "bar", tip))
        return "".join(parts)

    return Panel(f"Arrivals per second (bins of {width:g} s)", height, draw)


def _in_engines(view: View, timeline: Timeline) -> Panel:
    height = 84.0
    latest: dict[str, tuple[int, int]] = {}
    running: list[tuple[float, float]] = []
    waiting: list[tuple[float, float]] = []
    for sample in timeline.samples:
        latest[sample.replica] = (sample.running, sample.waiting)
        running.append((sample.t, sum(pair[0] for pair in latest.values())))
        waiting.append((sample.t, sum(pair[1] for pair in latest.values())))

    def draw(top: float) -> str:
        most = max([1.0, *(value for _, value in (*running, *waiting))])
        axis = Axis(0.0, most * 1.08, top + height, top)
        lines = [
            element("path", d=steps(points, view.time, axis, points[-1][0]), class_=f"line {name}")
            for name, points in (("running", running), ("waiting", waiting))
            if points
        ]
        key = _key([("line running", "running"), ("line waiting", "waiting")], top - 11)
        return _frame(view, axis, top, height, 3) + "".join(lines) + key

    return Panel("Requests in the engines, all replicas", height, draw)


def _latency(
    view: View,
    name: str,
    field: str,
    limit_s: float | None,
    records: Sequence[RequestRecord],
    baseline: Sequence[RequestRecord],
    height: float,
    most_dots: int,
) -> Panel:
    def points(of: Sequence[RequestRecord]) -> list[tuple[RequestRecord, float]]:
        return [(r, 1e3 * getattr(r, field)) for r in of if r.ok and getattr(r, field) is not None]

    measured, behind = points(records), points(baseline)
    # A dot is 150 bytes and a node of the page: a long run shows every n-th request, and says so.
    every = math.ceil(max(len(measured), len(behind)) / most_dots) or 1
    shown, behind = measured[::every], behind[::every]
    limit_ms = [] if limit_s is None else [1e3 * limit_s]
    failed = [record for record in records if not record.ok] if field == "ttft_s" else []

    def draw(top: float) -> str:
        axis = Axis.fitting([*(ms for _, ms in (*shown, *behind)), *limit_ms], top + height, top)
        parts = [_frame(view, axis, top, height, 4)]
        for limit in limit_ms:
            y = axis.at(limit)
            parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="slo"))
            parts.append(label(_RIGHT - 4, y - 4, f"SLO {number(limit)} ms", "slo-text", "end"))
        parts += [
            element("circle", cx=view.time.at(r.scheduled_s), cy=axis.at(ms), r=2.6, class_="dot baseline")
            for r, ms in behind
        ]
        parts += [
            element(
                "circle",
                cx=view.time.at(record.scheduled_s),
                cy=axis.at(ms),
                r=3.2,
                class_=f"dot {served_in(record)}",
                data_tip=_describe(record, name, ms),
            )
            for record, ms in shown
        ]
        parts += [
            element(
                "text", "×", x=view.time.at(record.scheduled_s), y=top + 12, class_="failed",
                text_anchor="middle", data_tip=f"request {record.index} failed: {record.error}",
            )
            for record in failed
        ]  # fmt: skip
        present = {served_in(record) for record, _ in shown}
        key = [(f"dot {mode}", f"tokens in {text}") for mode, text in _MODES if mode in present]
        key += [("dot baseline", "static FP16, same trace")] if behind else []
        return "".join(parts) + _key(key, top - 11)

    scale = ", log scale" if _is_log([*(ms for _, ms in (*shown, *behind)), *limit_ms]) else ""
    thinned = f", one in {every} drawn" if every > 1 else ""
    title = f"{name} of each request over its arrival, ms{scale} (n = {len(measured):,}{thinned})"
    return Panel(title, height, draw)


_MODES = ((FP16, "FP16"), (FP8, "FP8"), ("both", "both"), ("unknown", "unknown precision"))


def _is_log(values: Iterable[float]) -> bool:
    return Axis.fitting(values, 0.0, 1.0).log


def _describe(record: RequestRecord, name: str, ms: float) -> str:
    counts = record.tokens_by_precision or {}
    tokens = ", ".join(f"{count} in {mode}" for mode, count in counts.items() if count)
    where = f"; {record.replica}" if record.replica else ""
    lengths = f"{record.prompt_tokens or '?'} + {record.output_tokens or '?'} tokens"
    return (
        f"request {record.index} at {record.scheduled_s:.1f} s: {name} {ms:,.0f} ms; {lengths}"
        + (f" ({tokens})" if tokens else "")
        + f"; class {record.precision_class}{where}"
    )


def _lanes(view: View, timeline: Timeline) -> Panel:
    replicas = timeline.replicas

    def draw(top: float) -> str:
        parts = []
        for row, replica in enumerate(replicas):
            y = top + row * _LANE
            parts.append(label(_LEFT - 8, y + 15, short_name(replica), anchor="end"))
            for start, end, mode in mode_spans(timeline, replica, view.end_s):
                left, right = view.time.at(start), view.time.at(end)
                tip = f"{replica}: {mode} from {start:.1f} to {end:.1f} s"
                parts.append(_box(left, y, right - left, _LANE - 6.0, f"lane {_tone(mode)}", tip))
                if right - left > 46:
                    parts.append(label((left + right) / 2, y + 14.5, mode.upper(), "lane-text", "middle"))
            parts += [_flip_mark(view, flip, y) for flip in timeline.flips if flip.replica == replica]
        if not replicas:
            parts.append(label(_LEFT, top + 15, "no timeline was recorded"))
        return "".join(parts)

    title = f"Precision in force, by replica ({len(timeline.flips)} flips; ▼ tells the signal that crossed)"
    return Panel(title, _LANE * max(len(replicas), 1), draw)


def _flip_mark(view: View, flip: Flip, lane_top: float) -> str:
    x = view.time.at(flip.t)
    shape = f"M{x - 6:.1f} {lane_top - 5:.1f}h12l-6 10z"
    told = [f"{flip.t:.1f} s, {flip.replica}: {flip.before} → {flip.after}", crossed(flip), flip.reason]
    tip = "; ".join(part for part in told if part)
    return element("path", d=shape, class_=f"flip-mark {_tone(flip.after)}", data_tip=tip)


def _tone(mode: str) -> str:
    return mode if mode in (FP16, FP8) else "unknown"


def _time_axis(view: View, y: float) -> str:
    ticks = view.time.ticks(12)
    marks = [label(view.time.at(t), y + 22, number(t), anchor="middle") for t in ticks]
    return "".join(marks) + label(
        (_LEFT + _RIGHT) / 2, y + 38, "seconds since the replay's start", "tick", "middle"
    )


def _box(x: float, y: float, width: float, height: float, class_: str, tip: str) -> str:
    return element("rect", x=x, y=y, width=width, height=height, class_=class_, data_tip=tip)


def _frame(view: View, axis: Axis, top: float, height: float, count: int) -> str:
    parts = [element("rect", x=_LEFT, y=top, width=_RIGHT - _LEFT, height=height, class_="frame")]
    for tick in axis.ticks(count):
        y = axis.at(tick)
        parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(label(_LEFT - 8, y + 4, number(tick), anchor="end"))
    for flip in view.flips:
        x = view.time.at(flip.t)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=top + height, class_=f"flip {_tone(flip.after)}"))
    return "".join(parts)


def _key(entries: Sequence[tuple[str, str]], y: float) -> str:
    """A legend that ends at the right edge."""
    parts = []
    x = float(_RIGHT)
    for class_, text in reversed(entries):
        x -= 7.0 * len(text) + 24
        if class_.startswith("line"):
            parts.append(element("line", x1=x, x2=x + 14, y1=y, y2=y, class_=class_))
        else:
            parts.append(element("circle", cx=x + 8, cy=y, r=4.0, class_=class_))
        parts.append(label(x + 19, y + 4, text, "key"))
    return "".join(parts)
