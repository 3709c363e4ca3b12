"""What the benchmark through Ray Serve counts, on minutes made by hand."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_serve_policy", ROOT / "bench" / "serve_policy.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_thinning_keeps_the_shape_and_thickening_repeats(module: ModuleType) -> None:
    minute = module.Minute(list(range(100)), [5] * 100, [7] * 100)
    kept = module.thinned(minute, 0.25).arrival_s
    assert len(kept) == 25
    assert set(np.diff(kept)) == {4}
    doubled = module.thinned(minute, 2.0)
    assert doubled.arrival_s[:4] == [0, 0, 1, 1]
    assert module.thinned(minute, 1.0) == minute


def request(module: ModuleType, first_s: float, gap_s: float, tokens: int, mode: str = "fp16") -> object:
    times = [first_s + gap_s * number for number in range(tokens)]
    return module.Served(first_s, times, [mode] * tokens)


def test_a_second_violates_by_the_requests_that_finish_in_it(module: ModuleType) -> None:
    slow = request(module, 3.0, 0.05, 11)
    fast = [request(module, 3.1, 0.01, 11) for _ in range(9)]
    assert module.violating_seconds([slow]) == 1
    assert module.violating_seconds([slow, *fast]) == 0
    assert module.violating_seconds([slow, *fast[:8]]) == 1
    assert module.violating_seconds([request(module, 70.0, 0.05, 11)]) == 0


def test_seconds_in_16_bits_go_by_time_in_steps(module: ModuleType) -> None:
    served = [
        request(module, 1.1, 0.1, 9),
        request(module, 2.1, 0.1, 3),
        request(module, 2.4, 0.1, 6, "fp8"),
    ]
    share = module.seconds_in_16_bits(served)
    assert share["only"] == 59
    assert share["mostly"] == 59
    assert share["time_share"] == pytest.approx(1.2 / 1.8, abs=0.03)
    assert module.seconds_in_16_bits([])["only"] == 60


def test_the_scale_is_found_by_bisection(module: ModuleType) -> None:
    minute = module.Minute(list(range(1000)), [1] * 1000, [1] * 1000)
    scale = module.scale_for(minute, lambda kept: len(kept.arrival_s) // 10)
    assert 190 <= len(module.thinned(minute, scale).arrival_s) < 200
