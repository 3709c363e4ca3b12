"""What 16-bit steps cost, from an engine's counts and a latency model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.misses import SAMPLES_KEPT, LostTime, shares
from nestedfp.policies.simulation import engine
from nestedfp.policies.simulation.state import (
    TPOT,
    TPOT_AT,
    TPOT_LOST,
    TTFT,
    TTFT_AT,
    TTFT_LOST,
    engines_of,
)

FAST, SLOW = (StepCosts(overhead_s=0.0, weights_s=s, token_s=s / 100) for s in (0.01, 0.02))
MODEL = LatencyModel(costs={"fp16": SLOW, "fp8": FAST})

times = st.lists(st.tuples(st.floats(0.01, 4.0), st.floats(0.0, 4.0)), max_size=12)


def column(rows: list[tuple[float, float]], place: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([row[place] for row in rows], dtype=np.float64)


@settings(deadline=None)  # the first example compiles
@given(times, times, st.floats(0.0, 4.0), st.floats(0.0, 4.0))
def test_shares_are_those_of_the_simulated_engines(
    ttft: list[tuple[float, float]], tpot: list[tuple[float, float]], ttft_limit: float, tpot_limit: float
) -> None:
    cluster = engines_of(1, 1)
    for rows, value, at, lost in ((ttft, TTFT, TTFT_AT, TTFT_LOST), (tpot, TPOT, TPOT_AT, TPOT_LOST)):
        cluster.recent[0, at, : len(rows)] = 0.0
        cluster.recent[0, value, : len(rows)] = column(rows, 0)
        cluster.recent[0, lost, : len(rows)] = column(rows, 1)
    missed, cost = np.empty(1), np.empty(1)
    engine.misses(1.0, 10.0, ttft_limit, tpot_limit, cluster, missed, cost)
    ours = shares(column(ttft, 0), column(ttft, 1), column(tpot, 0), column(tpot, 1), ttft_limit, tpot_limit)
    assert ours == pytest.approx((missed[0], cost[0]), nan_ok=True)


def counts(steps: int, seconds: float, tokens: int = 1) -> list[list[float]]:
    """Counts of an engine whose steps all have so many tokens, of as many requests."""
    return [[0, 0, 0, 0.0], [steps, steps * tokens, steps * tokens, seconds]]


def within(lost: LostTime, end: float, span: float, *, queued: bool = False) -> float:
    return float(lost.within(np.array([end]), np.array([span]), queued=queued)[0])


def test_half_of_a_16_bit_step_of_twice_the_time_is_lost_and_nothing_of_others() -> None:
    lost = LostTime(MODEL)
    assert within(lost, 1.0, 1.0) == 0.0
    lost.note(0.0, {"fp16": counts(900, 90.0), "fp8": counts(0, 0.0)}, context=0, queued_s=0.0)
    lost.note(1.0, {"fp16": counts(950, 91.0), "fp8": counts(0, 0.0)}, context=0, queued_s=0.0)
    lost.note(2.0, {"fp16": counts(950, 91.0), "fp8": counts(100, 1.0)}, context=0, queued_s=0.0)
    lost.note(3.0, {"fp16": counts(950, 91.0), "mlp": counts(100, 1.0)}, context=0, queued_s=0.0)
    assert within(lost, 1.0, 1.0) == pytest.approx(0.5)
    assert within(lost, 0.75, 0.5) == pytest.approx(0.25)
    assert within(lost, 3.0, 2.0) == 0.0
    assert within(lost, 9.0, 99.0) == pytest.approx(0.5)


def test_a_span_behind_a_queue_reaches_back_to_where_the_queue_began() -> None:
    lost = LostTime(MODEL)
    for second, queued_s in enumerate((0.0, 0.0, 0.5, 1.5, 0.0)):
        fp16 = counts(50 * second, 1.0 * second)
        lost.note(float(second), {"fp16": fp16}, context=0, queued_s=queued_s)
    assert within(lost, 3.0, 0.5) == pytest.approx(0.25)
    assert within(lost, 3.0, 0.5, queued=True) == pytest.approx(0.75)
    assert within(lost, 3.0, 2.0, queued=True) == pytest.approx(1.0)
    assert within(lost, 4.0, 0.5, queued=True) == pytest.approx(0.25)


def test_a_model_of_another_machine_learns_what_fp8_saves_here() -> None:
    """Steps take 40 times the model's time. Until FP8 is seen it is taken to be off by as much."""
    lost = LostTime(MODEL)
    fp16, fp8 = (0, 0.0), (0, 0.0)
    now = 0.0

    def pass_time(*, in_fp8: bool, seconds: float) -> None:
        nonlocal fp16, fp8, now
        while seconds > 0:
            if in_fp8:
                fp8 = (fp8[0] + 1, fp8[1] + 0.7)
            else:
                fp16 = (fp16[0] + 1, fp16[1] + 0.8)
            now, seconds = now + 0.8, seconds - 0.8
            steps = {"fp16": counts(*fp16), "fp8": counts(*fp8)}
            lost.note(now, steps, context=0, queued_s=0.0)

    pass_time(in_fp8=False, seconds=100.0)
    assert within(lost, now, 80.0) == pytest.approx(40.0)
    pass_time(in_fp8=True, seconds=100.0)
    pass_time(in_fp8=False, seconds=80.0)
    assert within(lost, now, 80.0) == pytest.approx(10.0, rel=0.05)
    assert lost.model.correction["fp16"] == pytest.approx(40.0, rel=0.05)


def test_fp8_that_is_slower_loses_nothing() -> None:
    lost = LostTime(LatencyModel(costs={"fp16": FAST, "fp8": SLOW}))
    for second in range(3):
        lost.note(float(second), {"fp16": counts(second, 1.0 * second)}, context=0, queued_s=0.0)
    assert within(lost, 2.0, 2.0) == 0.0


def test_what_is_kept_is_bounded_and_a_calm_hour_takes_one_place() -> None:
    lost = LostTime(MODEL)
    for second in range(2 * SAMPLES_KEPT):
        lost.note(float(second), {"fp16": counts(second, 1.0 * second)}, context=0, queued_s=0.0)
    assert len(lost._points) == SAMPLES_KEPT
    assert within(lost, float(second), 1e9) == pytest.approx(0.5 * (SAMPLES_KEPT - 1))
    calm = LostTime(MODEL)
    for second in range(3600):
        calm.note(float(second), {"fp16": counts(min(second, 100), 1.0)}, context=0, queued_s=0.0)
    assert len(calm._points) < 110
