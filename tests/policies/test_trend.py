"""A trend tells growth from noise, and forgets what is not of one piece."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.policies.trend import BUCKET_S, MOST_GROWTH, POINTS, Trend

SPAN_S = (POINTS + 1) * BUCKET_S


def after(values: list[float], start_s: float = 0.0, each: int = 5) -> Trend:
    """What is seen of one value for each bucket, repeated `each` times within it."""
    trend = Trend()
    for number, value in enumerate(values):
        for part in range(each):
            trend = trend.seen(value, start_s + BUCKET_S * (number + part / each))
    return trend


def ramp(slope: float, level: float = 1000.0, count: int = POINTS + 1) -> list[float]:
    return [level + slope * number for number in range(count)]


@pytest.mark.parametrize("slope", [1.0, 10.0, 25.0])
def test_a_straight_line_is_continued(slope: float) -> None:
    values = ramp(slope)
    expected = 1.0 + 12.0 * slope / values[-2]
    assert after(values).growth(12.0 * BUCKET_S) == pytest.approx(min(MOST_GROWTH, expected))


@pytest.mark.parametrize("slope", [0.0, -1.0, -30.0])
def test_what_stays_or_falls_does_not_grow(slope: float) -> None:
    assert after(ramp(slope)).growth(600.0) == 1.0


def test_nothing_is_said_before_there_are_enough_points() -> None:
    values = ramp(50.0)
    assert after(values[:-1]).growth(120.0) == 1.0
    assert after(values).growth(120.0) > 1.0


def test_an_old_part_of_the_past_does_not_count() -> None:
    values = [5000.0] * 50 + ramp(20.0)
    assert after(values).growth(120.0) == after(ramp(20.0)).growth(120.0)


def test_a_load_that_only_varies_seldom_grows() -> None:
    generator = np.random.default_rng(1)
    grown = [after(list(generator.gamma(4.0, 250.0, POINTS + 1)), each=1).growth(120.0) for _ in range(2000)]
    assert np.mean(np.array(grown) > 1.0) < 0.05
    assert np.mean(np.array(grown) > 1.2) < 0.04


def test_growth_in_noise_is_found_and_not_overstated() -> None:
    generator = np.random.default_rng(2)
    line = np.array(ramp(50.0))
    truth = 1.0 + 12.0 * 50.0 / line[-2]
    grown = [
        after(list(line * generator.normal(1.0, 0.05, line.size)), each=1).growth(120.0) for _ in range(500)
    ]
    assert np.mean(np.array(grown) > 1.0) > 0.99
    assert 0.8 * truth < np.median(grown) < truth


@pytest.mark.parametrize("jump_s", [-3600.0, -BUCKET_S, 2.0 * BUCKET_S, 3600.0])
def test_a_gap_or_a_clock_set_back_begins_anew(jump_s: float) -> None:
    trend = after(ramp(50.0)).seen(9000.0, SPAN_S - 0.1 + jump_s)
    assert len(trend.points) == 1
    assert trend.growth(120.0) == 1.0


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1e9), st.floats(-100.0, 100.0)),
        max_size=60,
    ),
    st.floats(0.0, 3600.0),
)
def test_growth_is_bounded_whatever_is_seen(steps: list[tuple[float, float]], ahead_s: float) -> None:
    trend, now = Trend(), 1e6
    for value, step_s in steps:
        now += step_s
        trend = trend.seen(value, now)
        assert len(trend.points) <= POINTS + 1
        assert 1.0 <= trend.growth(ahead_s) <= MOST_GROWTH


def test_a_load_whose_deviations_last_seldom_grows() -> None:
    """As those of conversations do: what is high now is mostly so half a minute later."""
    generator = np.random.default_rng(3)
    grown = []
    for _ in range(2000):
        deviation = generator.normal()
        values = []
        for shock in generator.normal(size=POINTS + 1):
            deviation = 0.7 * deviation + math.sqrt(1 - 0.7**2) * shock
            values.append(max(0.0, 1000.0 * (1.0 + 0.3 * deviation)))
        grown.append(after(values, each=1).growth(120.0))
    assert np.mean(np.array(grown) > 1.05) < 0.12


@given(st.lists(st.floats(0.0, 1e6), min_size=POINTS + 1, max_size=POINTS + 1))
def test_the_slope_is_that_of_least_squares(values: list[float]) -> None:
    """Against numpy's fit, with the standard error from its covariance and the neighbours' correlation."""
    points = np.arange(POINTS)
    line, covariance = np.polyfit(points, values[:-1], 1, cov=True)
    slope, level = line[0], np.polyval(line, POINTS - 1)
    rest = np.array(values[:-1]) - np.polyval(line, points)
    r = np.clip(rest[:-1] @ rest[1:] / (rest @ rest), 0.0, 0.9) if rest @ rest > 1e-6 else 0.0
    certain = slope - 2.0 * math.sqrt(covariance[0, 0] * (1 + r) / (1 - r))
    growth = after(values, each=1).growth(120.0)
    if level > 1e-3 and certain > 1e-3:
        assert growth == pytest.approx(min(MOST_GROWTH, 1.0 + certain * 12.0 / level), rel=1e-6)
    elif certain < -1e-3:
        assert growth == 1.0
