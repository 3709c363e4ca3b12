from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.loadtests.charts import Axis, element, label, number, steps

spans = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).filter(lambda pair: pair[1] - pair[0] > 1e-3)


@given(spans, st.floats(0, 1))
def test_a_linear_axis_is_proportional_and_holds_values_within(
    span: tuple[float, float], share: float
) -> None:
    low, high = span
    axis = Axis(low, high, 50, 150)
    assert axis.at(low + share * (high - low)) == pytest.approx(50 + 100 * share, abs=1e-6)
    assert axis.at(high + 1) == 150
    assert axis.at(low - 1) == 50


def test_a_log_axis_gives_equal_factors_equal_room() -> None:
    axis = Axis(1, 1000, 300, 0, log=True)
    assert [axis.at(value) for value in (1, 10, 100, 1000)] == pytest.approx([300, 200, 100, 0])


@given(spans, st.integers(1, 12))
def test_ticks_are_round_even_and_within(span: tuple[float, float], count: int) -> None:
    axis = Axis(*span, 0, 100)
    ticks = axis.ticks(count)
    assert len(ticks) <= count + 1
    for tick in ticks:
        assert span[0] - 1e-9 <= tick <= span[1] * (1 + 1e-12) + 1e-9
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(digits - d) for d in (1, 2, 5, 10)) < 1e-3


@given(st.floats(1e-3, 1e3), st.floats(31, 1e5))
def test_ticks_of_a_log_axis_are_there_and_within(low: float, factor: float) -> None:
    axis = Axis(low, low * factor, 0, 100, log=True)
    ticks = axis.ticks(5)
    assert ticks
    assert all(low <= tick <= low * factor for tick in ticks)


def test_an_axis_fits_its_values_and_turns_logarithmic_for_wide_ones() -> None:
    narrow = Axis.fitting([10, 20, 40], 0, 100)
    assert (narrow.low, narrow.log) == (0, False)
    assert narrow.high > 40
    wide = Axis.fitting([1, 2, 3, 5000], 0, 100)
    assert wide.log
    assert wide.low < 1 < 5000 < wide.high
    # One tiny value among many does not make the others unreadable.
    assert not Axis.fitting([0.001, *[50.0] * 100], 0, 100).log
    assert Axis.fitting([], 0, 100) == Axis(0, 1, 0, 100)


@pytest.mark.parametrize("bad", [(1, 1, False), (2, 1, False), (0, 1, True)])
def test_an_impossible_axis_is_refused(bad: tuple[float, float, bool]) -> None:
    with pytest.raises(ValueError, match="cannot run"):
        Axis(bad[0], bad[1], 0, 100, log=bad[2])


def test_elements_escape_what_they_are_given() -> None:
    assert element("rect", x=1.0, y=2.25, class_="a<b", data_tip='"', fill=None) == (
        '<rect x="1" y="2.2" class="a&lt;b" data-tip="&quot;"/>'
    )
    assert label(0, 0, "<&>") == '<text x="0" y="0" class="tick" text-anchor="start">&lt;&amp;&gt;</text>'
    assert element("p", "a", name="n") == '<p name="n">a</p>'


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (3.0, "3"), (0.25, "0.25"), (12345.6, "12,346")])
def test_numbers_have_no_needless_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_step_line_holds_values_and_keeps_peaks_of_crowded_columns() -> None:
    x, y = Axis(0, 100, 0, 100), Axis(0, 10, 100, 0)
    assert steps([(0, 1), (50, 4)], x, y, until=100) == "M0 90.0H50V60.0H100"
    crowded = steps([(n / 100, 9 if n == 137 else 1) for n in range(10_000)], x, y, until=100)
    assert len(re.findall("H", crowded)) <= 101
    assert "V10.0" in crowded
    assert steps([], x, y, until=1) == ""
