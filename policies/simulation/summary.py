"""The figures of a simulation, with the names and formulas of the load tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from nestedfp.policies.config import Slo
from nestedfp.policies.simulation.cluster import Outcome
from nestedfp.policies.simulation.engine import SHED
from nestedfp.policies.simulation.state import Bools, Floats, Requests


def ttft_s(requests: Requests) -> Floats:
    """TTFT of every request in seconds; NaN without a first token."""
    result: Floats = requests["first_s"] - requests["arrival_s"]
    return result


def tpot_s(requests: Requests) -> Floats:
    """Mean TPOT of every request, (E2EL - TTFT) / (output - 1) s; 0 for one token, NaN if unfinished."""
    spans = requests["finish_s"] - requests["first_s"]
    return np.where(requests["output"] > 1, spans / np.maximum(requests["output"] - 1, 1), spans)


def attained(requests: Requests, slo: Slo) -> Bools:
    """Which requests met both limits of the SLO; shed and unfinished ones did not."""
    with np.errstate(invalid="ignore"):
        return (ttft_s(requests) <= slo.ttft_s) & (tpot_s(requests) <= slo.tpot_s)


def summarize(outcome: Outcome, slo: Slo, label: str) -> dict[str, Any]:
    """A JSON-ready summary; ``label`` says what the numbers rest on."""
    requests = outcome.requests
    met = attained(requests, slo)
    fp16, fp8 = int(requests["fp16"].sum()), int(requests["fp8"].sum())
    finished = np.isfinite(requests["finish_s"])
    replicas = len(outcome.engines.replicas)
    minutes = max(outcome.duration_s / 60.0, 1e-9)
    result: dict[str, Any] = {
        "label": label,
        "requests": {
            "sent": len(met),
            "ok": int(finished.sum()),
            "shed": int((requests["replica"] == SHED).sum()),
            "failed": int((~finished & (requests["replica"] != SHED)).sum()),
        },
        "duration_s": outcome.duration_s,
        "replicas": replicas,
        "replica_seconds": outcome.replica_seconds,
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "attainment": float(met.mean()),
        "goodput_rps": float(met.sum()) / max(outcome.duration_s, 1e-9),
        "tokens": {"fp16": fp16, "fp8": fp8},
        "fp16_token_share": fp16 / max(fp16 + fp8, 1),
        "flips": len(outcome.flips),
        "flips_per_replica_minute": len(outcome.flips) / replicas / minutes,
        "max_flips_in_a_minute": busiest_minute(outcome.flips),
        "step_switches": int(outcome.engines.replicas["flips"].sum()),
        "preemptions": int(outcome.engines.replicas["preemptions"].sum()),
        "ttft_ms": _percentiles(ttft_s(requests)[finished]),
        "tpot_ms": _percentiles(tpot_s(requests)[finished & (requests["output"] > 1)]),
    }
    if bool(requests["strict"].any()):
        strict = requests["strict"]
        result["strict"] = {
            "sent": int(strict.sum()),
            "attainment": float(met[strict].mean()),
            "fp8_tokens": int(requests["fp8"][strict].sum()),
        }
    return result


def busiest_minute(flips: list[dict[str, Any]]) -> int:
    """Most mode changes of one replica in any 60 s."""
    by_replica: dict[str, list[float]] = {}
    for flip in flips:
        by_replica.setdefault(flip["replica_id"], []).append(flip["at"])
    most = 0
    for times in by_replica.values():
        ordered = np.sort(np.array(times))
        ahead = np.searchsorted(ordered, ordered + 60.0, side="left")
        most = max(most, int((ahead - np.arange(len(ordered))).max()))
    return most


def _percentiles(seconds: Floats) -> dict[str, float | None]:
    """p50, p90 and p99 in milliseconds; None without values."""
    if seconds.size == 0:
        return {"p50": None, "p90": None, "p99": None}
    values = np.percentile(seconds, [50, 90, 99]) * 1e3
    return {name: round(float(value), 3) for name, value in zip(("p50", "p90", "p99"), values, strict=True)}
