"""The joint rule: when a replica is added, kept and removed, and that nonsense changes nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_rule import BUSY, CONFIG, FP8, IDLE, MODEL, OVER, STUCK, Rule

from nestedfp.policies.actor import PolicyActor
from nestedfp.policies.autoscaling import (
    STATS,
    Scaling,
    ScalingConfig,
    ScalingState,
    desired_replicas,
    scaling_stats,
)
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig, Slo
from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.replica import ReplicaControl


def test_a_replica_is_added_when_fp8_is_not_enough_for_a_while() -> None:
    rule = Rule()
    assert rule.at(0.0, [OVER, OVER]).replicas == 2
    assert rule.at(4.9, [OVER, OVER]).replicas == 2
    assert rule.at(5.0, [OVER, OVER]).replicas >= 3


def test_a_deep_overload_asks_for_all_it_needs_at_once() -> None:
    rule = Rule()
    flood = {**OVER, "prompt_per_s": 150_000.0}
    rule.at(0.0, [flood, flood])
    wanted = rule.at(5.0, [flood, flood]).replicas
    assert 4 <= wanted <= 8


def test_a_break_in_the_overload_starts_the_clock_again() -> None:
    rule = Rule()
    rule.at(0.0, [OVER])
    rule.at(4.0, [FP8])
    assert rule.at(6.0, [OVER]).replicas == 1


def test_fp8_that_holds_is_a_reason_to_wait_and_then_to_add() -> None:
    rule = Rule()
    assert rule.at(0.0, [{**FP8, "mode_s": 59.0}] * 2).replicas == 2
    assert rule.at(1.0, [{**FP8, "mode_s": 60.0}] * 2).replicas == 3


def test_a_replica_is_added_when_16_bits_that_must_stay_are_too_slow_for_a_while() -> None:
    rule = Rule()
    assert rule.at(0.0, [STUCK, STUCK]).replicas == 2
    assert rule.at(4.9, [STUCK, STUCK]).replicas == 2
    assert rule.at(5.0, [STUCK, STUCK]) == Scaling(3, "16 bits too slow on 2 replicas")


def test_what_must_stay_in_16_bits_is_added_for_in_16_bits() -> None:
    """The same load asks for more replicas than where FP8 would carry it."""
    wanted = []
    for row in (STUCK, OVER):
        rule = Rule()
        flood = [{**row, "prompt_per_s": 70_000.0}] * 2
        rule.at(0.0, flood)
        wanted.append(rule.at(5.0, flood).replicas)
    assert wanted[0] > wanted[1]


def test_16_bits_that_may_give_way_to_fp8_add_nothing() -> None:
    rule = Rule()
    free = {**STUCK, "fixed": 0.0}
    for second in range(100):
        seen = rule.at(float(second), [free, free])
        assert seen == Scaling(2, "2 replicas too slow in 16 bits, FP8 may help")


def test_16_bits_that_must_stay_and_hold_add_nothing() -> None:
    rule = Rule()
    for second in range(100):
        assert rule.at(float(second), [{**STUCK, "strain": 0.9}] * 2) == Scaling(2, "16 bits hold")


def test_replicas_too_slow_in_either_precision_count_together() -> None:
    rule = Rule()
    rows = [STUCK, OVER, IDLE]
    assert rule.at(0.0, rows).replicas == 3
    added = rule.at(5.0, rows)
    assert added.replicas > 3
    assert added.reason == "FP8 too slow on 1 replicas, 16 bits too slow on 1 replicas"


def test_nothing_is_removed_while_a_replica_that_must_stay_in_16_bits_is_too_slow() -> None:
    """Whatever is predicted: here hardly any load is known of, and yet requests wait."""
    rule = Rule()
    for second in range(500):
        seen = rule.at(float(second), [IDLE, IDLE, {**IDLE, "fixed": 1.0, "strain": 1.0}])
        assert seen == Scaling(3, "0 replicas in FP8, 1 too slow in 16 bits, 0 starting: hold")


async def published(
    report: Callable[..., ReplicaReport], changes: Mapping[str, Any], pin: str | None = None, **facts: Any
) -> dict[str, float]:
    """What a replica publishes in 16 bits at 50 times the SLO under a policy with these settings."""
    config = PolicyConfig.from_dict({"decide_interval_s": 0.01, **changes})
    actor = PolicyActor(config)
    if pin is not None:
        await actor.set_override(pin, 60.0)
    control = ReplicaControl("a", config, booted_at=1.0)
    signals = report(oldest_waiting_s=50.0 * Slo().ttft_s, waiting=9, waiting_prompt_tokens=9000, **facts)
    for _ in range(2):  # The first answer may come before the first decision.
        call = control.begin(signals.to_dict())
        assert control.finish(call, await actor.sync(call.report.to_dict(), call.known_epoch, 0.0))
        await asyncio.sleep(0.02)
    order = control.order()
    view = control.view()
    assert view is not None
    return scaling_stats(
        replace(view.report, mode=order.mode, arriving_prompt_tokens_per_s=30_000.0, arrivals_per_s=30.0),
        control.mode_s,
        config.slo,
        fixed=control.fixed,
    )


@pytest.mark.parametrize(
    ("policy", "pin", "facts"),
    [
        ({"controller": "static-fp16"}, None, {}),
        ({"controller": "static-fp16", "cut_steps": True}, None, {}),
        ({"controller": "predictive", "dry_run": True}, None, {}),
        ({"controller": "predictive"}, "fp16", {}),
        ({"controller": "predictive"}, None, {"strict_running": 4, "running": 4}),
        ({"controller": "threshold"}, None, {"strict_running": 4, "running": 4}),
    ],
    ids=["static", "static under bounds", "dry run", "pinned", "strict", "strict, threshold"],
)
async def test_each_reason_to_stay_in_16_bits_leads_to_more_replicas(
    report: Callable[..., ReplicaReport],
    policy: dict[str, Any],
    pin: str | None,
    facts: dict[str, Any],
) -> None:
    row = await published(report, policy, pin, **facts)
    assert (row["in_fp8"], row["fixed"]) == (0.0, 1.0)
    rule = Rule()
    assert rule.at(0.0, [row]).replicas == 1
    assert rule.at(5.0, [row]).replicas > 1


async def test_a_replica_free_to_take_fp8_publishes_so(report: Callable[..., ReplicaReport]) -> None:
    for controller in ("predictive", "threshold"):
        row = await published(report, {"controller": controller})
        assert row["in_fp8"] > 0.0
        assert row["fixed"] == 0.0


def test_nothing_is_added_while_a_replica_starts() -> None:
    rule = Rule()
    for second in range(100):
        assert rule.at(float(second), [OVER, OVER], current=3, starting=1).replicas == 3


def test_one_that_never_starts_holds_an_overload_up_for_no_longer_than_the_patience() -> None:
    rule = Rule()
    assert rule.at(0.0, [OVER, OVER], current=3, starting=1).replicas == 3
    assert rule.at(399.9, [OVER, OVER], current=3, starting=1).replicas == 3
    grown = rule.at(400.0, [OVER, OVER], current=3, starting=1).replicas
    assert grown > 3
    # Those newly ordered have a patience of their own.
    rule.at(401.0, [OVER, OVER], current=grown, starting=grown - 2)
    assert rule.at(800.9, [OVER, OVER], current=grown, starting=grown - 2).replicas == grown
    assert rule.at(801.0, [OVER, OVER], current=grown, starting=grown - 2).replicas > grown


def test_what_never_starts_carries_nothing_of_what_is_predicted() -> None:
    """Two absent ones make no difference to how many more must serve."""
    flood = [{**OVER, "prompt_per_s": 70_000.0}] * 2
    wanted = []
    for absent in (0, 2):
        rule = Rule()
        rule.at(0.0, flood, current=2 + absent, starting=absent)
        wanted.append(rule.at(400.0, flood, current=2 + absent, starting=absent).replicas)
    assert wanted[1] == wanted[0] + 2 < 8


def test_those_that_never_start_are_given_up_in_the_end() -> None:
    rule = Rule()
    orders = []
    current = 3
    for second in range(1000):
        current = rule.at(float(second), [IDLE], current=current, starting=current - 1).replicas
        orders.append(current)
    # Patience, then calm, then calm again: what is absent needs no second patience.
    assert [orders.index(number) for number in (2, 1)] == [500, 601]
    assert orders[-1] == 1


def test_an_overload_at_the_most_replicas_does_not_renew_the_patience() -> None:
    rule = Rule()
    rule.at(0.0, [OVER] * 7, current=8, starting=1)
    assert rule.at(400.0, [OVER] * 7, current=8, starting=1).replicas == 8
    rule.at(410.0, [IDLE] * 7, current=8, starting=1)
    assert rule.at(510.0, [IDLE] * 7, current=8, starting=1).replicas == 7


def test_one_that_may_serve_unheard_stays_where_the_other_could_not_do_its_work() -> None:
    half = {**BUSY, "prompt_per_s": 10_000.0}
    rule = Rule()
    for second in range(0, 2000, 10):
        seen = rule.at(float(second), [half], current=2, starting=1)
    assert seen == Scaling(2, "16 bits hold")


def test_one_that_serves_for_a_moment_renews_the_patience() -> None:
    rule = Rule()
    rule.at(0.0, [OVER, OVER], current=3, starting=1)
    rule.at(399.0, [OVER, OVER, FP8], current=3)
    assert rule.at(400.0, [OVER, OVER], current=3, starting=1).replicas == 3


def test_nothing_is_removed_while_any_replica_is_in_fp8() -> None:
    rule = Rule()
    for second in range(500):
        assert rule.at(float(second), [IDLE, IDLE, {**IDLE, "in_fp8": 1.0}]).replicas == 3


def test_one_is_removed_when_the_rest_holds_in_16_bits_for_long_enough() -> None:
    rule = Rule()
    assert rule.at(0.0, [IDLE] * 3).replicas == 3
    assert rule.at(99.0, [IDLE] * 3).replicas == 3
    assert rule.at(100.0, [IDLE] * 3).replicas == 2
    assert rule.at(101.0, [IDLE] * 2).replicas == 2


def test_none_is_removed_when_the_rest_would_not_hold_in_16_bits() -> None:
    rule = Rule()
    for second in range(0, 1000, 10):
        assert rule.at(float(second), [BUSY, BUSY]).replicas == 2


@pytest.mark.parametrize("in_fp8", [0.0, 0.5], ids=["16 bits", "auto"])
@pytest.mark.parametrize("strain", [1.0, 1.5])
def test_none_is_removed_while_any_is_strained_whatever_is_predicted(in_fp8: float, strain: float) -> None:
    """The step costs that predictions are made with may not be the engine's."""
    rule = Rule()
    rows = [{**IDLE, "in_fp8": in_fp8}, {**IDLE, "in_fp8": in_fp8, "strain": strain}]
    for second in range(1000):
        assert rule.at(float(second), rows).replicas == 2
    calm = [{**row, "strain": 0.99} for row in rows]
    assert rule.at(1000.0, calm).replicas == 2
    assert rule.at(1099.0, calm).replicas == 2
    assert rule.at(1100.0, calm).replicas == 1


