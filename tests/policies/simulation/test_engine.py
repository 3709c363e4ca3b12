"""The simulated engine against a plain reference, its conservation laws, and its limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation import engine, recent
from nestedfp.policies.simulation.cluster import Outcome, simulate
from nestedfp.policies.simulation.state import Columns, EngineSettings
from nestedfp.policies.simulation.summary import tpot_s, ttft_s

COSTS = StepCosts(
    overhead_s=2e-3, weights_s=5e-3, token_s=2e-5, sequence_s=1e-5, context_token_s=5e-8, pair_s=1e-9
)
MODEL = LatencyModel(costs={"fp16": COSTS, "fp8": COSTS.scaled(0.5)}, chunk_tokens=256)


def workload(count: int, rate: float, seed: int, strict: float = 0.0, longest: int = 600) -> Columns:
    random = np.random.default_rng(seed)
    return Columns(
        arrival_s=np.cumsum(random.exponential(1.0 / rate, count)),
        prompt_tokens=random.integers(1, longest, count).astype(np.int32),
        output_tokens=random.integers(1, 60, count).astype(np.int32),
        strict=random.random(count) < strict,
    )


def run(
    load: Columns, policy: str = "static-fp16", replicas: int = 1, seed: int = 0, **changes: Any
) -> Outcome:
    settings = EngineSettings(**{"model": MODEL, "noise": 0.0, "flip_s": 0.0, **changes})
    config = PolicyConfig(controller=policy)
    return simulate(load, Policy(config), replicas=replicas, seed=seed, settings=settings)


def reference(load: Columns, chunk: int, most: int) -> list[tuple[float, float]]:
    """First-token and finish times of one engine with continuous batching, stepped in plain Python."""
    waiting = list(range(len(load.arrival_s)))
    batch: list[dict[str, int]] = []
    times: dict[int, list[float]] = {}
    now = 0.0
    while waiting or batch:
        if not batch:
            now = max(now, float(load.arrival_s[waiting[0]]))
        budget, context, tokens, pairs = chunk, 0, 0, 0.0
        for item in batch:
            need = item["total"] - item["computed"]
            item["take"] = min(need, budget)
            context += item["computed"] if item["take"] else 0
            pairs += item["take"] * (item["computed"] + 0.5 * item["take"]) if need > 1 else 0.0
            budget -= item["take"]
            tokens += item["take"]
        while waiting and float(load.arrival_s[waiting[0]]) <= now and budget > 0 and len(batch) < most:
            request = waiting.pop(0)
            prompt = int(load.prompt_tokens[request])
            take = min(prompt, budget)
            batch.append({"request": request, "total": prompt, "computed": 0, "take": take, "made": 0})
            pairs += 0.5 * take * take
            budget -= take
            tokens += take
        now += float(COSTS.step_s(tokens, len(batch), context, pairs))
        for item in batch:
            item["computed"] += item["take"]
            if item["take"] and item["computed"] == item["total"]:
                item["made"] += 1
                item["total"] += 1
                times.setdefault(item["request"], []).append(now)
        batch = [item for item in batch if item["made"] < int(load.output_tokens[item["request"]])]
    return [(times[request][0], times[request][-1]) for request in range(len(load.arrival_s))]


@pytest.mark.parametrize(
    ("rate", "most", "together_s"), [(2.0, 256, 0.0), (30.0, 256, 0.0), (80.0, 8, 0.0), (2.0, 256, 2.0)]
)
def test_every_time_equals_a_plain_reference(rate: float, most: int, together_s: float) -> None:
    load = workload(150, rate, seed=5)
    if together_s:
        # All that arrive within so long do at once, mostly at an idle engine.
        load = replace(load, arrival_s=np.floor(load.arrival_s / together_s) * together_s)
    requests = run(load, max_sequences=most).requests
    expected = np.array(reference(load, MODEL.chunk_tokens, most))
    np.testing.assert_allclose(requests["first_s"], expected[:, 0], rtol=1e-9)
    np.testing.assert_allclose(requests["finish_s"], expected[:, 1], rtol=1e-9)


@pytest.mark.parametrize("kv_tokens", [700, 3000, 10**6])
def test_every_request_is_served_in_full_even_when_the_cache_overflows(kv_tokens: int) -> None:
    load = workload(300, 40.0, seed=6)
    outcome = run(load, replicas=2, kv_tokens=kv_tokens)
    requests, replicas = outcome.requests, outcome.engines.replicas
    assert np.isfinite(requests["finish_s"]).all()
    np.testing.assert_array_equal(requests["generated"], load.output_tokens)
    needed = load.prompt_tokens.astype(np.int64) + load.output_tokens - 1
    np.testing.assert_array_equal(requests["computed"], needed)
    executed = requests["fp16"] + requests["fp8"]
    assert executed.sum() == replicas["fp16"].sum() + replicas["fp8"].sum()
    preempted = int(replicas["preemptions"].sum())
    assert (preempted > 0) == (kv_tokens < 10**6)
    assert (executed >= needed).all()
    assert preempted or (executed == needed).all()
    for column in ("kv", "running", "waiting", "waiting_tokens", "strict_running", "strict_waiting"):
        assert (replicas[column] == 0).all(), column


def test_the_same_seed_gives_the_same_outcome() -> None:
    load = workload(400, 60.0, seed=7)
    outcomes = [run(load, "threshold", replicas=5, seed=seed, noise=0.05) for seed in (3, 3, 4)]
    first, again, other = (outcome.requests["finish_s"] for outcome in outcomes)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert outcomes[0].flips == outcomes[1].flips


def test_fp8_serves_faster_and_its_tokens_are_counted() -> None:
    load = workload(200, 50.0, seed=8)
    slow, fast = run(load), run(load, "static-fp8")
    assert fast.requests["finish_s"].max() < slow.requests["finish_s"].max()
    assert slow.requests["fp8"].sum() == 0
    assert fast.requests["fp16"].sum() == 0


def test_a_strict_request_never_has_a_token_in_fp8() -> None:
    load = workload(300, 60.0, seed=9, strict=0.2)
    outcome = run(load, "static-fp8", replicas=3)
    strict = outcome.requests["strict"]
    assert outcome.requests["fp8"][strict].sum() == 0
    assert outcome.requests["fp8"][~strict].sum() > 0
    assert np.isfinite(outcome.requests["finish_s"]).all()


def test_a_request_beyond_the_cache_is_refused_and_not_waited_for() -> None:
    load = workload(20, 5.0, seed=10)
    load.prompt_tokens[3] = 5000
    requests = run(load, kv_tokens=4000).requests
    assert requests["replica"][3] == engine.NEVER_FITS
    assert np.isfinite(np.delete(requests["finish_s"], 3)).all()
    assert math.isnan(requests["finish_s"][3])


def test_a_thousand_replicas_share_the_load() -> None:
    load = workload(3000, 3000.0, seed=11)
    outcome = run(load, "threshold", replicas=1000)
    assert np.isfinite(outcome.requests["finish_s"]).all()
    assert np.bincount(outcome.requests["replica"], minlength=1000).max() < 15


def test_the_share_of_requests_that_missed_a_limit() -> None:
    outcome = run(workload(200, 60.0, seed=12))
    long = outcome.requests["output"] > 1
    ttft, tpot = ttft_s(outcome.requests), tpot_s(outcome.requests)[long]
    share = np.empty(1)
    for part in (0.05, 0.3, 0.6):
        limits = float(np.quantile(ttft, 1.0 - part)), float(np.quantile(tpot, 1.0 - part))
        recent.miss_shares(outcome.duration_s, math.inf, *limits, outcome.engines, share)
        wanted = float(np.mean(ttft > limits[0]) + np.mean(tpot > limits[1]))
        assert share[0] == pytest.approx(min(1.0, wanted))
    recent.miss_shares(outcome.duration_s + 1e6, 10.0, 1.0, 1.0, outcome.engines, share)
    assert math.isnan(share[0])


@pytest.mark.parametrize(("changes", "field"), [({"replicas": 0}, "replicas"), ({"seed": -1}, "seed")])
def test_bad_arguments_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        run(workload(5, 1.0, seed=1), **changes)
