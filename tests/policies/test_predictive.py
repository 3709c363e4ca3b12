"""The predictive controller: what makes it flip, what does not, and how it treats strict requests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.facts import Facts
from nestedfp.policies.controllers.load import MOST_MISSED, engine_load, missed
from nestedfp.policies.policy import Assignment, Policy
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.snapshot import ReplicaView, Snapshot
from nestedfp.policies.steps import LIMIT_NAMES, StepBounds

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


def test_a_time_without_decisions_breaks_calm(view: MakeView) -> None:
    run = Run(calm_s=3.0)
    heavy = {**BUSY, "arrivals_per_s": 40.0, "arriving_prompt_tokens_per_s": 40_000.0}
    for step in range(100):
        run.at(step * 0.1, view(**heavy))
    modes = [run.at(now, view(**BUSY))["a"].mode for now in (10.0, 11.5, 16.0, 17.5, 19.0)]
    assert modes == ["fp8"] * 4 + ["fp16"]


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


def test_unknown_misses_teach_nothing(view: MakeView) -> None:
    run = Run()
    for second in range(90):
        assert run.at(float(second), view(**BUSY))["a"].mode == "fp16"
    assert run.state.memory.missed == run.policy.start().memory.missed


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
    assert first.mode == "fp8"
    assert first.limits is not None
    assert "waiting_prompt_tokens" not in first.limits
    second = run.at(0.1, view(**flooded))["a"]
    assert second.limits is not None
    assert 2_048 <= second.limits["waiting_prompt_tokens"] < 80_000
    eased = {**BUSY, "waiting": 20, "waiting_prompt_tokens": 20_000}
    third = run.at(5.0, view(**eased, tokens_fp8=10))["a"]
    assert third.limits == first.limits


def test_a_bound_on_the_queue_follows_the_batch_in_steps_of_a_tenth(view: MakeView) -> None:
    """Each bound is an order and a call of the engine, and the batch changes with every report."""
    run = Run(prediction={"shed": True})
    flooded = {**BUSY, "waiting": 400, "waiting_prompt_tokens": 400_000, "mode": "fp8"}

    def bounds(batches: range) -> list[float]:
        seen = []
        for running in batches:
            limits = run.at(running * 0.1, view(**{**flooded, "running": running}))["a"].limits
            assert limits is not None
            seen.append(limits["waiting_prompt_tokens"])
        return seen

    assert len(set(bounds(range(20, 40)))) == 1
    followed = bounds(range(40, 1000))
    changes = [(before, after) for before, after in pairwise(followed) if before != after]
    assert 3 <= len(changes) <= 30
    assert all(abs(after - before) > 0.1 * before for before, after in changes)


def test_without_leave_nothing_is_shed(view: MakeView) -> None:
    run = Run()
    for step in range(5):
        flooded = view(**{**BUSY, "waiting": 400, "waiting_prompt_tokens": 400_000})
        limits = run.at(step * 0.1, flooded)["a"].limits
        assert limits is not None
        assert "waiting_prompt_tokens" not in limits


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
MILD: dict[str, Any] = {**BUSY, "arrivals_per_s": 120.0, "arriving_prompt_tokens_per_s": 120_000.0}
HEAVY: dict[str, Any] = {**BUSY, "arrivals_per_s": 300.0, "arriving_prompt_tokens_per_s": 300_000.0}


def test_auto_takes_over_as_soon_as_there_is_load_and_not_before(view: MakeView) -> None:
    run = Run("auto")
    assert run.at(0.0, view(**LIGHT))["a"].mode == "fp16"
    target = run.at(10.0, view(**LOADED))["a"]
    assert target.mode == "auto"


def load_of(rate: float, waiting: float = 0.0, burst: float = 1.0) -> float:
    """The 16-bit load of one replica at `rate` requests per second of 1,000 tokens in and 100 out."""
    column = np.ones(1)
    facts = Facts(
        running=30.0 * column,
        waiting=waiting * column,
        oldest_s=0.0 * column,
        context=36_000.0 * column,
        arrivals=rate * column,
        prompt_per_s=1_000.0 * rate * column,
        inflow=burst * 1_000.0 * rate * column,
        decode_per_s=100.0 * rate * column,
    )
    return float(engine_load(facts, latency_model().of("fp16"), 100.0)[0])


def test_the_load_is_engine_time_by_the_second() -> None:
    costs = latency_model().of("fp16")
    decode_s = costs.token_s + costs.sequence_s + 1_200.0 * costs.context_token_s
    request_s = 1_000 * (costs.token_s + 500.0 * costs.pair_s) + 100 * decode_s
    assert load_of(8.0) == pytest.approx(8.0 * request_s)
    assert load_of(8.0, waiting=5_000.0) == pytest.approx(13.0 * request_s), "what is queued has arrived"


def test_a_burst_counts_at_once_and_a_lull_in_part() -> None:
    assert load_of(8.0, burst=3.0) == pytest.approx(3.0 * load_of(8.0))
    assert load_of(8.0, burst=0.0) == pytest.approx(0.5 * load_of(8.0))


def test_misses_are_averaged_by_rate_and_forgotten() -> None:
    assert missed(0.0, [], 0.01, 1.0) == 0.0
    once = missed(0.0, [(0.01, 9.0), (0.0, 1.0)], 0.01, 1.0)
    assert 0.0 < once < missed(0.0, [(0.01, 1.0)], 0.01, 1.0)
    many = 0.0
    for _ in range(600):
        many = missed(many, [(1.0, 1.0)], 0.01, 1.0)
    assert many == pytest.approx(MOST_MISSED)
    for _ in range(60):
        many = missed(many, [(0.0, 1.0)], 0.01, 1.0)
    assert many < 0.5


def test_fp8_is_ordered_only_after_a_lasting_overload(view: MakeView) -> None:
    run = Run("auto")
    targets = [run.at(step * 0.1, view(**HEAVY))["a"] for step in range(130)]
    assert {target.mode for target in targets[:115]} == {"auto"}
    assert targets[-1].mode == "fp8"
    order = next(target for target in targets if target.mode == "fp8")
    assert order.signal == "fp8_load"
    assert order.value is not None
    assert order.value >= order.threshold == 1.0
    modes = [run.at(16.0 + step * 0.1, view(**BUSY, tokens_fp8=1))["a"].mode for step in range(60)]
    assert modes[0] == "fp8"
    assert modes[-1] == "auto"


@pytest.mark.parametrize(("pause_s", "ordered"), [(1.0, True), (4.0, False)])
def test_an_overload_has_its_gaps_and_bursts_have_pauses(
    view: MakeView, pause_s: float, ordered: bool
) -> None:
    run, overload_s = Run("auto"), 6.0
    modes = set()
    for step in range(400):
        loaded = 0.1 * step % (overload_s + pause_s) < overload_s
        modes.add(run.at(step * 0.1, view(**(HEAVY if loaded else BUSY)))["a"].mode)
    assert ("fp8" in modes) == ordered


@pytest.mark.parametrize(("load", "ordered"), [(HEAVY, True), (MILD, False)])
def test_a_mild_overload_counts_in_part(view: MakeView, load: dict[str, Any], ordered: bool) -> None:
    run = Run("auto")
    modes = {run.at(step * 0.1, view(**load))["a"].mode for step in range(300)}
    assert ("fp8" in modes) == ordered


def test_a_time_without_decisions_is_no_overload(view: MakeView) -> None:
    run = Run("auto")
    for now in (0.0, 0.1, 100.0, 200.0):
        assert run.at(now, view(**HEAVY))["a"].mode == "auto"


def test_a_clock_that_goes_back_is_no_overload(view: MakeView) -> None:
    run = Run("auto")
    modes = [run.at(1_000.0, view(**LOADED)), run.at(1_000.1, view(**LOADED)), run.at(900.0, view(**LOADED))]
    modes += [run.at(900.1 + 0.1 * step, view(**HEAVY)) for step in range(20)]
    assert {targets["a"].mode for targets in modes} == {"auto"}


def test_fp8_is_ordered_of_all_replicas_or_none(view: MakeView) -> None:
    """One replica with a long queue is no overload where the others have room; all together are one."""
    queue = {**BUSY, "waiting": 60, "waiting_prompt_tokens": 60_000, "oldest_waiting_s": 0.5}
    uneven = [view("0", **queue), *(view(str(number), **BUSY) for number in range(1, 4))]
    even = [view(str(number), **queue) for number in range(4)]
    for views, mode in ((uneven, "auto"), (even, "fp8")):
        run = Run("auto")
        for step in range(190):
            targets = run.at(step * 0.1, *views)
        assert targets["0"].mode == mode
        assert ("fp8" in {target.mode for target in targets.values()}) == (mode == "fp8")


def test_auto_gives_way_only_after_a_long_rest(view: MakeView) -> None:
    run = Run("auto", prediction={"rest_s": 20.0})
    run.at(0.0, view(**LOADED))
    modes = [run.at(1.0 + second, view(**LIGHT))["a"].mode for second in range(30)]
    assert modes[15] == "auto"
    assert modes[-1] == "fp16"


def test_every_mode_is_sent_with_the_bounds_of_its_steps(view: MakeView) -> None:
    settings = {"pace": 0.5, "first_token": 0.6, "light_first_token": 0.9, "light_batch": 0.2}
    run = Run("auto", prediction={**settings, "heavy_batch": 0.4, "least_tokens": 128, "give_up": 2})
    first, later = run.at(0.0, view(**LIGHT))["a"], run.at(10.0, view(**LOADED))["a"]
    assert (first.mode, later.mode) == ("fp16", "auto")
    assert first.limits is later.limits is not None
    assert set(first.limits) == set(LIMIT_NAMES)
    bounds = {name: first.limits[name] for name in StepBounds._fields}
    assert bounds == pytest.approx(
        {
            "pace_s": 0.0165,
            "tpot_s": 0.033,
            "ttft_s": 0.6,
            "late_s": 1.0,
            "least_tokens": 128.0,
            "light_ttft_s": 0.9,
            "given_up_s": 2.0,
            "light_s": 0.0066,
            "heavy_s": 0.0132,
        }
    )
    assert first.limits["fp8_token_s"] == latency_model().costs["fp8"].token_s


@pytest.mark.parametrize("controller", ["static-fp16", "static-fp8", "threshold"])
def test_the_steps_of_other_controllers_are_cut_on_request(view: MakeView, controller: str) -> None:
    for cut in (False, True):
        policy = Policy(PolicyConfig(controller=controller, cut_steps=cut))
        targets, _ = policy.decide(Snapshot((view(**LIGHT),)), policy.start(), 0.0)
        assert (targets["a"].limits is not None) == cut


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
