"""``auto`` in the simulator: the same choice as the engine's scheduler makes, and its limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nestedfp.policies.config import Slo
from nestedfp.policies.simulation import engine
from nestedfp.policies.simulation.cluster import Cluster
from nestedfp.policies.simulation.state import Columns, EngineSettings
from nestedfp.vllm.choice import Choice, Limits, StepFacts, choose

LIMITS: dict[str, float] = {"pace_s": 0.02, "debt_s": 0.01, "queue_tokens": 3000.0, "wait_s": 0.1}
LATE_S = 0.3
TIGHT_S = 0.01


def cluster(rate: float, mode: str, limits: dict[str, float] | None = None) -> Cluster:
    random = np.random.default_rng(4)
    count = 400
    load = Columns(
        np.cumsum(random.exponential(1.0 / rate, count)),
        random.integers(50, 2500, count).astype(np.int32),
        random.integers(2, 120, count).astype(np.int32),
        random.random(count) < 0.1 if mode == "strict" else np.zeros(count, dtype=np.bool_),
    )
    made = Cluster(load, 1, EngineSettings(noise=0.0), seed=0, slo=Slo())
    made.order("replica-0", "auto", limits)
    return made


@pytest.mark.parametrize("rate", [4.0, 12.0, 20.0, 40.0])
def test_the_simulator_chooses_as_the_engine_does(rate: float) -> None:
    """At many moments of a run both are asked about a step of the same length, bound by memory or not."""
    given = {**LIMITS, "memory_pace_s": TIGHT_S, "late_s": LATE_S}
    made = cluster(rate, "auto", given)
    limits = Limits.from_dict(given)
    answers = []
    for tick in range(1, 400):
        made.tick(0.05 * tick)
        replica, requests = made.engines.replicas[0], made.requests
        slots = made.engines.slots[0, : int(replica["running"])]
        first_s = np.where(requests["generated"] > 0, requests["first_s"], made.now)
        in_time = slots[(first_s - requests["arrival_s"])[slots] <= LATE_S]
        decoding = in_time[requests["generated"][in_time] > 0]
        queue = int(replica["tail"])
        lost = queue < 0 or made.now - requests["arrival_s"][queue] > LATE_S
        prompts = [
            *in_time[requests["generated"][in_time] == 0],
            *([] if lost else [replica["head"]]),
        ]
        step_s = float(0.005 + 0.03 * (tick % 3))
        facts = StepFacts(
            tokens=100,
            waiting=int(replica["waiting"]),
            kv_usage=0.0,
            running=[
                (int(requests["generated"][r]) - 1, made.now - float(requests["first_s"][r]))
                for r in decoding
            ],
            waiting_prompt_tokens=0 if lost else int(replica["waiting_tokens"]),
            oldest_wait_s=max((made.now - float(requests["arrival_s"][r]) for r in prompts), default=0.0),
        )
        memory_bound = tick % 2 == 0
        fixed = {"overhead_s": 0.0, "weights_s": step_s} if memory_bound else {"overhead_s": step_s}
        timed = Limits.from_dict({**given, **fixed})
        ours = engine._too_slow(0, made.now, step_s, memory_bound, requests, made.engines)
        assert ours == choose(facts, Choice(), timed).fp8
        answers.append(ours)
    assert limits.pace_s == LIMITS["pace_s"]
    assert any(answers)
    assert not all(answers)


def tokens(made: Cluster) -> tuple[int, int]:
    while made.busy:
        made.tick(made.now + 1.0)
    return int(made.requests["fp16"].sum()), int(made.requests["fp8"].sum())


def test_without_limits_auto_is_16_bits_and_tighter_ones_mean_more_fp8() -> None:
    assert tokens(cluster(12.0, "auto"))[1] == 0
    shares: list[Any] = []
    for pace in (0.033, 0.02, 0.008):
        fp16, fp8 = tokens(cluster(12.0, "auto", {**LIMITS, "pace_s": pace, "debt_s": 0.0}))
        shares.append(fp8 / (fp16 + fp8))
    assert 0.0 < shares[0] < shares[1] < shares[2] < 1.0
    always = {"pace_s": 0.0, "debt_s": 0.0, "queue_tokens": 0.0, "wait_s": 0.0}
    assert tokens(cluster(12.0, "auto", always))[0] == 0


def test_a_tighter_pace_of_memory_bound_steps_spends_fewer_tokens_than_one_of_all_steps() -> None:
    """Both take FP8 for what is behind; only the first leaves long prompts in 16 bits."""
    loose = tokens(cluster(12.0, "auto", {**LIMITS, "pace_s": 0.033}))
    memory = tokens(cluster(12.0, "auto", {**LIMITS, "pace_s": 0.033, "memory_pace_s": TIGHT_S}))
    every = tokens(cluster(12.0, "auto", {**LIMITS, "pace_s": TIGHT_S}))
    assert loose[1] < memory[1] < every[1]


def test_what_is_late_is_served_in_16_bits_and_what_is_not_is_not() -> None:
    """A burst far beyond FP8: without a queue that can still be met, 16 bits take nothing from anyone."""
    counted = tokens(cluster(80.0, "auto", {**LIMITS, "pace_s": 0.001, "debt_s": 0.0}))
    late = tokens(cluster(80.0, "auto", {**LIMITS, "pace_s": 0.001, "debt_s": 0.0, "late_s": 1.0}))
    made = cluster(80.0, "auto", {**LIMITS, "pace_s": 0.001, "debt_s": 0.0, "late_s": 1.0})
    while made.busy:
        made.tick(made.now + 1.0)
    requests = made.requests
    met = requests["first_s"] - requests["arrival_s"] <= 1.0
    assert late[0] > counted[0]
    assert requests["fp16"][~met].sum() > 10 * requests["fp16"][met].sum()


def test_a_strict_request_has_no_token_in_fp8_within_auto() -> None:
    made = cluster(12.0, "strict", {**LIMITS, "queue_tokens": 0.0})
    _, fp8 = tokens(made)
    assert fp8 > 0
    assert made.requests["fp8"][made.requests["strict"]].sum() == 0
