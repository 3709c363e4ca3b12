"""Policies against each other on the same loads, simulated. Writes bench/data/policy.json.

Every load is scaled to a share of the cluster's capacity: the highest Poisson rate of that load's lengths
at which static FP16 meets the SLO. Every policy sees the same requests and the same seed.

    NESTEDFP_TRACES=FOLDER python bench/policy.py [--replicas 4] [--seed 1] [--limit 20000]
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestedfp.loadtests.readers import read_trace
from nestedfp.loadtests.synthetic import Lengths, gamma, square_wave
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation.capacity import capacity_rps
from nestedfp.policies.simulation.cluster import simulate
from nestedfp.policies.simulation.state import EngineSettings, Workload, poisson, rescaled
from nestedfp.policies.simulation.summary import summarize

POLICIES = ("static-fp16", "static-fp8", "threshold", "predictive")
TRACES = {
    "azure-code-2023": "azure_code_2023-11-16.csv",
    "azure-conv-2023": "azure_conv_2023-11-16.csv",
    "azure-conv-2024": "azure_conv_2024-05-14_1400_20min.csv",
}
SHARES = (0.6, 0.9, 1.2)
PROMPT, OUTPUT = Lengths(1000, cv=1.0, longest=8000), Lengths(150, cv=1.0, longest=1000)
DATA = Path(__file__).parent / "data" / "policy.json"


def static(mode: str) -> Policy:
    return Policy(PolicyConfig(controller=f"static-{mode}"))


def loads(folder: Path, limit: int, replicas: int, seed: int) -> Iterator[tuple[str, float, float, Workload]]:
    """Name, share of capacity, capacity in requests per second, and the load."""
    for name, file in TRACES.items():
        trace = read_trace(folder / file, limit=limit)
        capacity = capacity_rps(trace, static("fp16"), replicas=replicas, seed=seed)
        for share in SHARES:
            yield name, share, capacity, rescaled(trace, share * capacity)
    even = gamma(PROMPT, OUTPUT, rate_rps=10.0, duration_s=400.0, seed=seed)
    capacity = capacity_rps(even, static("fp16"), replicas=replicas, seed=seed)
    for share in (0.8, 1.0):
        burst, calm = 1.5 * share * capacity, 0.5 * share * capacity
        wave = square_wave(
            PROMPT, OUTPUT, calm_rps=calm, burst_rps=burst, calm_s=40.0, burst_s=15.0, bursts=5, seed=seed
        )
        yield "square-wave", share, capacity, wave
    for share in SHARES:
        bursts = gamma(PROMPT, OUTPUT, rate_rps=share * capacity, duration_s=240.0, cv=4.0, seed=seed)
        yield "gamma-cv4", share, capacity, bursts


def compare(load: Workload, replicas: int, seed: int) -> dict[str, Any]:
    """Every policy's summary on one load, and the bars that follow."""
    settings = EngineSettings()
    results: dict[str, Any] = {}
    for name in POLICIES:
        config = PolicyConfig(controller=name)
        started = time.perf_counter()
        outcome = simulate(load, Policy(config), replicas=replicas, seed=seed, settings=settings)
        results[name] = summarize(outcome, config.slo, settings.label)
        print(
            f"    {name:12s} attainment {results[name]['attainment']:.4f}, 16-bit tokens"
            f" {results[name]['fp16_token_share']:.3f}, flips {results[name]['flips']}"
            f" ({time.perf_counter() - started:.1f} s)",
            flush=True,
        )
    best, fixed = results["static-fp8"]["attainment"], results["static-fp16"]["attainment"]
    for name in POLICIES[2:]:
        reached = results[name]["attainment"]
        results[name]["points_below_static_fp8"] = 100 * (best - reached)
        results[name]["violations_cut"] = (reached - fixed) / (1 - fixed) if fixed < 1 else None
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, default=20_000, help="first requests of each trace to use")
    arguments = parser.parse_args()
    folder = Path(os.environ["NESTEDFP_TRACES"])
    rows = []
    for name, share, capacity, load in loads(folder, arguments.limit, arguments.replicas, arguments.seed):
        print(f"{name} at {share:g} of {capacity:.2f} requests/s", flush=True)
        results = compare(load, arguments.replicas, arguments.seed)
        rows.append({"load": name, "share": share, "capacity_rps": capacity, "policies": results})
    steady = compare_steady(rows, folder, arguments)
    report = {
        "label": EngineSettings().label,
        "replicas": arguments.replicas,
        "seed": arguments.seed,
        "limit": arguments.limit,
        "loads": rows,
        "steady": steady,
    }
    DATA.write_text(json.dumps(report, indent=1) + "\n")


def compare_steady(rows: list[dict[str, Any]], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """An hour of Poisson arrivals at 60 % of the conversation trace's capacity."""
    capacity = next(row["capacity_rps"] for row in rows if row["load"] == "azure-conv-2023")
    lengths = read_trace(folder / TRACES["azure-conv-2023"])
    print("an hour of Poisson arrivals at 0.6", flush=True)
    return compare(
        poisson(lengths, 0.6 * capacity, 3600.0, arguments.seed), arguments.replicas, arguments.seed
    )


if __name__ == "__main__":
    main()
