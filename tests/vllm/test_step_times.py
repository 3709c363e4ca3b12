"""When the steps in flight end, and what is learned from those that have ended."""

import pytest

from nestedfp.policies.steps import StepTerms
from nestedfp.vllm.step_times import StepTimes

TERMS = {
    "fp16": StepTerms(0.002, 0.006, 20e-6, 10e-6, 40e-9, 1e-9),
    "fp8": StepTerms(0.002, 0.003, 10e-6, 10e-6, 40e-9, 1e-9),
}


def step_s(plan: str, tokens: int) -> float:
    terms = TERMS[plan]
    return terms.overhead_s + max(terms.weights_s, tokens * terms.token_s)


def test_the_time_ahead_is_that_of_all_steps_in_flight() -> None:
    times = StepTimes(TERMS)
    assert times.ahead_s(5.0) == 0.0
    times.scheduled("fp16", 1000, 0, 0, 5.0)
    assert times.ahead_s(5.0) == pytest.approx(step_s("fp16", 1000))
    times.scheduled("fp8", 1000, 0, 0, 5.01)
    both = step_s("fp16", 1000) + step_s("fp8", 1000)
    assert times.ahead_s(5.01) == pytest.approx(both - 0.01)
    times.finished(5.0, 5.02)
    # The first ended sooner than predicted; the second has just begun.
    assert times.ahead_s(5.02) == pytest.approx(step_s("fp8", 1000))
    times.finished(5.01, 5.03)
    assert times.ahead_s(5.03) == 0.0


def test_a_step_from_before_the_bounds_is_not_taken_for_another() -> None:
    times = StepTimes(TERMS)
    times.scheduled("fp16", 1000, 0, 0, 5.01)
    times.finished(5.0, 5.03)
    assert times.corrections == {}
    assert times.ahead_s(5.03) == pytest.approx(step_s("fp16", 1000) - 0.02)
    times.finished(5.01, 5.03 + step_s("fp16", 1000))
    assert times.corrections["fp16"] == pytest.approx(1.0)


def test_the_terms_follow_the_steps_of_their_precision() -> None:
    times = StepTimes(TERMS)
    now = 1.0
    for _ in range(300):
        began = now
        times.scheduled("fp16", 1000, 4, 9000, began)
        now += 3.0 * (step_s("fp16", 1000) + 4 * 10e-6 + 9000 * 40e-9)
        times.finished(began, now)
    assert times.corrections == {"fp16": pytest.approx(3.0, rel=1e-3)}
    assert times.of("fp16").token_s == pytest.approx(3.0 * 20e-6, rel=1e-3)
    assert times.of("fp8") == TERMS["fp8"]
    assert times.terms == TERMS


def test_a_step_that_was_scheduled_ahead_is_timed_from_the_output_before_it() -> None:
    times = StepTimes(TERMS)
    took = step_s("fp16", 1000)
    scheduled = [1.0 + number * took - took for number in range(50)]
    for number, at in enumerate(scheduled):
        times.scheduled("fp16", 1000, 0, 0, at)
        if number:
            times.finished(scheduled[number - 1], 1.0 + number * took)
    assert times.corrections["fp16"] == pytest.approx(1.0, rel=0.05)


def test_a_plan_in_between_counts_as_slow_as_16_bits_and_corrects_nothing() -> None:
    times = StepTimes(TERMS)
    times.scheduled("mlp", 1000, 0, 0, 1.0)
    assert times.ahead_s(1.0) == pytest.approx(step_s("fp16", 1000))
    times.finished(1.0, 9.0)
    assert times.corrections == {}
