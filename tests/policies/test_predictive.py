"""The predictive controller: what makes it flip, what does not, and how it treats strict requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.policy import Assignment, Policy
from nestedfp.policies.snapshot import ReplicaView, Snapshot

MakeView = Callable[..., ReplicaView]

BUSY: dict[str, Any] = {
    "running": 30,
    "context_tokens": 36_000,
    "arrivals_per_s": 8.0,
    "arriving_prompt_tokens_per_s": 8_000.0,
}


class Run:
    def __init__(self, **changes: Any) -> None:
        self.policy = Policy(PolicyConfig.from_dict({"controller": "predictive", **changes}))
        self.state = self.policy.start()

    def at(self, now: float, *views: ReplicaView) -> dict[str, Assignment]:
        targets, self.state = self.policy.decide(Snapshot(tuple(views)), self.state, now)
        return targets


def test_an_even_load_stays_in_16_bits(view: MakeView) -> None:
    run = Run()
    for second in range(30):
        assert run.at(float(second), view(**BUSY))["a"].mode == "fp16"


def test_a_queue_that_16_bits_cannot_clear_in_time_flips_at_once(view: MakeView) -> None:
    target = Run().at(0.0, view(**{**BUSY, "waiting": 40, "waiting_prompt_tokens": 50_000}))["a"]
    assert target.mode == "fp8"
    assert target.signal in ("predicted_ttft_s", "predicted_tpot_s")
    assert target.value is not None
    assert target.threshold is not None
    assert target.value >= target.threshold


def test_a_queue_that_16_bits_clears_in_time_flips_nothing(view: MakeView) -> None:
    queue = {**BUSY, "waiting": 4, "waiting_prompt_tokens": 4_000, "oldest_waiting_s": 0.05}
    assert Run().at(0.0, view(**queue))["a"].mode == "fp16"


def test_an_old_request_in_the_queue_is_enough(view: MakeView) -> None:
    stuck = {**BUSY, "waiting": 1, "waiting_prompt_tokens": 10, "oldest_waiting_s": 0.9}
    assert Run().at(0.0, view(**stuck))["a"].signal == "predicted_ttft_s"


def test_a_load_beyond_16_bits_flips_without_any_queue(view: MakeView) -> None:
    heavy = {**BUSY, "arrivals_per_s": 40.0, "arriving_prompt_tokens_per_s": 40_000.0}
    target = Run().at(0.0, view(**heavy))["a"]
    assert (target.mode, target.signal) == ("fp8", "predicted_tpot_s")


def test_16_bits_return_only_when_predicted_to_hold(view: MakeView) -> None:
    """In FP8 everything measured looks calm; what counts is what 16 bits would make of the load."""
    run = Run(calm_s=1.0)
    heavy = {**BUSY, "arrivals_per_s": 40.0, "arriving_prompt_tokens_per_s": 40_000.0, "ttft_p90_s": 0.05}
    for step in range(100):
        assert run.at(step * 0.1, view(**heavy))["a"].mode == "fp8"
    modes = [run.at(10.0 + step * 0.1, view(**BUSY))["a"].mode for step in range(80)]
    assert modes[0] == "fp8"
    assert modes[-1] == "fp16"


def test_the_burst_projection_acts_before_the_queue_is_critical(view: MakeView) -> None:
    """A queue of 12,000 tokens flips nothing while it stands, and does as the front of a rising burst."""
    standing, rising = Run(), Run(prediction={"horizon_s": 1.0})
    blind = Run(prediction={"horizon_s": 0.0})
    for step in range(13):
        at = step * 0.1
        queue = {**BUSY, "waiting": 12, "waiting_prompt_tokens": 12_000, "tokens_fp16": step * 1_000}
        assert standing.at(at, view(**queue))["a"].mode == "fp16"
        front = {**BUSY, "waiting": step, "waiting_prompt_tokens": step * 1_000, "tokens_fp16": step * 8_000}
        last = rising.at(at, view(**front))["a"]
        assert blind.at(at, view(**front))["a"].mode == "fp16"
    assert last.mode == "fp8"


def misses(run: Run, view: MakeView, mode: str, seconds: int, share: float) -> float:
    """Report a miss share on a replica whose load keeps it in ``mode``; the factor after it."""
    load = (
        BUSY if mode == "fp16" else {**BUSY, "arriving_prompt_tokens_per_s": 40_000.0, "arrivals_per_s": 40.0}
    )
    for second in range(seconds):
        assert run.at(float(second), view(**load, slo_miss_share=share))["a"].mode == mode
    return float(run.state.memory.guard.factor)


def test_misses_in_16_bits_lower_the_levels_until_fp8_takes_over(view: MakeView) -> None:
    run = Run()
    modes = [run.at(float(second), view(**BUSY, slo_miss_share=0.2))["a"].mode for second in range(60)]
    assert modes[0] == "fp16"
    assert modes[-1] == "fp8"


def test_no_misses_raise_the_levels_and_misses_of_fp8_are_not_held_against_16_bits(view: MakeView) -> None:
    assert misses(Run(), view, "fp16", 60, 0.0) == pytest.approx(1.2)
    assert misses(Run(), view, "fp8", 60, 0.5) >= 1.0


def test_unknown_misses_teach_nothing(view: MakeView) -> None:
    run = Run()
    for second in range(60):
        run.at(float(second), view(**BUSY))
    assert run.state.memory.guard.factor == 1.0


def test_enough_replicas_stay_in_16_bits_for_strict_requests(view: MakeView) -> None:
    pressed = {**BUSY, "waiting": 40, "waiting_prompt_tokens": 60_000}
    views = [view(str(number), **pressed, strict_running=14 if number == 0 else 0) for number in range(4)]
    targets = Run().at(0.0, *views)
    assert sorted(target.mode for target in targets.values()) == ["fp16", "fp8", "fp8", "fp8"]
    assert all(
        target.mode == "fp8"
        for target in Run().at(0.0, *(view(str(n), **pressed) for n in range(4))).values()
    )


def test_shedding_is_the_last_rung_and_is_taken_back(view: MakeView) -> None:
    run = Run(prediction={"shed": True})
    flooded = {**BUSY, "waiting": 400, "waiting_prompt_tokens": 400_000}
    first = run.at(0.0, view(**flooded))["a"]
    assert (first.mode, first.limits) == ("fp8", None)
    second = run.at(0.1, view(**flooded))["a"]
    assert second.limits is not None
    assert 2_048 <= second.limits["waiting_prompt_tokens"] < 80_000
    eased = {**BUSY, "waiting": 20, "waiting_prompt_tokens": 20_000}
    assert run.at(5.0, view(**eased, tokens_fp8=10))["a"].limits is None


def test_without_leave_nothing_is_shed(view: MakeView) -> None:
    run = Run()
    for step in range(5):
        flooded = view(**{**BUSY, "waiting": 400, "waiting_prompt_tokens": 400_000})
        assert run.at(step * 0.1, flooded)["a"].limits is None


def test_a_slower_engine_is_learnt_from_its_steps(view: MakeView) -> None:
    """On an engine three times slower than the model the same load no longer fits into 16 bits."""
    run = Run()
    step_s = 3 * float(run.policy.start().memory.model.of("fp16").step_s(60, 30, 36_000))
    slow = {**BUSY, "step_time_s": step_s, "batch_tokens": 60}
    modes = [run.at(step * 0.1, view(**slow))["a"].mode for step in range(200)]
    assert modes[0] == "fp16"
    assert modes[-1] == "fp8"
    assert 1.5 < run.state.memory.model.correction["fp16"] <= 3.0


def test_a_thousand_replicas_are_decided_within_the_bound(
    view: MakeView, least_cpu_s: Callable[..., float]
) -> None:
    run = Run()
    views = [view(f"r{n}", **{**BUSY, "waiting_prompt_tokens": 100 * (n % 400)}) for n in range(1000)]
    assert least_cpu_s(lambda step: run.at(step * 0.1, *views)) < 0.010
