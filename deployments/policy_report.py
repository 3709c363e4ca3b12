"""``nestedfp report policy``: the pictures and tables of docs/policy.md, from bench/data/policy.json, and the
minute through Ray Serve, from bench/data/serve-policy.json.

Nothing in them is typed: the part of docs/policy.md between its two marks is written anew, and so are the
two pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from nestedfp.deployments.policy_pictures import burst, front
from nestedfp.loadtests.markdown import markdown

BEGIN: Final = "<!-- policy: begin (nestedfp report policy) -->"
END: Final = "<!-- policy: end -->"
FRONT, BURST = "policy-front.svg", "policy-burst.svg"
WITHIN_POINTS: Final = 1.0
OF_THE_ORACLE: Final = 0.9
"""The bars: points below static FP8 at most, and the oracle's share of 16-bit tokens at least."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nestedfp report policy``."""
    parser.add_argument(
        "--data", type=Path, default=Path("bench/data/policy.json"), help="made by bench/policy.py"
    )
    parser.add_argument(
        "--live",
        type=Path,
        default=Path("bench/data/serve-policy.json"),
        help="made by bench/serve_policy.py; its table is left out where the file is missing",
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder with policy.md and the pictures"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where anything is stale")


def run(args: argparse.Namespace) -> int:
    """Write or check; returns the exit status: 1 where something is stale, 2 for unusable data."""
    try:
        data = json.loads(args.data.read_text())
        live = json.loads(args.live.read_text()) if args.live.exists() else {}
        page = (args.docs / "policy.md").read_text()
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
        files = {
            "policy.md": f"{before}{BEGIN}\n{tables(data, live)}\n{END}{after}",
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


def tables(data: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    """All tables, as Markdown; ``live`` holds the runs through Ray Serve, if there are any."""
    parts = [
        f"{data['label']}; {data['settings']['replicas']} replicas, seed {data['settings']['seed']}.",
        f"![Attainment over the share of tokens in 16 bits]({FRONT})",
        _loads(data["loads"]),
        _bars(data["loads"]),
    ]
    if "held_out" in data:
        seed = data["settings"]["held_out_seed"]
        parts += [f"The same on seed {seed}, on which nothing was tuned:", _loads(data["held_out"])]
        parts.append(_bars(data["held_out"]))
    for part, seed in (("measured", "seed"), ("measured_held_out", "held_out_seed")):
        if part in data:
            label = data[part][0]["policies"]["predictive"]["label"]
            parts.append(f"Seed {data['settings'][seed]}; {label}.")
            parts += [_loads(data[part]), _bars(data[part])]
    parts.append(f"![One burst, second by second]({BURST})")
    if "steady" in data:
        parts.append(_steady(data["steady"]))
    if "scaling" in data:
        parts += [_scaling(report) for report in data["scaling"]]
    if "paper" in data:
        parts.append(_paper(data["paper"]))
    if "minute" in live:
        parts.append(_minute(live["minute"]))
    if orders := [report for section, report in live.items() if section.startswith("delivery-")]:
        parts.append(_deliveries(orders))
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
        "static FP16 (steps cut)",
        "static FP8 (steps cut)",
        "threshold",
        "predictive",
        "points below FP8 (steps cut)",
        "fewer violations than FP16",
        "16-bit tokens",
        "oracle (bound)",
        "of the oracle",
        "the oracle on unseen noise: attainment; share at the same; of it",
        "most flips a replica and minute",
    )
    lines = []
    for row in rows:
        ours, oracle = row["policies"]["predictive"], row.get("oracle")
        shown = {name: f"{100 * policy['attainment']:.2f}" for name, policy in row["policies"].items()}
        lines.append(
            (
                row["load"],
                f"{100 * row['share']:.0f} % of {row['capacity_rps']:.1f}/s",
                *(f"{shown[name]} ({shown[f'{name}-cut']})" for name in ("static-fp16", "static-fp8")),
                shown["threshold"],
                shown["predictive"],
                f"{ours['points_below_static_fp8']:+.2f} ({ours['points_below_static_fp8_cut']:+.2f})",
                "–" if ours["violations_cut"] is None else f"{100 * ours['violations_cut']:.1f} %",
                f"{ours['fp16_token_share']:.3f}",
                f"{oracle['fp16_token_share']:.3f} ({oracle['bound']:.3f})" if oracle else "–",
                f"{oracle['predictive_over_oracle']:.2f}"
                if oracle and oracle["predictive_over_oracle"]
                else "–",
                _unseen(oracle.get("unseen_noise") if oracle else None),
                str(ours["max_flips_in_a_minute"]),
            )
        )
    return markdown(head, lines)


def _unseen(held: Mapping[str, Any] | None) -> str:
    """What the oracle's schedule is worth on noise that its search has not seen."""
    if held is None:
        return "–"
    share, ratio = held["share"], held["predictive_over_held"]
    shown = "none keeps it" if share is None else f"{share:.3f}"
    return f"{100 * held['found_attainment']:.2f}; {shown}; " + ("–" if ratio is None else f"{ratio:.2f}")


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many loads meet the bars on attainment and tokens in 16 bits, and how far off the others are."""
    names = [f"{row['load']} at {100 * row['share']:.0f} %" for row in rows]
    below = {
        name: row["policies"]["predictive"]["points_below_static_fp8"]
        for name, row in zip(names, rows, strict=True)
    }
    # Exactly a point is within it, whatever the difference of two shares is as a float.
    behind = {name: points for name, points in below.items() if points > WITHIN_POINTS + 1e-9}
    text = f"Within {WITHIN_POINTS:g} point of static FP8: {len(rows) - len(behind)} of {len(rows)} loads"
    text += "".join(f"; {name} is {points:.2f} below" for name, points in behind.items()) + "."
    ratios = {
        name: row["oracle"]["predictive_over_oracle"]
        for name, row in zip(names, rows, strict=True)
        if row.get("oracle") and row["oracle"]["predictive_over_oracle"] is not None
    }
    if not ratios:
        return text
    short = {name: ratio for name, ratio in ratios.items() if ratio < OF_THE_ORACLE}
    text += (
        f" At least {OF_THE_ORACLE:.2f} of the oracle's share: {len(ratios) - len(short)} of {len(ratios)}"
    )
    return text + "".join(f"; {name} {ratio:.4f}" for name, ratio in short.items()) + "."


def _steady(row: Mapping[str, Any]) -> str:
    head = (
        "an hour of Poisson arrivals at 60 %",
        "attainment, %",
        "16-bit tokens",
        "flips a replica and hour",
        "after the first minute",
    )
    lines = [
        (
            name,
            f"{100 * policy['attainment']:.2f}",
            f"{policy['fp16_token_share']:.3f}",
            f"{policy['flips_per_replica_hour']:.2f}",
            f"{policy['settled_flips_per_replica_hour']:.2f}"
            if "settled_flips_per_replica_hour" in policy
            else "–",
        )
        for name, policy in row["policies"].items()
    ]
    return markdown(head, lines)


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
        f"{report['joint']['violations']:,} requests miss the SLO instead of "
        f"{report['serve-fp16']['violations']:,} with autoscaling alone",
        f"{saved:.0f} % fewer replica-hours",
    ]
    if of_fp8 is not None:
        share = "more than" if of_fp8 > 1.0 else f"{100 * of_fp8:.0f} % of what"
        facts.append(f"{share} static FP8 with autoscaling saves")
    text = f"Load: {report['load']}; a replica starts in {report['startup_s']:g} s. {', '.join(facts)}."
    return f"{markdown(head, lines)}\n\n{text}"


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
    return f"{markdown(head, lines)}\n\n{text}"


def _minute(report: Mapping[str, Any]) -> str:
    head = (
        f"{report['seconds']} s live through Ray Serve",
        "violating seconds",
        "seconds mostly in 16 bits",
        "seconds without FP8",
        "time in 16 bits",
        "16-bit tokens",
    )
    by_policy: dict[str, list[Mapping[str, Any]]] = {}
    for run in report["runs"]:
        # The tries that found the scale served other requests; what came late was another minute.
        if run["scale"] == report["scale"] and run.get("counted", True):
            by_policy.setdefault(run["policy"], []).append(run)
    lines = []
    for policy, runs in by_policy.items():
        seconds = [run["seconds_in_fp16"] for run in runs]
        mostly = [each["mostly"] for each in seconds]
        lines.append(
            (
                policy,
                _median(run["violating_seconds"] for run in runs),
                f"{_median(mostly)}, {100 * median(mostly) / report['seconds']:.1f} %",
                _median(each["only"] for each in seconds),
                f"{100 * median(each['time_share'] for each in seconds):.1f} %",
                f"{median(run['tokens_in_fp16'] for run in runs):.3f}",
            )
        )
    most = max(map(len, by_policy.values()), default=0)
    each = "one run each" if most == 1 else f"medians of up to {most} runs each, with least and most"
    machine = report["machine"]
    engine = report["engine"].removeprefix("simulated: ")
    host = f"{machine['cores']} cores of {machine['processor']}"
    text = (
        f"A simulated engine ({engine}), one replica, through real Ray Serve {machine['ray']} on {host},"
        f" {report['date'][:10]}. The first {report['seconds']} s of {report['trace']}, arrivals scaled once"
        f" by {report['scale']:.4f}: {report['requests']} requests; {each}. What differs from the defaults"
        f" follows a policy's name."
    )
    return f"{markdown(head, lines)}\n\n{text}"


def _deliveries(reports: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "from a decision to engines, through real Ray Serve",
        "streams at each",
        "orders",
        "to the last replica, p50, p95, most, ms",
        "to each, p50, p95, ms",
        "on, at",
    )
    lines = []
    for report in reports:
        last, each, machine = report["to_last_replica_ms"], report["to_each_replica_ms"], report["machine"]
        lines.append(
            (
                f"{report['replicas']} replicas, {report['engine']}",
                str(report["streams_per_replica"]),
                str(report["decisions"]),
                f"{last['p50']:.0f}, {last['p95']:.0f}, {last['max']:.0f}",
                f"{each['p50']:.0f}, {each['p95']:.0f}",
                f"{machine['cores']} cores of {machine['processor']}, {report['date'][:10]}",
            )
        )
    return markdown(head, lines)


def _median(counts: Iterable[int]) -> str:
    """The median, and the least and the most where they differ."""
    every = list(counts)
    least, most = min(every), max(every)
    return f"{median(every):g}" + (f" ({least}–{most})" if least < most else "")


def _calibration(fits: Sequence[Mapping[str, Any]]) -> str:
    """How far the simulated engine is from measured ones; cell by cell it is in the data file."""
    head = (
        "engine",
        "figure",
        "roofline: median off (worst)",
        "fitted: median off (worst, at batch, in/out)",
        "within 10 %",
    )
    lines = []
    for fit in fits:
        columns = (zip(*fit[errors], strict=True) for errors in ("roofline_errors", "fitted_errors"))
        for figure, assumed, fitted in zip(("throughput", "TTFT", "TPOT"), *columns, strict=True):
            worst, (batch, prompt, output) = max(
                zip(fitted, fit["cells"], strict=True), key=lambda pair: abs(pair[0])
            )
            within = sum(abs(error) <= 0.1 for error in fitted)
            lines.append(
                (
                    f"{fit['file'].removesuffix('.json')}, {fit['dtype']} {fit['mode']}",
                    figure,
                    f"{_off(assumed)} ({100 * max(assumed, key=abs):+.0f} %)",
                    f"{_off(fitted)} ({100 * worst:+.0f} %, at {batch}, {prompt}/{output})",
                    f"{within} of {len(fitted)} cells",
                )
            )
    return "Simulated over measured engine, less one.\n\n" + markdown(head, lines)


def _off(errors: Iterable[float]) -> str:
    return f"{100 * median(map(abs, errors)):.1f} %"


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
