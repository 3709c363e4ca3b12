"""`nestedfp demo`: a bursty trace on one application: pinned to FP8 if asked, to FP16, then under the policy.

Everything is real: vLLM engines with nested weights, Ray Serve, the policy actor, Locust. The settings, SLO
and thresholds included, stand in the configuration file before the run; nothing is tuned while it goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, Final

from nestedfp import models
from nestedfp.deployments import timeline
from nestedfp.deployments.cluster import RunningApp, StartFailed, running
from nestedfp.deployments.config import SIMULATED
from nestedfp.deployments.interrupt import Interrupted, raise_on_signals
from nestedfp.deployments.serve import DEFAULT_CONFIG, with_overrides
from nestedfp.deployments.serve_file import ServeFile
from nestedfp.deployments.vllm_openai import vllm_version
from nestedfp.loadtests.comparison import compare
from nestedfp.loadtests.metrics import summarize, summarize_timeline
from nestedfp.loadtests.outcome import Outcome
from nestedfp.loadtests.records import read_timeline
from nestedfp.loadtests.replay import ReplayError, replay
from nestedfp.loadtests.report import BASELINE, STATIC, beside_static, write_report
from nestedfp.loadtests.settings import ReplaySettings
from nestedfp.loadtests.synthetic import Lengths, square_wave
from nestedfp.loadtests.table import run_table
from nestedfp.loadtests.traces import Trace
from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.roofline import LABEL

_PINNED: Final = {"static_fp8": FP8, BASELINE: FP16}
"""The modes to replay in, by where a summary keeps them, in order: the policy begins in FP16."""
_PIN_S: Final = 3600.0
_QUIET_WITHIN_S: Final = 30.0
_POLL_S: Final = 0.25
_PACKAGES: Final = ("torch", "ray", "locust", "nestedfp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="Serve file of the application")
    parser.add_argument("--model", help="Hugging Face id or local folder instead of the file's engine.model")
    parser.add_argument("--port", type=int, help="HTTP port, instead of the file's")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the results")
    parser.add_argument("--calm", action="store_true", help="the same length without the burst")
    parser.add_argument("--static-fp8", action="store_true", help="replay the trace pinned to FP8, too")
    parser.add_argument("--calm-rps", type=float, default=0.6, help="arrivals/s outside the burst")
    parser.add_argument("--burst-rps", type=float, default=5.5, help="arrivals/s in the burst")
    parser.add_argument("--calm-s", type=float, default=22.0, help="seconds before the burst, and after")
    parser.add_argument("--burst-s", type=float, default=16.0, help="seconds of the burst")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="mean prompt length")
    parser.add_argument("--output-tokens", type=int, default=12, help="mean output length")
    parser.add_argument("--seed", type=int, default=2, help="of arrivals, lengths and prompts")


def run(args: argparse.Namespace) -> int:
    """The command. 0: every replay ran and no request failed; 1 otherwise; 130 where interrupted."""
    raise_on_signals()
    try:
        file = with_overrides(ServeFile.load(args.config), args.model, args.port)
        summary = _demonstrate(file, args)
    except (StartFailed, ReplayError, InvalidField, models.ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        print("interrupted; everything was stopped", file=sys.stderr)
        return 130
    return 1 if any(side["requests"]["failed"] for side in beside_static(summary, "policy").values()) else 0


def _demonstrate(file: ServeFile, args: argparse.Namespace) -> dict[str, Any]:
    trace = _trace(args)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    slo = dataclasses.asdict(file.settings.policy.slo)
    engine = file.settings.engine
    _say(f"model {engine.model}, {file.settings.replicas_at_start} replicas, device {engine.device}")
    _say(f"SLO: {_show(slo)}")
    for name, water in file.settings.policy.water.items():
        _say(f"threshold {name}: FP8 from {water.high:g}, calm at {water.low:g}")
    _say(f"trace: {trace.history[0]}; {len(trace)} requests")

    with running(file, say=_say) as app:
        _say(f"serving at {app.url}")
        static = {}
        for name, mode in _PINNED.items():
            if name == BASELINE or args.static_fp8:
                _say(f"replay in {STATIC[name]}")
                app.pin(mode, _PIN_S)
                static[name] = _replay(app, trace, _folder(out, name), args.seed, slo, mode)
        app.unpin()
        _say("replay under the policy")
        policy = _replay(app, trace, out, args.seed, slo, FP16)

    comparison = compare(static[BASELINE], policy)
    summary = {
        "engine": _engine_name(engine.device),
        "model": engine.served_model_name,
        "replicas": file.settings.replicas_at_start,
        **policy,
        "slo": slo,
        "policy": file.settings.policy.to_dict(),
        "trace": trace.describe(),
        **static,
        "comparison": comparison,
        "machine": {"processor": _processor(), "system": platform.platform()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(
        out / "requests.jsonl",
        out / "timeline.jsonl",
        summary,
        out / "report.html",
        baseline_requests=_folder(out, BASELINE) / "requests.jsonl",
    )
    print(run_table(beside_static(summary, "policy")))
    for sentence in comparison["sentences"]:
        print(sentence)
    for name in ("summary.json", "requests.jsonl", "report.html"):
        print(f"wrote {out / name}")
    return summary


def _trace(args: argparse.Namespace) -> Trace:
    for option in ("calm_rps", "burst_rps"):
        checks.number(_option(option), getattr(args, option))
    for option in ("calm_s", "burst_s"):
        checks.number(_option(option), getattr(args, option), above=0.0)
    for option in ("prompt_tokens", "output_tokens"):
        checks.integer(_option(option), getattr(args, option), minimum=1)
    checks.integer("--seed", args.seed)
    try:
        return square_wave(
            Lengths(args.prompt_tokens, 0.5, longest=4 * args.prompt_tokens),
            Lengths(args.output_tokens, 0.5, longest=4 * args.output_tokens),
            calm_rps=args.calm_rps,
            burst_rps=args.calm_rps if args.calm else args.burst_rps,
            calm_s=args.calm_s,
            burst_s=args.burst_s,
            seed=args.seed,
        )
    except ValueError as error:
        # Each option by itself is good: together they give no request.
        remedy = f"give more, or a higher --burst-rps ({error})"
        raise InvalidField("--calm-rps", args.calm_rps, remedy) from None


def _folder(out: Path, side: str) -> Path:
    return out / side.replace("_", "-")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _replay(
    app: RunningApp, trace: Trace, out: Path, seed: int, slo: dict[str, float], rest: str
) -> dict[str, Any]:
    """Replay once, record the timeline until the replicas are quiet, in mode `rest`, and summarise."""
    out.mkdir(parents=True, exist_ok=True)
    before = app.policy_status()
    settings = ReplaySettings(url=app.url, model=app.model, seed=seed)
    with timeline.Recorder(out / "timeline.jsonl", app.policy_status) as recorder:

        def on_start(outcome: Outcome) -> None:
            recorder.start(outcome.started_monotonic, outcome.started_unix)

        replay(trace, settings, out / "requests.jsonl", on_start=on_start)
        status = _await_quiet(app, rest)
    run = summarize(out / "requests.jsonl", slo)
    run |= summarize_timeline(read_timeline(out / "timeline.jsonl"), run["duration_s"])
    # The engines' own count of executed steps; `usage` counts the same tokens request by request.
    run["tokens"] = timeline.tokens_between(before, status)
    return run


def _await_quiet(app: RunningApp, rest: str) -> dict[str, Any]:
    """The policy's status once every replica is idle and in mode `rest`, or after a while in any case."""
    deadline_s = time.monotonic() + _QUIET_WITHIN_S
    replicas = app.file.settings.replicas_at_start
    while True:
        status = app.policy_status()
        if timeline.is_quiet(status, replicas, rest) or time.monotonic() > deadline_s:
            return status
        time.sleep(_POLL_S)


def _engine_name(device: str) -> str:
    return LABEL if device == SIMULATED else f"vllm {vllm_version()}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _show(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _say(text: str) -> None:
    print(f"[demo] {text}", flush=True)
