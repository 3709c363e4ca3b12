from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.loadtests.readers import read_trace
from nestedfp.loadtests.traces import ANY, STRICT, Trace


def trace(arrivals: list[float], prompt: int = 10, output: int = 5) -> Trace:
    return Trace.from_columns("t", arrivals, [prompt] * len(arrivals), [output] * len(arrivals))


requests = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 100_000), st.integers(1, 10_000), st.booleans()),
    min_size=1,
    max_size=50,
)


@given(requests)
def test_columns_in_any_order_become_arrival_order(rows: list[tuple[float, int, int, bool]]) -> None:
    arrival, prompt, output, strict = zip(*rows, strict=True)
    made = Trace.from_columns("t", arrival, prompt, output, strict)
    expected = sorted(rows, key=lambda row: row[0])
    got = [(r.arrival_s, r.prompt_tokens, r.output_tokens, r.precision_class == STRICT) for r in made]
    assert got == expected
    assert [r.index for r in made] == list(range(len(rows)))


@given(requests)
def test_save_and_read_give_the_same_trace(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:  # type: ignore[type-arg]
    arrival, prompt, output, strict = zip(*rows, strict=True)
    made = Trace.from_columns("named", arrival, prompt, output, strict, ("a note",))
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    made.save(path)
    back = read_trace(path)
    assert list(back) == list(made)
    assert (back.name, back.history) == (made.name, made.history)


@given(requests, st.floats(1e-3, 1e3), st.floats(1e-3, 10))
def test_scaling_time_and_length_is_separate_and_recorded(
    rows: list[tuple[float, int, int, bool]], time: float, length: float
) -> None:
    arrival, prompt, output, strict = zip(*rows, strict=True)
    made = Trace.from_columns("t", arrival, prompt, output, strict)
    scaled = made.scaled(time=time, length=length)
    for before, after in zip(made, scaled, strict=True):
        assert after.arrival_s == pytest.approx(before.arrival_s * time)
        assert after.prompt_tokens == max(1, round(before.prompt_tokens * length))
        assert after.output_tokens == max(1, round(before.output_tokens * length))
    assert len(scaled.history) - len(made.history) == (time != 1.0) + (length != 1.0)


def test_scaling_time_keeps_burstiness_and_changes_rate() -> None:
    made = trace([0, 1, 2, 10, 11, 40])
    half = made.scaled(time=0.5)
    assert half.rate_rps == pytest.approx(2 * made.rate_rps)  # type: ignore[operator]
    assert half.interarrival_cv == pytest.approx(made.interarrival_cv)
    assert half.history == ("time x 0.5",)


def test_window_takes_a_half_open_part_and_rebases_it() -> None:
    cut = trace([0, 1, 2, 3, 4]).window(1, 2)
    assert [r.arrival_s for r in cut] == [0, 1]
    assert cut.history == ("window 1 s + 2 s",)


def test_an_empty_window_is_an_error_that_names_the_trace() -> None:
    with pytest.raises(ValueError, match="'t' has no requests"):
        trace([0, 1]).window(5, 1)


def test_clipping_counts_what_it_cut() -> None:
    made = Trace.from_columns("t", [0, 1, 2], [5, 50, 500], [1, 2, 3]).clipped(max_prompt_tokens=50)
    assert [r.prompt_tokens for r in made] == [5, 50, 50]
    assert made.history == ("prompt_tokens cut to 50 in 1 requests",)
    assert made.clipped(max_output_tokens=9) is made


def test_strict_share_is_seeded_and_about_right() -> None:
    made = trace(list(map(float, range(4000)))).with_strict_share(0.3, seed=7)
    assert made.strict.mean() == pytest.approx(0.3, abs=0.03)
    assert (made.strict == trace(list(map(float, range(4000)))).with_strict_share(0.3, seed=7).strict).all()
    assert {r.precision_class for r in made} == {ANY, STRICT}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0.0, np.nan], [1, 1], [1, 1]), "finite"),
        (([-1.0, 0.0], [1, 1], [1, 1]), "not negative"),
        (([0.0], [0], [1]), "prompt_tokens holds 0"),
        (([0.0], [1], [0]), "output_tokens holds 0"),
        (([0.0, 1.0], [1], [1, 1]), "shapes"),
        (([], [], []), "no requests"),
    ],
)
def test_bad_columns_are_refused(columns: tuple[list[float], list[int], list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace.from_columns("t", *columns)


@pytest.mark.parametrize("change", [{"time": 0.0}, {"time": float("nan")}, {"length": -1.0}])
def test_a_bad_scale_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        trace([0.0]).scaled(**change)


def test_first_reads_only_so_many_lines(tmp_path: Path) -> None:
    made = trace(list(map(float, range(10))))
    made.save(tmp_path / "t.jsonl")
    assert len(read_trace(tmp_path / "t.jsonl", limit=4)) == 4
    assert len(made.first(4)) == 4
    assert made.first(99) is made