def test_an_overload_while_none_is_ordered_asks_for_the_least_that_holds() -> None:
    state = ScalingState(overloaded_since_s=0.0)
    row = {**IDLE, "in_fp8": 1.0, "strain": 1.0}
    wanted, _ = desired_replicas(
        [row], state, current=0, starting=0, config=CONFIG, slo=Slo(), model=MODEL, now=5.0
    )
    assert wanted.replicas == 1


def test_without_usable_reports_the_number_stays() -> None:
    assert Rule().at(0.0, [], current=3).replicas == 3
    assert Rule().at(0.0, [{**OVER, "strain": math.nan}], current=3).replicas == 3
    assert Rule().at(0.0, [{}], current=3).replicas == 3


def test_a_clock_that_falls_proves_nothing() -> None:
    rule = Rule()
    rule.at(1e6, [IDLE, IDLE])
    assert rule.at(0.0, [IDLE, IDLE]).replicas == 2
    assert rule.at(99.0, [IDLE, IDLE]).replicas == 2


@given(
    st.lists(
        st.dictionaries(st.sampled_from(STATS), st.one_of(st.floats(), st.none()), min_size=4), max_size=6
    ),
    st.integers(0, 50),
    st.integers(0, 3),
    st.floats(0, 1e6),
)
@settings(deadline=None)
def test_the_answer_is_always_an_int_within_bounds(
    rows: list[dict[str, Any]], current: int, starting: int, now: float
) -> None:
    for state in (ScalingState(), ScalingState(0.0, 0.0), ScalingState(0.0, 0.0, 0.0, 0.0)):
        wanted, _ = desired_replicas(
            rows, state, current=current, starting=starting, config=CONFIG, slo=Slo(), model=MODEL, now=now
        )
        assert type(wanted.replicas) is int
        assert 1 <= wanted.replicas <= 8


