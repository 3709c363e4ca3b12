"""The latency model: its formulas against direct counting, its fit against known costs, its correction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.latency import LatencyModel, Queue, StepCosts, StepSample, TokenLoad, fit
from nestedfp.policies.roofline import latency_model

COSTS = StepCosts(
    overhead_s=2e-3, weights_s=5e-3, token_s=2e-5, sequence_s=1e-5, context_token_s=5e-8, pair_s=1e-9
)


def test_a_step_is_memory_bound_first_and_compute_bound_later() -> None:
    costs = StepCosts(overhead_s=1e-3, weights_s=4e-3, token_s=1e-5)
    assert costs.step_s(1, 1, 0) == pytest.approx(5e-3)
    assert costs.step_s(400, 1, 0) == pytest.approx(5e-3)
    assert costs.step_s(800, 1, 0) == pytest.approx(9e-3)


@pytest.mark.parametrize("mode", ["fp16", "fp8"])
@pytest.mark.parametrize(
    ("batch", "prompt", "output", "fp16", "fp8"),
    [(1, 128, 64, 143, 217), (32, 128, 128, 3900, 5451), (256, 128, 128, 12091, 18401)],
)
def test_the_roofline_meets_the_measured_engine(
    mode: str, batch: int, prompt: int, output: int, fp16: float, fp8: float
) -> None:
    """Tokens/s of one H100 within 8 %, counting the steps of the run one by one."""
    costs = latency_model().costs[mode]
    prefill_s = sum(costs.step_s(min(2048, left), 16, 0) for left in range(batch * prompt, 0, -2048))
    decode_s = sum(costs.step_s(batch, batch, batch * (prompt + step)) for step in range(output))
    measured = fp16 if mode == "fp16" else fp8
    assert batch * output / (prefill_s + decode_s) == pytest.approx(measured, rel=0.08)


def test_steady_step_time_matches_a_simulated_constant_load() -> None:
    """Stepping an engine under a constant flow of tokens settles at the closed form."""
    load = TokenLoad(prompt_per_s=12_000.0, decode_per_s=1_500.0, context=600.0)
    step_s = 0.01
    for _ in range(2000):
        running = load.decode_per_s * step_s
        prompt = load.prompt_per_s * step_s
        step_s = float(COSTS.step_s(running + prompt, running, running * 600.0))
    assert COSTS.steady_step_s(load) == pytest.approx(step_s, rel=1e-6)


def test_prompts_in_lumps_make_the_mean_step_longer() -> None:
    """Steps without a prompt read all weights too: 10 prompts of 1,000 tokens a second at 25 ms each."""
    costs = StepCosts(overhead_s=1e-3, weights_s=5e-3, token_s=3e-5)
    lumps = TokenLoad(prompt_per_s=10_000.0, decode_per_s=0.0, prompt_tokens=1000.0)
    assert costs.steady_step_s(lumps) == pytest.approx(6e-3 / (1 - 10 * 25e-3))


def test_an_overload_has_no_steady_state() -> None:
    assert math.isinf(COSTS.steady_step_s(TokenLoad(prompt_per_s=60_000.0, decode_per_s=100.0)))


@given(st.integers(0, 30_000), st.integers(1, 4000), st.integers(0, 200))
@settings(deadline=None)
def test_ttft_counts_the_chunks_of_the_queue(waiting: int, prompt: int, running: int) -> None:
    model = LatencyModel(costs={"fp16": COSTS, "fp8": COSTS.scaled(0.5)}, chunk_tokens=2048)
    left, expected = waiting + prompt, 0.0
    while left > 0:
        chunk = min(left, 2048 - running)
        expected += COSTS.step_s(running + chunk, running + 1, 5000)
        left -= chunk
    queue = Queue(waiting_prompt_tokens=waiting, running=running, context=5000)
    slack = COSTS.step_s(running, running + 1, 5000)
    assert expected - 1e-9 <= model.ttft_s("fp16", queue, prompt) <= expected + slack + 1e-9
    assert model.ttft_s("fp8", queue, prompt) == pytest.approx(0.5 * model.ttft_s("fp16", queue, prompt))


@pytest.mark.parametrize("truth", [COSTS, latency_model().costs["fp8"]])
def test_fit_recovers_known_costs_from_a_noisy_profile(truth: StepCosts) -> None:
    random = np.random.default_rng(3)
    samples = []
    for _ in range(400):
        sequences = int(random.integers(1, 200))
        prompt = int(random.integers(0, 2048)) if random.random() < 0.5 else 0
        context = sequences * int(random.integers(100, 2000))
        pairs = prompt * int(random.integers(0, 1000))
        exact = truth.step_s(sequences + prompt, sequences, context, pairs)
        samples.append(
            StepSample(
                tokens=sequences + prompt,
                sequences=sequences,
                context=context,
                pairs=pairs,
                step_s=exact * float(random.normal(1.0, 0.01)),
            )
        )
    fitted = fit(samples)
    for sample in samples:
        sizes = (sample.tokens, sample.sequences, sample.context, sample.pairs)
        assert fitted.step_s(*sizes) == pytest.approx(truth.step_s(*sizes), rel=0.03)
    assert fitted.token_s == pytest.approx(truth.token_s, rel=0.05)
    assert fitted.overhead_s + fitted.weights_s == pytest.approx(truth.overhead_s + truth.weights_s, rel=0.05)


def test_fit_says_what_a_profile_lacks() -> None:
    sample = StepSample(tokens=5, sequences=5, context=100, pairs=0, step_s=0.01)
    with pytest.raises(InvalidField, match="at least 8"):
        fit([sample] * 7)
    with pytest.raises(InvalidField, match="different sizes"):
        fit([sample] * 20)
    with pytest.raises(InvalidField, match="at least 8"):
        fit([StepSample(tokens=i, sequences=1, context=0, pairs=0, step_s=math.nan) for i in range(20)])


def test_the_correction_converges_on_a_slower_engine_and_ignores_nonsense() -> None:
    model = latency_model()
    slower = model.costs["fp16"].scaled(1.5)
    for _ in range(200):
        predicted = model.of("fp16").step_s(300, 50, 20_000)
        model = model.corrected("fp16", predicted, slower.step_s(300, 50, 20_000))
    assert model.correction["fp16"] == pytest.approx(1.5, rel=0.01)
    assert model.of("fp8") == latency_model().costs["fp8"]
    for nonsense in (math.nan, -1.0, 0.0, math.inf):
        assert model.corrected("fp16", 0.01, nonsense) == model
    assert model.corrected("unknown-plan", 0.01, 0.02) == model


def test_a_model_needs_both_modes() -> None:
    with pytest.raises(InvalidField, match="fp8"):
        LatencyModel(costs={"fp16": COSTS})
