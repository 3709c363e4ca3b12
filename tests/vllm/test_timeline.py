"""What kernels add to a step, against times that can be told by looking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.vllm.bench.timeline import Span, added_time


def test_kernels_in_a_row_add_their_own_time() -> None:
    spans = [Span("norm", 0, 2), Span("product", 2, 10), Span("norm", 11, 13)]
    found = added_time(spans, steps=2, most=5)
    assert (found["total"], found["idle"]) == (6, 0.5)
    assert found["kernels"] == [
        {"name": "product", "us": 4, "launches": 0.5},
        {"name": "norm", "us": 2, "launches": 1},
    ]


def test_a_kernel_that_waits_for_the_one_before_adds_what_it_takes_behind_it() -> None:
    spans = [Span("product", 0, 10), Span("norm", 4, 12), Span("copy", 5, 6)]
    us = {kernel["name"]: kernel["us"] for kernel in added_time(spans, steps=1, most=5)["kernels"]}
    assert us == {"copy": 1, "product": 9, "norm": 2}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100), st.integers(1, 50)), min_size=1))
def test_shares_add_up_to_the_time_in_which_any_kernel_ran(runs: list[tuple[str, int, int]]) -> None:
    spans = [Span(name, start, start + length) for name, start, length in runs]
    busy = {moment for _, start, end in spans for moment in range(start, end)}
    found = added_time(spans, steps=1, most=3)
    assert sum(kernel["us"] for kernel in found["kernels"]) == found["total"] == len(busy)


def test_no_kernel_adds_nothing() -> None:
    assert added_time([], steps=1, most=3) == {"total": 0, "idle": 0, "kernels": []}
    assert pytest.approx(0) == added_time([Span("a", 3, 3)], 1, 3)["total"]
