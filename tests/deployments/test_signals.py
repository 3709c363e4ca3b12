"""Arrivals, TTFT and TPOT over a window of a fake clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.deployments.signals import RequestWindow, percentile, report_signals
from nestedfp.policies.config import Slo


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(
    ttft: list[float] | None = None,
    itl: list[float] | None = None,
    tpot: list[float] | None = None,
    prompt: int = 0,
) -> Any:
    finished = [SimpleNamespace(mean_time_per_output_token=t, num_generation_tokens=5) for t in tpot or []]
    return SimpleNamespace(
        num_prompt_tokens=prompt,
        time_to_first_tokens_iter=ttft or [],
        inter_token_latencies_iter=itl or [],
        finished_requests=finished,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def window(clock: Clock) -> RequestWindow:
    return RequestWindow(10.0, clock=clock)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.1, 100))
def test_percentile_is_numpys_inverted_cdf(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


def test_nothing_seen_is_none_not_zero(window: RequestWindow) -> None:
    assert window.ttft_s(90.0) is None
    assert window.tpot_s(90.0) is None
    assert window.arrivals_per_s() == 0.0


def test_values_leave_with_the_window(window: RequestWindow, clock: Clock) -> None:
    window.record(None, step(ttft=[5.0]))
    clock.now += 6
    window.record(None, step(ttft=[1.0]))
    assert window.ttft_s(90.0) == 5.0
    clock.now += 5
    assert window.ttft_s(90.0) == 1.0
    clock.now += 6
    assert window.ttft_s(90.0) is None


def test_arrival_rate_over_a_young_and_a_full_window(window: RequestWindow, clock: Clock) -> None:
    for _ in range(8):
        window.arrived()
    assert window.arrivals_per_s() == 8.0
    clock.now += 4
    assert window.arrivals_per_s() == 2.0
    clock.now += 1
    assert window.arrivals_per_s() == 8 / 5
    clock.now += 0.5
    assert window.arrivals_per_s() == 0.0


def test_tpot_of_running_requests_counts_before_any_has_finished(window: RequestWindow) -> None:
    window.record(None, step(itl=[0.1, 0.3]))
    assert window.tpot_s(90.0) == pytest.approx(0.2)
    window.record(None, step(tpot=[0.05, 0.5]))
    assert window.tpot_s(90.0) == 0.5


def test_one_token_has_no_tpot(window: RequestWindow) -> None:
    single = SimpleNamespace(mean_time_per_output_token=0.0, num_generation_tokens=1)
    iteration = step()
    iteration.finished_requests = [single]
    window.record(None, iteration)
    window.record(None, None)
    assert window.tpot_s(90.0) is None


def test_prompt_tokens_and_misses_over_the_window(window: RequestWindow, clock: Clock) -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.03)
    assert window.miss_share(slo) is None
    assert window.prompt_tokens_per_s() == 0.0
    clock.now += 5.0
    window.record(None, step(ttft=[0.5, 2.0, 0.5, 0.5], prompt=400))
    assert window.prompt_tokens_per_s() == 400 / 5
    assert window.miss_share(slo) == 0.25
    window.record(None, step(tpot=[0.02, 0.04]))
    assert window.miss_share(slo) == 0.75
    clock.now += 11.0
    assert window.miss_share(slo) is None
    assert window.prompt_tokens_per_s() == 0.0


def test_a_report_without_an_answer_of_the_engine_says_only_what_is_known(window: RequestWindow) -> None:
    window.arrived()
    signals = report_signals(window, Slo(), None, age_s=0.1)
    assert signals["arrivals_per_s"] == 1.0
    assert "running" not in signals
    assert "age_s" not in signals