def test_stats_are_finite_whatever_the_report_lacks(report: Callable[..., ReplicaReport]) -> None:
    empty = scaling_stats(report(), 0.0, Slo())
    assert set(empty) == set(STATS)
    assert all(math.isfinite(value) for value in empty.values())
    busy = report(
        mode="fp8", running=20, step_time_s=0.01, oldest_waiting_s=0.5, ttft_p90_s=0.2, context_tokens=4000
    )
    stats = scaling_stats(busy, math.inf, Slo())
    assert stats == {
        "in_fp8": 1.0,
        "fixed": 0.0,
        "mode_s": 0.0,
        "strain": 0.5,
        "prompt_per_s": 0.0,
        "prompt_tokens": 0.0,
        "decode_per_s": pytest.approx(2000.0),
        "context": 200.0,
    }


def test_bad_settings_are_named() -> None:
    with pytest.raises(InvalidField, match="max_replicas"):
        ScalingConfig(min_replicas=4, max_replicas=2)
    with pytest.raises(InvalidField, match="headroom"):
        ScalingConfig(headroom=1.5)
    with pytest.raises(InvalidField, match="start_patience_s"):
        ScalingConfig(start_patience_s=-1.0)


def test_numbers_of_replicas_are_whole() -> None:
    config = ScalingConfig(min_replicas=1.0, max_replicas=2.0)  # type: ignore[arg-type]
    assert [repr(number) for number in (config.min_replicas, config.max_replicas)] == ["1", "2"]
    with pytest.raises(InvalidField, match="max_replicas"):
        ScalingConfig(max_replicas=2.5)  # type: ignore[arg-type]
