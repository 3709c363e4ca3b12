"""The joint rule ahead of a growing load: what counts as growth, and how long a start takes."""

from __future__ import annotations

import re

import pytest
from scaling_rule import FP8, OVER, STUCK, Rule

from nestedfp.policies.autoscaling import Scaling, ScalingState

GROWING_S = 200.0
"""Long enough for a trend."""


def grow(rule: Rule, per_s: float, rows: int = 2, until_s: float = GROWING_S) -> Scaling:
    """What is wanted in the end, or at the first change, where each replica's prompt tokens a second start at
    40,000 and grow: FP8 holds 60,000."""
    scaling = Scaling(rows, "")
    for second in range(int(until_s) + 1):
        row = {**FP8, "mode_s": 1.0, "prompt_per_s": 40_000.0 + per_s * second}
        scaling = rule.at(float(second), [row] * rows)
        if scaling.replicas != rows:
            break
    return scaling


def test_a_load_that_grows_is_ordered_for_before_fp8_is_not_enough() -> None:
    steady, growing = Rule(), Rule()
    assert grow(steady, per_s=0.0) == Scaling(2, "2 replicas in FP8, 0 starting: hold")
    scaling = grow(growing, per_s=100.0)
    assert scaling.replicas == 3
    assert re.fullmatch(r"load grows by \d+% in 120 s, too much for FP8", scaling.reason)


def test_growth_that_fp8_will_carry_is_no_reason() -> None:
    assert grow(Rule(), per_s=10.0).replicas == 2


def test_a_replica_that_is_silent_for_a_minute_is_no_growth() -> None:
    rule, rows = Rule(), [{**FP8, "mode_s": 1.0, "prompt_per_s": 55_000.0}] * 4
    for second in range(600):
        heard = rows[:2] if 200 <= second < 260 else rows
        scaling = rule.at(float(second), heard, current=4, starting=4 - len(heard))
        assert scaling.replicas == 4, (second, scaling.reason)


def test_a_replica_that_returns_while_another_starts_is_no_growth() -> None:
    rule, rows = Rule(), [{**FP8, "mode_s": 1.0, "prompt_per_s": 48_000.0}] * 5
    rule.state = ScalingState(ordered_since_s=0.0)
    for second in range(400):
        heard = rows[:3] if 100 <= second < 170 else rows[:4]
        scaling = rule.at(float(second), heard, current=5, starting=5 - len(heard))
        assert scaling.replicas == 5, (second, scaling.reason)


def test_a_replica_silent_for_some_seconds_does_not_hide_growth() -> None:
    rule, scaling = Rule(), Scaling(4, "")
    for second in range(300):
        rows = [{**FP8, "mode_s": 1.0, "prompt_per_s": 40_000.0 + 100.0 * second}] * 4
        heard = rows[:3] if second % 50 < 7 else rows
        scaling = rule.at(float(second), heard, current=4, starting=4 - len(heard))
        if scaling.replicas > 4:
            break
    assert scaling.replicas > 4
    assert "load grows" in scaling.reason


def test_a_load_that_hardly_grows_is_left_to_what_replicas_say() -> None:
    rule, row = Rule(), {**FP8, "mode_s": 1.0, "prompt_per_s": 65_000.0}
    for second in range(300):
        row = {**row, "prompt_per_s": row["prompt_per_s"] + 0.05}
        assert rule.at(float(second), [row] * 2).replicas == 2


def test_at_the_most_replicas_growth_changes_nothing() -> None:
    rule = Rule()
    for second in range(300):
        row = {**FP8, "mode_s": float(second), "prompt_per_s": 55_000.0 + 100.0 * second}
        scaling = rule.at(float(second), [row] * 8)
        assert scaling.replicas == 8
        assert "grows" not in scaling.reason
    assert rule.state.ordered_since_s is None


@pytest.mark.parametrize("later_s", [3995.0, 400.0, -3600.0])
def test_what_was_no_start_is_not_timed(later_s: float) -> None:
    rule = Rule()
    rule.at(0.0, [OVER])
    ordered = rule.at(5.0, [OVER]).replicas
    rule.at(6.0, [OVER], current=ordered, starting=ordered - 1)
    rule.at(6.0 + later_s, [FP8] * ordered, current=ordered)
    assert rule.state.start_s is None


def test_a_replica_that_has_started_does_not_end_a_trend() -> None:
    rule = Rule()
    grow(rule, per_s=100.0)
    before = rule.state.demand.points
    last_s = 10.0 * before[-1].bucket
    row = {**FP8, "mode_s": 1.0, "prompt_per_s": 30_000.0}
    rule.at(last_s + 10.0, [row] * 2, current=3, starting=1)
    rule.at(last_s + 11.0, [row] * 3, current=3)
    assert len(rule.state.demand.points) == len(before)
    assert rule.state.demand.points[-1].bucket == before[-1].bucket + 1


def test_those_that_start_are_counted_on_where_a_load_grows() -> None:
    rule = Rule()
    grow(rule, per_s=100.0)
    now = GROWING_S
    row = {**FP8, "mode_s": 1.0, "prompt_per_s": 60_000.0}
    assert rule.at(now, [row] * 2, current=3, starting=1).replicas == 3


def test_where_16_bits_must_stay_growth_is_measured_by_them() -> None:
    rule, wanted = Rule(), 0
    for second in range(int(GROWING_S)):
        row = {**STUCK, "strain": 0.5, "prompt_per_s": 20_000.0 + 60.0 * second}
        wanted = rule.at(float(second), [row] * 2).replicas
        if wanted != 2:
            break
    assert wanted == 3


def test_how_long_a_start_takes_is_measured() -> None:
    rule = Rule()
    rule.at(0.0, [OVER])
    ordered = rule.at(5.0, [OVER]).replicas
    assert rule.state.start_s is None
    rule.at(6.0, [OVER], current=ordered, starting=ordered - 1)
    rule.at(80.0, [FP8] * ordered, current=ordered)
    assert rule.state.start_s == 75.0
    # One that falls silent for a moment was not ordered.
    rule.at(90.0, [FP8] * (ordered - 1), current=ordered, starting=1)
    rule.at(92.0, [FP8] * ordered, current=ordered)
    assert rule.state.start_s == 75.0


def test_an_order_that_serve_has_not_taken_up_yet_is_not_timed() -> None:
    rule = Rule()
    rule.at(0.0, [OVER])
    rule.at(5.0, [OVER])
    rule.at(6.0, [FP8])
    assert rule.state.start_s is None
