"""Policies against each other on the same loads, simulated. Writes bench/data/policy.json.

    NESTEDFP_TRACES=FOLDER python bench/policy.py [--replicas 4] [--seed 1] [--parts loads,...]

Parts: `loads` (every policy on every load, with the oracle), `held-out` (the same on another seed),
`measured` and `measured-held-out` (both with step times fitted to the file `--engine`), `steady`,
`paper`, `scaling`, `decide`, `million`, `calibration` (needs bench/data/engine-*.json), `classes` (requests
that insist on 16 bits; shedding).
A part that is not named keeps the figures it has. With `--policies predictive` the loads keep their
capacities and the figures of the other policies too, which no change of the predictive policy touches; with
`--loads azure-code-2023,...` the loads that are not named keep all of theirs.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from policy_loads import BURSTS, TRACES, Load, loads, policy
from policy_paper import experiment
from policy_scaling import compare_scaling

from nestedfp.loadtests.readers import read_trace
from nestedfp.policies.config import PolicyConfig, Prediction, Slo
from nestedfp.policies.policy import Policy
from nestedfp.policies.protocol import FP8, FP16, ReplicaReport
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulation.calibration import (
    calibrate,
    cells_of,
    errors_of,
    limits_of,
    measured_engine,
)
from nestedfp.policies.simulation.cluster import Outcome, simulate
from nestedfp.policies.simulation.oracle import LEVELS, schedule_of, search, share_bound
from nestedfp.policies.simulation.state import EngineSettings, poisson
from nestedfp.policies.simulation.summary import summarize, ttft_s
from nestedfp.policies.simulation.unseen import hold
from nestedfp.policies.snapshot import ReplicaView, Snapshot

POLICIES = ("static-fp16", "static-fp16-cut", "static-fp8", "static-fp8-cut", "threshold", "predictive")
HELD_OUT_SEED = 13
TRIES = 400
STEADY_S = 3700.0
SETTLED_S = 60.0
TIMELINE = ("square-wave", 1.0)
DATA = Path(__file__).parent / "data" / "policy.json"
ENGINE = DATA.parent / "engine-nvidia-h100-80gb-hbm3.json"
LOADS = (*TRACES, *BURSTS)
PARTS = (
    "loads", "held-out", "measured", "measured-held-out", "steady", "paper", "scaling", "decide", "million",
    "calibration", "classes",
)  # fmt: skip


def run(
    load: Load, name: str, replicas: int, seed: int, settings: EngineSettings
) -> tuple[dict[str, Any], Outcome]:
    """One policy on one load; it begins with the step costs of the engines."""
    chosen = policy(name, settings.model)
    outcome = simulate(load.workload, chosen, replicas=replicas, seed=seed, settings=settings)
    return summarize(outcome, Slo(), settings.label), outcome


def compare(
    load: Load,
    replicas: int,
    seed: int,
    tries: int,
    named: Sequence[str],
    before: Mapping[str, Any],
    settings: EngineSettings,
) -> dict[str, Any]:
    """The row of one load: the figures of the policies `named` and what follows from them.

    What does not depend on them is that of the row `before`. The oracle works at the predictive policy's
    attainment, so where that one is named it is searched anew, with `tries` > 0.
    """
    print(f"{load.name} at {load.share:g} of {load.capacity_rps:.2f} requests/s, seed {seed}", flush=True)
    runs = {name: run(load, name, replicas, seed, settings) for name in POLICIES if name in named}
    results = figures(before, {name: summary for name, (summary, _) in runs.items()})
    fixed, best, best_cut = (
        results[name]["attainment"] for name in ("static-fp16", "static-fp8", "static-fp8-cut")
    )
    for name in ("threshold", "predictive"):
        reached = results[name]["attainment"]
        results[name]["points_below_static_fp8"] = 100 * (best - reached)
        results[name]["points_below_static_fp8_cut"] = 100 * (best_cut - reached)
        results[name]["violations_cut"] = (reached - fixed) / (1 - fixed) if fixed < 1 else None
    row = {
        **({} if "predictive" in runs else before),
        "load": load.name,
        "share": load.share,
        "capacity_rps": load.capacity_rps,
        "requests": len(load.workload.arrival_s),
        "policies": results,
    }
    if tries and "predictive" in runs:
        outcome = runs["predictive"][1]
        row["oracle"] = oracle(load, results, outcome, replicas, seed, tries, settings)
        if (load.name, load.share) == TIMELINE:
            row["timeline"] = timeline(outcome)
    for name in POLICIES:
        shown = results[name]
        print(
            f"    {name:16s} attainment {shown['attainment']:.4f}, 16-bit tokens"
            f" {shown['fp16_token_share']:.3f}, flips {shown['flips']}",
            flush=True,
        )
    if "oracle" in row:
        print(f"    oracle           {row['oracle']}", flush=True)
    return row


def figures(before: Mapping[str, Any], anew: Mapping[str, Any]) -> dict[str, Any]:
    """By policy the figures made anew, and of the others those of the row `before`."""
    return {name: anew[name] if name in anew else before["policies"][name] for name in POLICIES}


def oracle(
    load: Load,
    results: dict[str, Any],
    outcome: Outcome,
    replicas: int,
    seed: int,
    tries: int,
    settings: EngineSettings,
) -> dict[str, Any]:
    """The best share of 16-bit tokens at the predictive policy's attainment.

    Candidates are the schedules of the search and the runs of the policies themselves, since each of them is
    a schedule too, if one of finer grain.
    """
    slo = Slo()
    target = results["predictive"]["attainment"]
    found = search(
        load.workload,
        target,
        replicas=replicas,
        seed=seed,
        settings=settings,
        slo=slo,
        starts=(schedule_of(outcome),),
        tries=tries,
    )
    held = hold(load.workload, found.schedule, target, seed=seed, settings=settings, slo=slo)
    searched = found.share if found.attainment >= target - 1e-12 else None
    reached = [row["fp16_token_share"] for row in results.values() if row["attainment"] >= target]
    share = max([*reached, *([] if searched is None else [searched])])
    bound = share_bound(load.workload, target, replicas=replicas, settings=settings, slo=slo)
    ours = results["predictive"]["fp16_token_share"]
    return {
        "attainment": target,
        "searched_share": searched,
        "fp16_token_share": share,
        "bound": bound,
        "gap": bound - share,
        "tried": found.tried,
        "levels": np.bincount(found.schedule.ravel(), minlength=len(LEVELS)).tolist(),
        "predictive_over_oracle": ours / share if share > 0 else None,
        "unseen_noise": {
            **held._asdict(),
            "predictive_over_held": ours / max(ours, held.share) if held.share and ours else None,
        },
    }


def timeline(outcome: Outcome) -> dict[str, Any]:
    """One burst, second by second."""
    seen = outcome.timeline
    seconds = slice(30, 80)
    arrival, ttft = outcome.requests["arrival_s"], ttft_s(outcome.requests)
    worst = [
        float(np.nanpercentile(ttft[inside], 90)) if inside.any() else None
        for at in seen.t_s[seconds]
        for inside in [(arrival >= at) & (arrival < at + 1.0)]
    ]
    fp16, fp8 = (np.diff(np.array(column))[seconds] for column in (seen.fp16, seen.fp8))
    return {
        "t_s": seen.t_s[seconds],
        "arrivals": seen.arrivals[seconds],
        "waiting": seen.waiting[seconds],
        "running": seen.running[seconds],
        "replicas": seen.active[seconds],
        "modes": seen.modes[seconds],
        "fp8_token_share": (fp8 / np.maximum(fp16 + fp8, 1)).tolist(),
        "ttft_p90_s": worst,
    }


def steady(
    folder: Path, capacity: float, replicas: int, seed: int, named: Sequence[str], before: Mapping[str, Any]
) -> dict[str, Any]:
    """A little over an hour of Poisson arrivals at 60 % of the conversation trace's capacity.

    Over an hour, so that flips an hour rest on a whole one: from less, one flip is more than one an hour.
    Every replica starts in 16 bits and takes its first order within seconds, so flips are also counted
    without the first minute, when the load is steady. Policies that are not `named` are those of `before`.
    """
    lengths = read_trace(folder / TRACES["azure-conv-2023"])
    arrivals = poisson(lengths, 0.6 * capacity, STEADY_S, seed)
    load = Load("poisson, azure-conv-2023 lengths", 0.6, capacity, arrivals)
    summaries: dict[str, Any] = {}
    for name in named:
        summary, outcome = run(load, name, replicas, seed, EngineSettings())
        seconds = summary["duration_s"]
        later = sum(flip["at"] >= SETTLED_S for flip in outcome.flips)
        summary["flips_per_replica_hour"] = 3600.0 * summary["flips"] / replicas / seconds
        summary["settled_flips_per_replica_hour"] = 3600.0 * later / replicas / (seconds - SETTLED_S)
        summaries[name] = summary
        print(f"steady, {name}: {summary['flips']} flips, {later} after {SETTLED_S:g} s", flush=True)
    return {
        "load": load.name,
        "share": load.share,
        "capacity_rps": capacity,
        "requests": len(load.workload.arrival_s),
        "policies": figures(before, summaries),
    }


def decide_ms(replicas: int = 1000, rounds: int = 60) -> dict[str, float]:
    """Milliseconds of CPU that one decision takes."""
    rows = [
        ReplicaReport(
            replica_id=f"r{number}",
            boot_id="bench",
            sequence=1,
            mode="auto",
            epoch=1,
            running=30 + number % 60,
            waiting=number % 5,
            waiting_prompt_tokens=700 * (number % 5),
            oldest_waiting_s=0.02 * (number % 5),
            kv_usage=0.3,
            arrivals_per_s=15.0,
            ttft_p90_s=0.2,
            tpot_p90_s=0.02,
            step_time_s=0.02,
            tokens_fp16=1000,
            tokens_fp8=1000,
            flips=3,
            age_s=0.0,
            context_tokens=40_000,
            batch_tokens=400,
            arriving_prompt_tokens_per_s=15_000.0,
            slo_miss_share=0.001 * (number % 7),
        )
        for number in range(replicas)
    ]
    snapshot = Snapshot(tuple(ReplicaView(report, 0.0) for report in rows))
    decider = policy("predictive")
    state, took = decider.start(), []
    for turn in range(rounds):
        started = time.process_time()
        _, state = decider.decide(snapshot, state, 0.1 * turn)
        took.append(1e3 * (time.process_time() - started))
    p50, p95 = np.percentile(took, [50, 95])
    return {"replicas": replicas, "rounds": rounds, "p50": float(p50), "p95": float(p95), "max": max(took)}


def million(folder: Path, seed: int) -> dict[str, Any]:
    """A million requests on 100 replicas: wall seconds by policy."""
    lengths = read_trace(folder / TRACES["azure-conv-2023"])
    rate = 0.6 * 19.3 * 100
    load = poisson(lengths, rate, 1_000_000 / rate, seed)
    took = {}
    for name in ("static-fp16", "predictive"):
        started = time.perf_counter()
        simulate(load, policy(name), replicas=100, seed=seed)
        took[name] = time.perf_counter() - started
    print(f"a million requests: {took}", flush=True)
    return {"requests": len(load.arrival_s), "replicas": 100, "wall_s": took}


def classes(folder: Path, seed: int) -> dict[str, Any]:
    """Twenty replicas: a tenth of the requests insist on 16 bits; overload, with and without shedding."""
    lengths = read_trace(folder / TRACES["azure-conv-2023"])
    report: dict[str, Any] = {}
    settings, replicas = EngineSettings(), 20
    for name, rate, strict, shed in (
        ("strict-0.1", 17.0, 0.1, False),
        ("overload", 36.0, 0.0, False),
        ("overload-shed", 36.0, 0.0, True),
    ):
        load = poisson(lengths.with_strict_share(strict, seed), rate * replicas, 60.0, seed)
        config = PolicyConfig(controller="predictive", prediction=Prediction(shed=shed))
        outcome = simulate(load, Policy(config), replicas=replicas, seed=seed, settings=settings)
        report[name] = summarize(outcome, config.slo, settings.label)
        shown = {
            key: report[name].get(key) for key in ("attainment", "requests", "fp16_token_share", "strict")
        }
        print(f"{name}: {shown}", flush=True)
    return report


def calibration() -> list[dict[str, Any]]:
    """The roofline and a fit of it against every measured engine: relative errors by cell."""
    report = []
    for path in sorted(DATA.parent.glob("engine-*.json")):
        benchmark = json.loads(path.read_text())
        limits = limits_of(benchmark)
        for dtype in ("float16", "bfloat16"):
            for contender, mode in (("nestedfp-16bit", FP16), ("nestedfp-fp8", FP8)):
                cells = cells_of(benchmark, contender, dtype)
                if not cells:
                    continue
                assumed = errors_of(latency_model().of(mode), cells, limits)
                fitted = calibrate(assumed.costs, cells, limits)
                report.append(
                    {
                        "file": path.name,
                        "dtype": dtype,
                        "mode": mode,
                        "cells": [[cell.batch, cell.prompt_tokens, cell.output_tokens] for cell in cells],
                        "errors_of": ["tokens_per_s", "ttft", "tpot"],
                        "roofline_errors": assumed.errors,
                        "fitted_errors": fitted.errors,
                        "fitted_costs": asdict(fitted.costs),
                        "fitted_host": fitted.host._asdict(),
                    }
                )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, default=20_000, help="first requests of each trace to use")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated")
    parser.add_argument("--loads", default=",".join(LOADS), help="comma-separated")
    parser.add_argument("--data", type=Path, default=DATA, help="file that keeps what is not made anew")
    parser.add_argument(
        "--engine", type=Path, default=ENGINE, help="measured engine, float16, of the parts `measured...`"
    )
    parser.add_argument("--tries", type=int, default=TRIES, help="simulations of the oracle's search")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    named = arguments.policies.split(",")
    named_loads = arguments.loads.split(",")
    fewer = set(named) < set(POLICIES) or set(named_loads) < set(LOADS)
    folder = Path(os.environ["NESTEDFP_TRACES"])
    replicas, seed = arguments.replicas, arguments.seed
    data: Path = arguments.data
    report: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {}

    def save() -> None:
        report["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        data.write_text(json.dumps(report, indent=1) + "\n")

    report["label"] = EngineSettings().label
    report["settings"] = {
        "replicas": replicas,
        "seed": seed,
        "held_out_seed": HELD_OUT_SEED,
        "limit": arguments.limit,
        "tries": arguments.tries,
        "slo": {"ttft_s": Slo().ttft_s, "tpot_s": Slo().tpot_s},
        "capacity": "highest Poisson rate at which static FP16 meets the SLO for 90 % of 60 s of requests",
        "bursts": list(BURSTS),
    }
    roofline = fitted = EngineSettings()
    if {"measured", "measured-held-out"} & set(parts):
        fitted = measured_engine(json.loads(arguments.engine.read_text()))
    for part, its_seed, settings in (
        ("loads", seed, roofline),
        ("held-out", HELD_OUT_SEED, roofline),
        ("measured", seed, fitted),
        ("measured-held-out", HELD_OUT_SEED, fitted),
    ):
        if part in parts:
            rows = []
            name = part.replace("-", "_")
            known = {(row["load"], row["share"]): row for row in report.get(name, [])} if fewer else {}
            capacities = {load: row["capacity_rps"] for (load, _), row in known.items()}
            for load in loads(folder, arguments.limit, replicas, its_seed, settings, capacities):
                before = known.get((load.name, load.share), {})
                policies = named if load.name in named_loads else ()
                rows.append(compare(load, replicas, its_seed, arguments.tries, policies, before, settings))
            report[name] = rows
            save()
    if "decide" in parts:
        report["decide_ms"] = decide_ms()
        save()
    if "paper" in parts:
        report["paper"] = experiment(folder, replicas, seed)
        save()
    if "scaling" in parts:
        report["scaling"] = list(compare_scaling(folder, seed))
        save()
    if "steady" in parts:
        rows = report["loads"]
        capacity = next(row["capacity_rps"] for row in rows if row["load"] == "azure-conv-2023")
        report["steady"] = steady(folder, capacity, replicas, seed, named, report.get("steady", {}))
        save()
    if "classes" in parts:
        report["classes"] = classes(folder, seed)
        save()
    if "calibration" in parts:
        report["calibration"] = calibration()
        save()
    if "million" in parts:
        report["million"] = million(folder, seed)
        save()


if __name__ == "__main__":
    main()
