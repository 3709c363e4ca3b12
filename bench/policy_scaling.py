"""Autoscaling, simulated: the joint rule against static precisions under Ray Serve's own policy.

The loads are an hour of Azure's conversations of 2023, every request ten times within a second, and of its
completions of code, four times. Serve's policy is tuned by a grid on another seed than the one reported: of
the settings that reach an attainment of 0.99 the one with the fewest replica-hours, or else the highest
attainment.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from nestedfp.loadtests.readers import read_trace
from nestedfp.policies.autoscaling import ScalingConfig
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.policy import Policy
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulation.cluster import simulate
from nestedfp.policies.simulation.scaling import JointScaler, Scaler, ServeScaler
from nestedfp.policies.simulation.state import EngineSettings, Workload, thickened
from nestedfp.policies.simulation.summary import summarize

SPREAD_S, STARTUP_S, START, MOST = 1.0, 120.0, 4, 10
UP_S, DOWN_S = (5.0, 30.0), (120.0, 600.0, 1800.0)
GOOD = 0.99


class Load(NamedTuple):
    """A trace, how often each of its requests is sent, and the targets that Serve's policy is tuned over."""

    name: str
    file: str
    copies: int
    targets: tuple[float, ...]


LOADS = (
    Load("azure-conv-2023", "azure_conv_2023-11-16.csv", 10, (8.0, 12.0, 16.0, 20.0, 25.0)),
    Load("azure-code-2023", "azure_code_2023-11-16.csv", 4, (0.25, 0.5, 1.0, 2.0, 4.0)),
)


def scaled(load: Workload, policy: Policy, scaler: Scaler, seed: int) -> dict[str, Any]:
    settings = EngineSettings()
    outcome = simulate(
        load, policy, replicas=START, seed=seed, settings=settings, scaler=scaler, startup_s=STARTUP_S
    )
    summary = summarize(outcome, policy.config.slo, settings.label)
    return {
        "attainment": summary["attainment"],
        "violations": round((1.0 - summary["attainment"]) * load.arrival_s.size),
        "replica_hours": summary["replica_seconds"] / 3600.0,
        "fp16_token_share": summary["fp16_token_share"],
        "flips": summary["flips"],
        "most_replicas": max(outcome.timeline.active),
    }


def serve_scaler(target: float, up_s: float, down_s: float) -> ServeScaler:
    return ServeScaler(
        min_replicas=1,
        max_replicas=MOST,
        target_ongoing_requests=target,
        upscale_delay_s=up_s,
        downscale_delay_s=down_s,
    )


def tuned(
    precision: str, load: Workload, targets: tuple[float, ...], seed: int, factor: float
) -> tuple[tuple[float, ...], list[Any]]:
    """The best settings of Serve's policy for one precision, and the whole grid; `factor` on the targets."""
    policy = Policy(PolicyConfig(controller=f"static-{precision}", decide_interval_s=1.0))
    grid = []
    for target, up_s, down_s in product(targets, UP_S, DOWN_S):
        given = (factor * target, up_s, down_s)
        grid.append({"settings": given, **scaled(load, policy, serve_scaler(*given), seed)})
        print(
            f"    {precision} {given}: {grid[-1]['attainment']:.4f}, {grid[-1]['replica_hours']:.2f} h",
            flush=True,
        )
    good = [row for row in grid if row["attainment"] >= GOOD]
    if good:
        best = min(good, key=lambda row: row["replica_hours"])
    else:
        best = max(grid, key=lambda row: row["attainment"])
    return best["settings"], grid


def compare_scaling(folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """For each load attainment and replica-hours of all three, on `seed`; the grids were searched on the seed
    after it."""
    for given in LOADS:
        trace = read_trace(folder / given.file)
        load = thickened(trace, given.copies, SPREAD_S, seed)
        other = thickened(trace, given.copies, SPREAD_S, seed + 1)
        print(f"  {given.name}", flush=True)
        yield {
            "load": f"{given.name}, every request {given.copies} times within {SPREAD_S:g} s",
            "startup_s": STARTUP_S,
            "tuned_on_seed": seed + 1,
            **_contest(load, other, given.targets, seed),
        }


def _contest(load: Workload, other: Workload, targets: tuple[float, ...], seed: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for precision, factor in (("fp16", 1.0), ("fp8", 1.5)):
        settings, grid = tuned(precision, other, targets, seed + 1, factor)
        policy = Policy(PolicyConfig(controller=f"static-{precision}", decide_interval_s=1.0))
        outcome = scaled(load, policy, serve_scaler(*settings), seed)
        report[f"serve-{precision}"] = {"settings": settings, **outcome, "grid": grid}
    config = PolicyConfig(controller="predictive")
    scaling = ScalingConfig(min_replicas=1, max_replicas=MOST)
    joint = JointScaler(config=scaling, slo=config.slo, model=latency_model())
    report["joint"] = scaled(load, Policy(config), joint, seed)
    alone, fast, both = (report[name] for name in ("serve-fp16", "serve-fp8", "joint"))
    report["replica_hours_saved"] = 1 - both["replica_hours"] / alone["replica_hours"]
    saved_fp8 = alone["replica_hours"] - fast["replica_hours"]
    saved = alone["replica_hours"] - both["replica_hours"]
    report["of_what_fp8_saves"] = saved / saved_fp8 if saved_fp8 > 0 else None
    return report
