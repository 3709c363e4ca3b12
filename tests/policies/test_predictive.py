"""The predictive controller: what makes it flip, what does not, and how it treats strict requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.facts import Facts
from nestedfp.policies.controllers.pace import (
    DOUBTFUL_PACE,
    LEAST_MEMORY_PACE,
    Bounds,
    Misses,
    Room,
    room,
    sustained_load,
)
from nestedfp.policies.policy import Assignment, Policy
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.snapshot import ReplicaView, Snapshot

MakeView = Callable[..., ReplicaView]

BUSY: dict[str, Any] = {
    "running": 30,
    "context_tokens": 36_000,
    "arrivals_per_s": 8.0,
    "arriving_prompt_tokens_per_s": 8_000.0,
}


class Run:
    """A predictive policy over time; without ``between`` there are only 16 bits and FP8."""

    def __init__(self, between: str = "", **changes: Any) -> None:
        prediction = {"between": between, **changes.pop("prediction", {})}
        settings = {"controller": "predictive", "prediction": prediction, **changes}
        self.policy = Policy(PolicyConfig.from_dict(settings))
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


def test_misses_in_16_bits_lower_the_levels_until_fp8_takes_over(view: MakeView) -> None:
    run = Run()
    modes = [run.at(float(second), view(**BUSY, slo_miss_share=0.2))["a"].mode for second in range(90)]
    assert modes[0] == "fp16"
    assert modes[-1] == "fp8"


def test_misses_that_fp8_would_share_lower_nothing(view: MakeView) -> None:
    run = Run()
    for second in range(90):
        missed = view(**BUSY, slo_miss_share=0.2, slo_cost_share=0.0)
        assert run.at(float(second), missed)["a"].mode == "fp16"


def learned(view: MakeView, seconds: int = 240, **shares: float) -> Misses:
    """What a policy with a tolerance of 1 % knows after so many seconds of these reports."""
    run = Run(prediction={"tolerance": 0.01})
    for second in range(seconds):
        run.at(float(second), view(**BUSY, **shares))
    known: Misses = run.state.memory.misses
    return known


def test_confidence_follows_what_16_bits_cost(view: MakeView) -> None:
    def confidence(cost: float) -> float:
        return learned(view, slo_miss_share=0.5, slo_cost_share=cost).confidence

    assert confidence(0.0) == pytest.approx(1.0, abs=0.01)
    assert confidence(0.01) == pytest.approx(0.0, abs=0.01)
    assert confidence(0.5) == pytest.approx(-1.0, abs=0.01)


def test_where_the_cost_is_unknown_every_miss_counts(view: MakeView) -> None:
    assert learned(view, slo_miss_share=0.01).confidence == pytest.approx(0.0, abs=0.01)


def test_unknown_misses_teach_nothing(view: MakeView) -> None:
    assert learned(view) == Misses(at_s=239.0)


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
    modes = [run.at(step * 0.1, view(**slow, tokens_fp16=step * 60))["a"].mode for step in range(200)]
    assert modes[0] == "fp16"
    assert modes[-1] == "fp8"
    assert 1.5 < run.state.memory.model.correction["fp16"] <= 3.0


LIGHT: dict[str, Any] = {
    "running": 1,
    "context_tokens": 1_000,
    "arrivals_per_s": 0.2,
    "arriving_prompt_tokens_per_s": 100.0,
}
LOADED: dict[str, Any] = {**BUSY, "arrivals_per_s": 18.0, "arriving_prompt_tokens_per_s": 18_000.0}
HEAVY: dict[str, Any] = {**BUSY, "arrivals_per_s": 120.0, "arriving_prompt_tokens_per_s": 120_000.0}


def test_auto_takes_over_as_soon_as_there_is_load_and_not_before(view: MakeView) -> None:
    run = Run("auto")
    assert run.at(0.0, view(**LIGHT))["a"].mode == "fp16"
    target = run.at(10.0, view(**LOADED))["a"]
    assert target.mode == "auto"
    assert target.limits is not None
    assert target.limits["pace_s"] == pytest.approx(0.8 * 0.033)
    assert target.limits["token_s"] > 0


def freedom(
    load: float,
    *,
    short_output_tokens: float = 100.0,
    missed: float = 0.0,
    cost: float = 0.0,
    sustained: float = 0.5,
) -> Room:
    """The freedom of one replica under a steady load, as a share of what it serves in 16 bits."""

    def at(rate: float) -> Room:
        column = np.ones(1)
        facts = Facts(
            running=30.0 * column,
            waiting=0.0 * column,
            oldest_s=0.0 * column,
            context=36_000.0 * column,
            arrivals=rate * column,
            prompt_per_s=1_000.0 * rate * column,
            inflow=1_000.0 * rate * column,
            decode_per_s=100.0 * rate * column,
        )
        bounds = Bounds(pace=0.8, debt_s=0.25, tpot_s=0.033, short_output_tokens=short_output_tokens)
        return room(facts, latency_model(), 100.0, Misses(0.0, missed, cost), bounds, sustained)

    return at(load / float(at(1.0).load[0]))


def test_pace_and_memory_pace_fall_with_the_load() -> None:
    calm, busy, heavy = freedom(0.5), freedom(1.05), freedom(1.9)
    assert calm.load[0] == pytest.approx(0.5)
    assert calm.pace[0] == busy.pace[0] == calm.memory_pace[0] == 0.8
    assert busy.memory_pace[0] < 0.8
    assert heavy.pace[0] == 0.5
    assert heavy.memory_pace[0] == LEAST_MEMORY_PACE


def test_the_pace_falls_sooner_where_the_load_lasts() -> None:
    passing, lasting = freedom(1.2, sustained=0.5), freedom(1.2, sustained=1.1)
    assert lasting.pace[0] < passing.pace[0] == 0.8
    assert lasting.memory_pace[0] <= passing.memory_pace[0]


@pytest.mark.parametrize("tokens", [10.0, 20.0, 40.0, 400.0])
def test_short_answers_win_back_every_debt_they_are_allowed(tokens: float) -> None:
    allowed = freedom(0.3, short_output_tokens=tokens)
    spare_s = (1.0 - allowed.pace[0]) * 0.033 * tokens
    assert min(spare_s, 0.25) - 0.25 / 16 < allowed.debt_s[0] <= min(spare_s, 0.25)


def test_where_answers_are_short_all_falls_at_less_load() -> None:
    long, short = freedom(0.9), freedom(0.9, short_output_tokens=3.0)
    assert short.pace[0] < long.pace[0]
    assert short.memory_pace[0] == LEAST_MEMORY_PACE < long.memory_pace[0]
    assert short.debt_s[0] == 0.0 < freedom(0.5, short_output_tokens=6.0).debt_s[0] < long.debt_s[0]


def test_debt_is_taken_away_while_16_bits_cost_requests() -> None:
    debts = [freedom(0.5, cost=cost).debt_s[0] for cost in (0.0, 0.5, 1.0, 2.0)]
    assert debts == [0.25, 0.125, 0.0, 0.0]
    assert freedom(0.5, cost=2.0).pace[0] == 0.8


def test_where_misses_are_the_rule_everything_is_tight() -> None:
    known = [freedom(0.3, missed=missed) for missed in (0.02, 0.075, 0.2)]
    assert [each.doubt for each in known] == [0.0, pytest.approx(0.5), 1.0]
    paces = [each.pace[0] for each in known]
    assert paces[0] > paces[1] > paces[2] == DOUBTFUL_PACE
    assert known[2].memory_pace[0] == LEAST_MEMORY_PACE
    assert known[2].debt_s[0] == 0.0


def test_the_load_is_averaged_over_seconds() -> None:
    assert sustained_load(0.4, 0.4, 3.0) == pytest.approx(0.4)
    assert sustained_load(0.4, 1.4, 0.0) == 0.4
    assert 0.4 < sustained_load(0.4, 1.4, 1.0) < sustained_load(0.4, 1.4, 5.0) < 1.4


def test_freedom_returns_within_a_minute_of_the_last_of_many_misses(view: MakeView) -> None:
    run = Run("auto")
    for second in range(120):
        bad = run.at(float(second), view(**LOADED, slo_miss_share=1.0))["a"].limits
    for second in range(120, 180):
        good = run.at(float(second), view(**LOADED, slo_miss_share=0.0))["a"].limits
    assert bad is not None
    assert good is not None
    assert bad["pace_s"] < 0.5 * good["pace_s"]
    assert good["pace_s"] == pytest.approx(0.8 * 0.033)


@pytest.mark.parametrize(("output_tokens", "lasts_s"), [(100.0, 5), (4.0, 20)])
def test_fp8_is_ordered_only_after_a_lasting_overload(
    view: MakeView, output_tokens: float, lasts_s: int
) -> None:
    """Later where answers are short: a burst of them passes within `auto`, and what is late in 16 bits."""
    run = Run("auto")
    heavy = view(**HEAVY, short_output_tokens=output_tokens)
    modes = [run.at(step * 0.1, heavy)["a"].mode for step in range(10 * lasts_s + 30)]
    assert set(modes[: 10 * lasts_s - 5]) == {"auto"}
    assert modes[-1] == "fp8"
    later_s = lasts_s + 3.0
    modes = [run.at(later_s + step * 0.1, view(**BUSY, tokens_fp8=1))["a"].mode for step in range(80)]
    assert modes[0] == "fp8"
    assert modes[-1] == "auto"


def test_auto_gives_way_only_after_a_long_rest(view: MakeView) -> None:
    run = Run("auto", prediction={"rest_s": 20.0})
    run.at(0.0, view(**LOADED))
    modes = [run.at(1.0 + second, view(**LIGHT))["a"].mode for second in range(30)]
    assert modes[15] == "auto"
    assert modes[-1] == "fp16"


def test_where_requests_are_missed_a_queue_is_served_in_fp8(view: MakeView) -> None:
    trusting, cautious = Run("auto"), Run("auto")
    queue = {**LOADED, "waiting": 4, "waiting_prompt_tokens": 4_000}
    for second in range(60):
        last_trusting = trusting.at(float(second), view(**queue, slo_miss_share=0.0))["a"].limits
        last_cautious = cautious.at(float(second), view(**queue, slo_miss_share=0.3))["a"].limits
    assert last_trusting is not None
    assert last_cautious is not None
    assert last_trusting["queue_tokens"] > 1_000
    # An empty queue must not count as one.
    assert last_cautious["queue_tokens"] == 1.0
    assert last_cautious["wait_s"] < 0.5 * last_trusting["wait_s"]
    assert last_cautious["pace_s"] < 0.5 * last_trusting["pace_s"]


def test_the_pace_can_be_bounded_from_the_start(view: MakeView) -> None:
    limits = Run("auto", prediction={"pace": 0.5}).at(0.0, view(**LOADED))["a"].limits
    assert limits is not None
    assert limits["pace_s"] == pytest.approx(0.0165)


def test_limits_hold_while_signals_are_unusable(view: MakeView) -> None:
    run = Run("auto")
    first = run.at(0.0, view(**LOADED))["a"]
    assert run.at(5.0, view(**LOADED, stale_s=4.0))["a"].limits == first.limits is not None


def test_strict_requests_keep_replicas_out_of_auto(view: MakeView) -> None:
    views = [view(str(number), **LOADED, strict_running=10 if number == 0 else 0) for number in range(4)]
    targets = Run("auto").at(0.0, *views)
    assert sorted(target.mode for target in targets.values()) == ["auto", "auto", "auto", "fp16"]


PLANNED: dict[str, Any] = {
    "plans": ["mlp-fp8"],
    "calm_s": 1.0,
    "latency": {
        "costs": {
            name: {"overhead_s": 0.002, "weights_s": 0.006 * scale, "token_s": 23e-6 * scale}
            for name, scale in (("fp16", 1.0), ("mlp-fp8", 0.7), ("fp8", 0.5))
        }
    },
}


def test_a_named_plan_is_the_rung_between(view: MakeView) -> None:
    run = Run("mlp-fp8", **PLANNED)
    queue = {**BUSY, "waiting": 30}
    assert run.at(0.0, view(**queue, waiting_prompt_tokens=40_000))["a"].mode == "mlp-fp8"
    assert run.at(5.0, view(**queue, waiting_prompt_tokens=90_000))["a"].mode == "fp8"
    calm = [run.at(10.0 + second, view(**BUSY, tokens_fp8=9))["a"].mode for second in range(30)]
    assert calm[-1] == "fp16"


def test_a_plan_without_costs_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"prediction\.between"):
        Run("mlp-fp8", plans=["mlp-fp8"])


@pytest.mark.parametrize("between", ["", "auto"])
def test_a_thousand_replicas_are_decided_within_the_bound(
    view: MakeView, least_cpu_s: Callable[..., float], between: str
) -> None:
    run = Run(between)
    views = [view(f"r{n}", **{**BUSY, "waiting_prompt_tokens": 100 * (n % 400)}) for n in range(1000)]
    assert least_cpu_s(lambda step: run.at(step * 0.1, *views)) < 0.010
