"""``nestedfp report policy``: the pictures and tables of docs/policy.md, from bench/data/policy.json.

Nothing in them is typed: the part of docs/policy.md between its two marks is written anew, and so are the
two pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nestedfp.loadtests.charts import Axis, element, label, number, steps

BEGIN: Final = "<!-- policy: begin (nestedfp report policy) -->"
END: Final = "<!-- policy: end -->"
FRONT, BURST = "policy-front.svg", "policy-burst.svg"
COLOURS: Final = {
    "static-fp16": "#4477aa",
    "static-fp8": "#ee6677",
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nestedfp report policy``."""
    parser.add_argument(
        "--data", type=Path, default=Path("bench/data/policy.json"), help="made by bench/policy.py"
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder with policy.md and the pictures"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where anything is stale")


def run(args: argparse.Namespace) -> int:
    """Write or check; returns the exit status: 1 where something is stale, 2 for unusable data."""
    try:
        data = json.loads(args.data.read_text())
        page = (args.docs / "policy.md").read_text()
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
        files = {
            "policy.md": f"{before}{BEGIN}\n{tables(data)}\n{END}{after}",
            FRONT: front(data),
            BURST: burst(data),
        }
    except (OSError, ValueError, KeyError, StopIteration) as error:
        print(f"nestedfp report policy: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    stale = [name for name, text in files.items() if not _same(args.docs / name, text)]
    if args.check:
        for name in stale:
            print(f"{args.docs / name} is stale: run nestedfp report policy", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (args.docs / name).write_text(files[name])
        print(args.docs / name)
    return 0


def front(data: Mapping[str, Any]) -> str:
    """Attainment over the share of tokens in 16 bits: every policy on every load."""
    x, y = Axis(0.0, 1.0, 60.0, WIDTH - 20.0), Axis(0.0, 1.0, 400.0, 50.0)
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
        left += 22.0 + 7.5 * len(name)
    note = f"{len(data['loads'])} loads, {data['settings']['replicas']} replicas; {data['label']}"
    return _svg(440.0, [*parts, label(WIDTH - 20.0, 30.0, note, anchor="end")])


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


def tables(data: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    parts = [
        f"{data['label']}; {data['settings']['replicas']} replicas, seed {data['settings']['seed']}.",
        f"![Attainment over the share of tokens in 16 bits]({FRONT})",
        _loads(data["loads"]),
    ]
    if "held_out" in data:
        seed = data["settings"]["held_out_seed"]
        parts += [f"The same on seed {seed}, on which nothing was tuned:", _loads(data["held_out"])]
    parts.append(f"![One burst, second by second]({BURST})")
    if "steady" in data:
        parts.append(_steady(data["steady"]))
    if "scaling" in data:
        parts.append(_scaling(data["scaling"]))
    if "paper" in data:
        parts.append(_paper(data["paper"]))
    if data.get("calibration"):
        parts.append(_calibration(data["calibration"]))
    if "decide_ms" in data:
        took = data["decide_ms"]
        parts.append(
            f"One decision for {took['replicas']:,} replicas takes {took['p50']:.1f} ms of CPU"
            f" (p50 of {took['rounds']}; p95 {took['p95']:.1f})."
        )
    if "million" in data:
        took = data["million"]["wall_s"]
        parts.append(
            f"A million requests on {data['million']['replicas']} replicas are simulated in"
            f" {took['static-fp16']:.0f} s (static FP16) and {took['predictive']:.0f} s (predictive)."
        )
    return "\n\n".join(parts)


def _loads(rows: Iterable[Mapping[str, Any]]) -> str:
    head = (
        "load",
        "of capacity",
        "static FP16",
        "static FP8",
        "threshold",
        "predictive",
        "points below FP8",
        "violations cut",
        "16-bit tokens",
        "oracle (bound)",
        "of the oracle",
        "most flips a replica and minute",
    )
    lines = []
    for row in rows:
        ours, oracle = row["policies"]["predictive"], row.get("oracle")
        lines.append(
            (
                row["load"],
                f"{100 * row['share']:.0f} % of {row['capacity_rps']:.1f}/s",
                *(
                    f"{100 * row['policies'][name]['attainment']:.2f}"
                    for name in ("static-fp16", "static-fp8", "threshold", "predictive")
                ),
                f"{ours['points_below_static_fp8']:+.2f}",
                "–" if ours["violations_cut"] is None else f"{100 * ours['violations_cut']:.1f} %",
                f"{ours['fp16_token_share']:.3f}",
                f"{oracle['fp16_token_share']:.3f} ({oracle['bound']:.3f})" if oracle else "–",
                f"{oracle['predictive_over_oracle']:.2f}"
                if oracle and oracle["predictive_over_oracle"]
                else "–",
                str(ours["max_flips_in_a_minute"]),
            )
        )
    return _markdown(head, lines)


def _steady(row: Mapping[str, Any]) -> str:
    head = (
        "an hour of Poisson arrivals at 60 %",
        "attainment, %",
        "16-bit tokens",
        "flips a replica and hour",
    )
    lines = [
        (
            name,
            f"{100 * policy['attainment']:.2f}",
            f"{policy['fp16_token_share']:.3f}",
            f"{policy['flips_per_replica_hour']:.2f}",
        )
        for name, policy in row["policies"].items()
    ]
    return _markdown(head, lines)


def _scaling(report: Mapping[str, Any]) -> str:
    head = ("autoscaling", "attainment, %", "replica-hours", "16-bit tokens", "most replicas")
    names = {
        "serve-fp16": "Serve's own policy, static FP16",
        "serve-fp8": "Serve's own policy, static FP8",
        "joint": "joint rule, predictive",
    }
    lines = [
        (
            shown,
            f"{100 * report[name]['attainment']:.3f}",
            f"{report[name]['replica_hours']:.2f}",
            f"{report[name]['fp16_token_share']:.3f}",
            str(report[name]["most_replicas"]),
        )
        for name, shown in names.items()
    ]
    saved = 100 * report["replica_hours_saved"]
    of_fp8 = report["of_what_fp8_saves"]
    facts = [
        f"{report['violations_alone_over_joint']:.1f} times fewer violations than autoscaling alone",
        f"{saved:.0f} % fewer replica-hours",
    ]
    if of_fp8 is not None:
        facts.append(f"{100 * of_fp8:.0f} % of what static FP8 with autoscaling saves")
    text = f"Load: {report['load']}; a replica starts in {report['startup_s']:g} s. {', '.join(facts)}."
    return f"{_markdown(head, lines)}\n\n{text}"


def _paper(report: Mapping[str, Any]) -> str:
    head = (
        "60 s as in the paper",
        "violating seconds",
        "seconds mostly in 16 bits",
        "without any FP8",
        "16-bit tokens",
    )
    lines = [
        (
            name,
            str(policy["violating_seconds"]),
            f"{100 * policy['seconds_mostly_16_bits']:.1f} %",
            f"{100 * policy['seconds_without_fp8']:.1f} %",
            f"{policy['fp16_token_share']:.3f}",
        )
        for name, policy in report["policies"].items()
    ]
    text = f"Arrivals thinned to {report['thinned_to']:g}, {report['replicas']} replicas."
    return f"{_markdown(head, lines)}\n\n{text}"


def _calibration(fits: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "engine",
        "mode",
        "batch, in/out",
        "roofline: throughput, TTFT, TPOT",
        "fitted: throughput, TTFT, TPOT",
    )
    lines = [
        (
            fit["file"].removesuffix(".json"),
            fit["mode"],
            f"{batch}, {prompt}/{output}",
            ", ".join(f"{100 * error:+.0f} %" for error in assumed),
            ", ".join(f"{100 * error:+.0f} %" for error in fitted),
        )
        for fit in fits
        for (batch, prompt, output), assumed, fitted in zip(
            fit["cells"], fit["roofline_errors"], fit["fitted_errors"], strict=True
        )
    ]
    return "Simulated over measured engine, less one:\n\n" + _markdown(head, lines)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


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


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
