"""Calibration: costs are recovered from cells that the simulator itself made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulation.calibration import (
    Cell,
    Host,
    Limits,
    calibrate,
    cells_of,
    errors_of,
    limits_of,
)

TRUE = latency_model().of("fp16")
LIMITS = Limits(chunk_tokens=2048)
HOST = Host(first_token_s=0.003, request_s=0.0001)
SHAPES = ((1, 128, 64), (32, 128, 64), (128, 256, 32), (16, 1024, 32))


def cells() -> list[Cell]:
    """What an engine with the costs TRUE would measure."""
    made = []
    for batch, prompt, output in SHAPES:
        unit = Cell(
            batch=batch, prompt_tokens=prompt, output_tokens=output, tokens_per_s=1.0, ttft_s=1.0, tpot_s=1.0
        )
        speed, ttft, tpot = (1.0 + error for error in errors_of(TRUE, [unit], LIMITS, HOST).errors[0])
        made.append(replace(unit, tokens_per_s=speed, ttft_s=ttft, tpot_s=tpot))
    return made


def test_the_right_costs_have_no_error_and_wrong_ones_do() -> None:
    assert errors_of(TRUE, cells(), LIMITS, HOST).worst == pytest.approx(0.0, abs=1e-12)
    assert errors_of(TRUE, cells(), LIMITS).worst > 0.2, "a first token takes more than its steps"
    slow = errors_of(TRUE, cells(), LIMITS, HOST._replace(request_s=0.001)).errors
    assert slow[0][1] < 0.06 < slow[1][1], "each of 32 requests waits until all are handed over"
    assert errors_of(TRUE.scaled(1.3), cells(), LIMITS, HOST).worst > 0.2


def test_a_wrong_start_is_corrected() -> None:
    start = replace(TRUE, overhead_s=3e-3, weights_s=3e-3, token_s=1.5 * TRUE.token_s)
    fit = calibrate(start, cells(), LIMITS)
    assert fit.worst < min(0.1, 0.3 * errors_of(start, cells(), LIMITS).worst)
    assert fit.costs.token_s == pytest.approx(TRUE.token_s, rel=0.1)


def test_a_batch_that_the_kv_cache_does_not_hold_waits() -> None:
    cell = Cell(batch=32, prompt_tokens=64, output_tokens=256, tokens_per_s=1.0, ttft_s=1.0, tpot_s=1.0)
    cells = [replace(cell, kv_tokens=tokens) for tokens in (16_384, 4_096)]
    roomy, tight = errors_of(TRUE, cells, LIMITS).errors
    assert tight[0] < 0.7 * roomy[0]
    assert tight[1] > 2 * roomy[1]


def test_limits_are_the_benchmarks() -> None:
    settings = {"max_num_batched_tokens": 8192, "max_num_seqs": 64}
    assert limits_of({"settings": settings}) == Limits(chunk_tokens=8192, max_sequences=64)


def test_cells_come_from_a_benchmark_and_none_is_refused() -> None:
    row = {
        "contender": "nestedfp-fp8",
        "dtype": "float16",
        "batch": 4,
        "input_len": 128,
        "output_len": 64,
        "tokens_per_s": 700.0,
        "ttft_ms": 20.0,
        "tpot_ms": 5.0,
        "kv_blocks": 100,
    }
    (cell,) = cells_of(
        {
            "rows": [
                row,
                {**row, "contender": "other"},
                {**row, "dtype": "bfloat16"},
                {**row, "ttft_ms": None},
            ]
        },
        "nestedfp-fp8",
        "float16",
    )
    assert cell.figures() == (700.0, 0.02, 0.005)
    assert cell.kv_tokens == 1600
    with pytest.raises(InvalidField, match="cells"):
        calibrate(TRUE, [], LIMITS)
