"""The driver: reports, the one ``decide``, flips under load, and the summary's formulas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.actor import PolicyActor
from nestedfp.policies.config import PolicyConfig, Slo
from nestedfp.policies.policy import Policy
from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.replica import ReplicaControl
from nestedfp.policies.simulation.cluster import Cluster, simulate
from nestedfp.policies.simulation.state import Columns, EngineSettings
from nestedfp.policies.simulation.summary import attained, busiest_minute, summarize

LENGTHS = ("prompt_tokens", "output_tokens", "strict")


def steady(rate: float, seconds: float, seed: int, prompt: int = 1000, output: int = 100) -> Columns:
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1.0 / rate, int(rate * seconds)))
    count = len(arrival)
    return Columns(
        arrival_s=arrival,
        prompt_tokens=np.full(count, prompt, dtype=np.int32),
        output_tokens=np.full(count, output, dtype=np.int32),
        strict=np.zeros(count, dtype=np.bool_),
    )


def calm_burst_calm(seed: int = 1) -> Columns:
    parts = [steady(16.0, 30.0, seed), steady(56.0, 20.0, seed + 1), steady(16.0, 60.0, seed + 2)]
    starts = [0.0, 30.0, 50.0]
    arrival = np.concatenate([part.arrival_s + start for part, start in zip(parts, starts, strict=True)])
    order = np.argsort(arrival)
    columns = [
        np.concatenate([getattr(part, name) for part in parts])[order] for name in Columns.__slots__[1:]
    ]
    return Columns(arrival[order], *columns)


def settings(controller: str, between: str = "auto") -> PolicyConfig:
    return PolicyConfig.from_dict({"controller": controller, "prediction": {"between": between}})


@pytest.mark.parametrize(
    ("controller", "between", "share", "least_fp8"),
    [("threshold", "", 0.2, 0.3), ("predictive", "", 0.2, 0.3), ("predictive", "auto", 0.01, 0.03)],
)
def test_a_burst_is_served_in_fp8_and_calm_in_16_bits(
    controller: str, between: str, share: float, least_fp8: float
) -> None:
    """``share`` bounds the requests missed, of those that 16 bits alone miss.

    ``least_fp8`` bounds the burst's tokens in FP8 from below. Within ``auto`` fewer do: only those steps that
    16 bits would not finish in time.
    """
    load = calm_burst_calm()
    outcome = simulate(load, Policy(settings(controller, between)), replicas=2, seed=1)
    fixed = simulate(load, Policy(settings("static-fp16")), replicas=2, seed=1)
    slo = Slo()
    missed = 1.0 - attained(outcome.requests, slo).mean()
    missed_fixed = 1.0 - attained(fixed.requests, slo).mean()
    assert missed_fixed > 0.2
    assert missed <= share * missed_fixed
    requests = outcome.requests
    burst = (requests["arrival_s"] > 32.0) & (requests["arrival_s"] < 48.0)
    calm = requests["arrival_s"] < 25.0
    in_fp8 = requests["fp8"] / (requests["fp8"] + requests["fp16"])
    assert in_fp8[burst].mean() > least_fp8 > 2.0 * in_fp8[calm].mean()
    assert busiest_minute(outcome.flips) <= 6
    assert all(flip["signal"] and flip["value"] is not None for flip in outcome.flips)
    if between == "auto":
        return
    to_fp8 = [flip["at"] for flip in outcome.flips if flip["to"] == "fp8"]
    back = [flip["at"] for flip in outcome.flips if flip["to"] == "fp16"]
    assert 30.0 < min(to_fp8) < 40.0
    assert max(back) > max(to_fp8) > 30.0
    assert set(outcome.timeline.modes[20]) == {0}
    assert set(outcome.timeline.modes[-1]) == {0}


@pytest.mark.parametrize(
    ("controller", "between"), [("threshold", ""), ("predictive", ""), ("predictive", "auto")]
)
def test_steady_load_flips_at_most_once(controller: str, between: str) -> None:
    outcome = simulate(steady(7.0, 300.0, 2), Policy(settings(controller, between)), replicas=1, seed=1)
    assert len(outcome.flips) <= (1 if between else 0)
    assert outcome.requests["fp8"].sum() <= 0.01 * outcome.requests["fp16"].sum()


def test_actor_replica_and_simulator_run_the_same_decide(
    monkeypatch: pytest.MonkeyPatch, report: Callable[..., ReplicaReport], idle: dict[str, Any]
) -> None:
    """All three go through ``Policy.decide``, and on the same facts say the same."""
    callers: list[str] = []
    original = Policy.decide

    def spy(self: Policy, snapshot: Any, state: Any, now: float) -> Any:
        callers.append(snapshot.replicas[0].report.boot_id)
        return original(self, snapshot, state, now)

    monkeypatch.setattr(Policy, "decide", spy)
    config = PolicyConfig.from_dict({"thresholds": {"waiting": {"high": 8, "low": 1}}})
    simulate(steady(5.0, 1.0, 3), Policy(config), replicas=1, seed=1)
    actor = PolicyActor(config)
    actor._admit(report(boot_id="seen by the actor", waiting=9))
    actor._decide(time.monotonic())
    control = ReplicaControl("a", config, boot_id="seen by the replica")
    control.begin({**idle, "waiting": 9})
    assert control.order().mode == "fp8"
    assert {"simulated", "seen by the actor", "seen by the replica"} <= set(callers)


def test_reports_say_what_the_engine_holds() -> None:
    cluster = Cluster(steady(60.0, 3.0, 4), 1, EngineSettings(noise=0.0), seed=0, slo=Slo())
    cluster.tick(2.0)
    (view,) = cluster.views()
    arrived = cluster.requests["arrival_s"] <= 2.0
    replica = cluster.requests[arrived]
    started = replica["computed"] > 0
    unfinished = np.isnan(replica["finish_s"])
    in_queue = int(arrived.sum()) - view.report.running - int((~unfinished).sum())
    assert view.report.waiting == in_queue > 0
    assert view.report.waiting_prompt_tokens == 1000 * in_queue
    assert view.report.running >= int((started & unfinished).sum())
    assert view.report.context_tokens is not None
    assert view.report.context_tokens >= int(replica["computed"][unfinished].sum())
    oldest = float(replica["arrival_s"][-in_queue])
    assert view.report.oldest_waiting_s == pytest.approx(2.0 - oldest)
    ttft = (replica["first_s"] - replica["arrival_s"])[np.isfinite(replica["first_s"])]
    assert view.report.ttft_p90_s == pytest.approx(np.percentile(ttft, 90), rel=0.1)


def test_the_summary_counts_what_was_served() -> None:
    load = steady(10.0, 20.0, 5)
    outcome = simulate(load, Policy(PolicyConfig(controller="static-fp16")), replicas=1, seed=2)
    summary = summarize(outcome, Slo(), "simulated: test")
    requests = outcome.requests
    ttft = requests["first_s"] - requests["arrival_s"]
    tpot = (requests["finish_s"] - requests["first_s"]) / 99
    assert summary["attainment"] == pytest.approx(((ttft <= 1.0) & (tpot <= 0.033)).mean())
    assert summary["ttft_ms"]["p90"] == pytest.approx(1e3 * np.percentile(ttft, 90), abs=1e-3)
    assert summary["tpot_ms"]["p50"] == pytest.approx(1e3 * np.percentile(tpot, 50), abs=1e-3)
    assert summary["tokens"] == {"fp16": 200 * 1099, "fp8": 0}
    assert summary["requests"] == {"sent": 200, "ok": 200, "shed": 0, "failed": 0}
    assert summary["label"].startswith("simulated")


def test_busiest_minute_counts_per_replica() -> None:
    flips = [{"replica_id": "a", "at": at} for at in (0.0, 10.0, 59.9, 60.0, 200.0)]
    assert busiest_minute(flips) == 3
    assert busiest_minute([]) == 0
