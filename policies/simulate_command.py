"""``nestedfp simulate``: replay a trace on simulated replicas under a policy, and print what came of it.

The reader of trace files is handed in, so that this package needs none of the load-test code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import CONTROLLERS, PolicyConfig
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation.state import EngineSettings, Workload

ReadTrace = Callable[[Path], Workload]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nestedfp simulate``."""
    parser.add_argument(
        "--trace", type=Path, required=True, help="trace file: Azure CSV, Mooncake JSONL, ..."
    )
    parser.add_argument("--policy", choices=CONTROLLERS, default="predictive", help="how modes are chosen")
    parser.add_argument("--replicas", type=int, default=1, help="simulated H100 replicas, 1 to 1,000")
    parser.add_argument("--seed", type=int, default=0, help="of routing and of the step times' noise")
    parser.add_argument("--rate", type=float, help="mean requests per second to scale the trace to")
    parser.add_argument(
        "--engine",
        type=Path,
        help="file of `nestedfp bench engine` to fit the replicas' step times to, which takes half a minute"
        " (default: an H100's roofline)",
    )
    parser.add_argument("--settings", type=Path, help="JSON file with policy settings")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace, read_trace: ReadTrace) -> int:
    """Simulate and print; returns the exit status, 2 where the input cannot be used."""
    # The compiled engine takes a second to load, which `--help` need not wait for.
    from nestedfp.policies.simulation.calibration import measured_engine
    from nestedfp.policies.simulation.cluster import simulate
    from nestedfp.policies.simulation.state import rescaled
    from nestedfp.policies.simulation.summary import summarize

    try:
        checks.integer("--seed", arguments.seed)
        given = _json_object("--settings", arguments.settings) if arguments.settings else {}
        with checks.within("--settings"):
            config = PolicyConfig.from_dict({**given, "controller": arguments.policy})
        workload = read_trace(arguments.trace)
        if arguments.rate is not None:
            workload = rescaled(workload, arguments.rate)
        settings = EngineSettings()
        if arguments.engine:
            benchmark = _json_object("--engine", arguments.engine)
            try:
                with checks.within("--engine"):
                    settings = measured_engine(benchmark, say=_say)
            finally:
                _say("")
        started = time.perf_counter()
        outcome = simulate(
            workload, Policy(config), replicas=arguments.replicas, seed=arguments.seed, settings=settings
        )
    except (ValueError, OSError) as error:
        print(f"nestedfp simulate: {error}", file=sys.stderr)
        return 2
    summary = summarize(outcome, config.slo, settings.label)
    summary["policy"] = arguments.policy
    summary["seed"] = arguments.seed
    summary["trace"] = arguments.trace.name
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(_table(summary, time.perf_counter() - started))
    return 0


def _json_object(option: str, path: Path) -> dict[str, Any]:
    """The content of the file that an option names."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidField(option, str(path), f"give a file of JSON ({error})") from None
    if not isinstance(content, dict):
        raise InvalidField(option, str(path), "give a file that holds one JSON object")
    return content


def _say(text: str) -> None:
    """Show progress in place of what was said before; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _table(summary: dict[str, Any], wall_s: float) -> str:
    requests, ttft, tpot = summary["requests"], summary["ttft_ms"], summary["tpot_ms"]
    rows = [
        ("policy", summary["policy"]),
        ("requests", f"{requests['sent']} sent, {requests['ok']} ok, {requests['shed']} shed"),
        ("SLO attainment", f"{100 * summary['attainment']:.2f} %"),
        ("tokens in 16 bits", f"{100 * summary['fp16_token_share']:.2f} %"),
        ("TTFT p50, p90, p99", f"{ttft['p50']}, {ttft['p90']}, {ttft['p99']} ms"),
        ("TPOT p50, p90, p99", f"{tpot['p50']}, {tpot['p90']}, {tpot['p99']} ms"),
        ("flips", f"{summary['flips']}, at most {summary['max_flips_in_a_minute']} a replica and minute"),
        ("simulated", f"{summary['duration_s']:.0f} s on {summary['replicas']} replicas in {wall_s:.1f} s"),
        ("figures are", summary["label"]),
    ]
    return "\n".join(f"{name:<20} {value}" for name, value in rows)
