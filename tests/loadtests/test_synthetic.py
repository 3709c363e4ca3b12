from __future__ import annotations

import math

import numpy as np
import pytest

from nestedfp.loadtests.prompts import WORDS, prompt_text
from nestedfp.loadtests.synthetic import Lengths, Segment, gamma, mmpp, piecewise, square_wave

P, O = Lengths(64), Lengths(16)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_has_the_rate_and_cv_asked_for(cv: float) -> None:
    trace = gamma(P, O, rate_rps=20, duration_s=5000, cv=cv, seed=1)
    # The count of a renewal process over T has standard deviation of about cv * sqrt(rate * T).
    assert abs(len(trace) - 100_000) < 4 * cv * math.sqrt(100_000)
    assert trace.interarrival_cv == pytest.approx(cv, rel=0.03)


def test_gaps_of_cv_one_are_exponential() -> None:
    gaps = np.sort(np.diff(gamma(P, O, rate_rps=10, duration_s=2000, seed=3).arrival_s))
    uniform = 1 - np.exp(-10 * gaps)
    distance = np.abs(uniform - np.arange(1, len(gaps) + 1) / len(gaps)).max()
    assert distance < 1.63 / math.sqrt(len(gaps))  # Kolmogorov-Smirnov, 1 %


def test_square_wave_has_each_segments_rate() -> None:
    trace = square_wave(P, O, calm_rps=5, burst_rps=50, calm_s=400, burst_s=100, bursts=2, seed=5)
    starts = [0, 400, 500, 900, 1000, 1400]
    for start, end, rate in zip(starts, starts[1:], [5, 50, 5, 50, 5], strict=False):
        count = int(((trace.arrival_s >= start) & (trace.arrival_s < end)).sum())
        expected = rate * (end - start)
        assert abs(count - expected) < 4 * math.sqrt(expected)
    assert trace.duration_s < 1400


def test_no_burst_is_calm_of_equal_length() -> None:
    calm = square_wave(P, O, calm_rps=5, burst_rps=50, calm_s=100, burst_s=50, bursts=0, seed=5)
    assert calm.duration_s < 100


def test_mmpp_has_the_rate_and_burstiness_of_theory() -> None:
    calm, burst, mean_calm, mean_burst = 2.0, 20.0, 5.0, 2.0
    trace = mmpp(
        P, O, calm_rps=calm, burst_rps=burst, mean_calm_s=mean_calm, mean_burst_s=mean_burst,
        duration_s=40_000, seed=2,
    )  # fmt: skip
    leave_calm, leave_burst = 1 / mean_calm, 1 / mean_burst
    rate = (calm * mean_calm + burst * mean_burst) / (mean_calm + mean_burst)
    # Squared CV of the gaps of a two-state MMPP in interval-stationary state (Fischer and Meier-Hellstern).
    squared = 1 + 2 * leave_calm * leave_burst * (calm - burst) ** 2 / (
        (leave_calm + leave_burst) ** 2 * (calm * burst + calm * leave_burst + burst * leave_calm)
    )
    assert trace.rate_rps == pytest.approx(rate, rel=0.03)
    assert trace.interarrival_cv == pytest.approx(math.sqrt(squared), rel=0.03)


@pytest.mark.parametrize("make", [gamma, square_wave, mmpp])
def test_equal_arguments_give_equal_traces_and_seeds_differ(make: object) -> None:
    arguments = {
        gamma: {"rate_rps": 5, "duration_s": 20},
        square_wave: {"calm_rps": 2, "burst_rps": 9, "calm_s": 5, "burst_s": 5},
        mmpp: {"calm_rps": 2, "burst_rps": 9, "mean_calm_s": 5, "mean_burst_s": 5, "duration_s": 30},
    }[make]  # type: ignore[index]
    long = Lengths(64, 0.5), Lengths(16, 0.5)
    one, same, other = (list(make(*long, **arguments, seed=seed)) for seed in (1, 1, 2))  # type: ignore[operator]
    assert one == same
    assert one != other


def test_a_silent_segment_has_no_arrivals() -> None:
    trace = piecewise([Segment(10, 20), Segment(10, 0), Segment(10, 20)], P, O, seed=0)
    assert not ((trace.arrival_s > 10) & (trace.arrival_s < 20)).any()
    assert (trace.arrival_s > 20).any()


def test_lengths_have_the_mean_and_cv_asked_for() -> None:
    drawn = Lengths(200, 0.4).sample(50_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(200, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(0.4, rel=0.02)
    assert set(Lengths(7).sample(10, np.random.default_rng(0))) == {7}
    assert Lengths(50, 2.0, longest=60).sample(1000, np.random.default_rng(0)).max() == 60


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Lengths(0),
        lambda: Lengths(5, -1),
        lambda: Lengths(50, longest=10),
        lambda: Segment(0, 1),
        lambda: Segment(1, -1),
        lambda: gamma(P, O, rate_rps=1, duration_s=10, cv=0),
        lambda: gamma(P, O, rate_rps=math.nan, duration_s=10),
        lambda: gamma(P, O, rate_rps=0, duration_s=10),
        lambda: mmpp(P, O, calm_rps=1, burst_rps=2, mean_calm_s=0, mean_burst_s=1, duration_s=5),
        lambda: square_wave(P, O, calm_rps=1, burst_rps=2, calm_s=1, burst_s=1, bursts=-1),
    ],
)
def test_bad_arguments_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"give|must|no requests"):
        bad()  # type: ignore[operator]


def test_prompts_are_words_deterministic_and_share_no_prefix() -> None:
    texts = [prompt_text(40, seed=3, index=index) for index in range(200)]
    assert texts == [prompt_text(40, seed=3, index=index) for index in range(200)]
    assert all(len(text.split()) == 40 and set(text.split()) <= set(WORDS) for text in texts)
    assert len({" ".join(text.split()[:4]) for text in texts}) == 200
    assert prompt_text(40, seed=4, index=0) != texts[0]
    with pytest.raises(ValueError, match="at least 1"):
        prompt_text(0, 0, 0)
