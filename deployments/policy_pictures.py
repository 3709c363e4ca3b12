"""The pictures of docs/policy.md: every policy on every load, and one burst second by second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from nestedfp.loadtests.charts import Axis, element, label, number, steps

COLOURS: Final = {
    "static-fp16": "#4477aa",
    "static-fp16-cut": "#66ccee",
    "static-fp8": "#ee6677",
    "static-fp8-cut": "#aa3377",
    "threshold": "#ccbb44",
    "predictive": "#228833",
    "oracle": "#888888",
}
STYLE: Final = (
    "text{font:12px sans-serif;fill:#333}.tick{font-size:11px;fill:#666}"
    ".axis{stroke:#bbb;stroke-width:1}.grid{stroke:#e5e5e5;stroke-width:1}"
    ".line{fill:none;stroke-width:1.5}.head{font-size:13px;font-weight:600}"
)
WIDTH: Final = 760.0


def front(data: Mapping[str, Any]) -> str:
    """Attainment over the share of tokens in 16 bits: every policy on every load."""
    x, y = Axis(0.0, 1.0, 60.0, WIDTH - 20.0), Axis(0.0, 1.0, 400.0, 64.0)
    parts = [*_frame(x, y, "share of tokens in 16 bits", "share of requests within the SLO")]
    for row in data["loads"]:
        points = {name: _place(policy, x, y) for name, policy in row["policies"].items()}
        points["oracle"] = _place(row["oracle"], x, y)
        joined = [points[name] for name in ("static-fp8", "predictive", "static-fp16")]
        parts.append(
            element("polyline", points=_joined(joined), class_="line", stroke="#ddd", stroke_width="1")
        )
        title = f"{row['load']} at {row['share']:g} of capacity"
        for name, (left, top) in points.items():
            hollow = name == "oracle"
            parts.append(
                element(
                    "circle",
                    element("title", f"{name}, {title}"),
                    cx=left,
                    cy=top,
                    r=5.0 if hollow else 4.0,
                    fill="none" if hollow else COLOURS[name],
                    stroke=COLOURS[name],
                    fill_opacity=None if hollow else "0.8",
                )
            )
    left = 60.0
    for name, colour in COLOURS.items():
        hollow = name == "oracle"
        parts.append(
            element("circle", cx=left + 5, cy=26.0, r=4.0, fill="none" if hollow else colour, stroke=colour)
        )
        parts.append(label(left + 14, 30.0, name))
        left += 22.0 + 7.0 * len(name)
    note = f"{len(data['loads'])} loads, {data['settings']['replicas']} replicas; {data['label']}"
    return _svg(440.0, [*parts, label(WIDTH - 20.0, 50.0, note, anchor="end")])


def burst(data: Mapping[str, Any]) -> str:
    """The time line of one burst under the predictive policy."""
    row = next(row for row in data["loads"] if "timeline" in row)
    seen = row["timeline"]
    times = seen["t_s"]
    end = times[-1] + 1.0
    x = Axis(times[0], end, 60.0, WIDTH - 20.0)
    parts = [
        label(
            60.0,
            18.0,
            f"{row['load']} at {row['share']:g} of capacity, predictive policy; {data['label']}",
            "head",
        )
    ]
    rows: list[tuple[str, Sequence[float | None]]] = [
        ("arrivals/s", seen["arrivals"]),
        ("requests queued", seen["waiting"]),
        ("requests running", seen["running"]),
        ("TTFT p90, s", seen["ttft_p90_s"]),
        ("tokens in FP8, share", seen["fp8_token_share"]),
        ("replicas", seen["replicas"]),
    ]
    top = 34.0
    for name, values in rows:
        known = [(at, float(value)) for at, value in zip(times, values, strict=False) if value is not None]
        y = Axis(0.0, max(max(value for _, value in known) * 1.1, 1e-3), top + 60.0, top)
        parts.append(element("line", x1=60.0, x2=WIDTH - 20.0, y1=top + 60.0, y2=top + 60.0, class_="axis"))
        parts.append(element("path", d=steps(known, x, y, end), class_="line", stroke=COLOURS["predictive"]))
        parts.append(label(54.0, top + 12.0, number(y.high / 1.1), anchor="end"))
        parts.append(label(66.0, top + 12.0, name))
        top += 74.0
    parts.append(label(66.0, top + 10.0, "mode of each replica"))
    shades = ("#4477aa", "#ee6677", "#aadd99")
    width = x.at(times[0] + 1.0) - x.at(times[0])
    for replica in range(len(seen["modes"][0])):
        level = top + 16.0 + 14.0 * replica
        for at, modes in zip(times, seen["modes"], strict=True):
            parts.append(
                element(
                    "rect", x=x.at(at), y=level, width=width + 0.5, height=12.0, fill=shades[modes[replica]]
                )
            )
    top += 16.0 + 14.0 * len(seen["modes"][0]) + 14.0
    parts.extend(label(x.at(tick), top, number(tick), anchor="middle") for tick in x.ticks(8))
    parts.append(
        label(WIDTH - 20.0, top + 16.0, "seconds; blue: 16 bits, green: auto, red: FP8", anchor="end")
    )
    return _svg(top + 26.0, parts)


def _frame(x: Axis, y: Axis, x_name: str, y_name: str) -> list[str]:
    parts = []
    for tick in x.ticks(5):
        at = x.at(tick)
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="grid"))
        parts.append(label(at, y.start + 16.0, number(tick), anchor="middle"))
    for tick in y.ticks(5):
        at = y.at(tick)
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(label(x.start - 6.0, at + 4.0, number(tick), anchor="end"))
    parts.append(label(x.end, y.start + 32.0, x_name, anchor="end"))
    parts.append(label(x.start, y.end - 6.0, y_name))
    return parts


def _place(figures: Mapping[str, Any], x: Axis, y: Axis) -> tuple[float, float]:
    return x.at(figures["fp16_token_share"]), y.at(figures["attainment"])


def _joined(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in points)


def _svg(height: float, parts: Iterable[str]) -> str:
    body = "\n".join(
        [element("style", STYLE), element("rect", width="100%", height="100%", fill="#fff"), *parts]
    )
    box = f"0 0 {WIDTH:g} {height:g}"
    svg = element(
        "svg", f"\n{body}\n", xmlns="http://www.w3.org/2000/svg", viewBox=box, width=WIDTH, height=height
    )
    return f"{svg}\n"
