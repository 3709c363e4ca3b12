"""What a minute through Ray Serve counts, and how its scale is found, on minutes made by hand."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nestedfp.deployments.config import DeploymentSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_policy_minute", ROOT / "bench" / "policy_minute.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_thinning_is_even_and_a_larger_scale_keeps_all_of_a_smaller_one(module: ModuleType) -> None:
    minute = module.Minute(list(range(1000)), [5] * 1000, [7] * 1000)
    before: set[int] = set()
    for scale in (0.1, 0.2, 0.21, 0.25, 0.9):
        kept = module.thinned(minute, scale).arrival_s
        in_each_tenth = np.histogram(kept, bins=10, range=(0, 1000))[0]
        assert np.abs(in_each_tenth - 100 * scale).max() <= 2
        assert before < set(kept)
        before = set(kept)
    assert module.thinned(minute, 1.0) == minute
    assert module.thinned(minute, 2.0).arrival_s[:4] == [0, 0, 1, 1]
    assert len(module.thinned(minute, 1.5).arrival_s) == pytest.approx(1500, abs=2)


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


@pytest.mark.parametrize("first", [0.01, 0.19, 0.6, 3.0])
def test_the_scale_is_found_from_either_side(module: ModuleType, first: float) -> None:
    tried: list[float] = []

    def violations(scale: float) -> float:
        tried.append(scale)
        return int(100 * scale)

    scale = module.scale_for(violations, first=first, stride=1.5, within=1.0, tries=20)
    assert 18 <= violations(scale) <= 20
    assert len(tried) < 20


def test_without_a_scale_that_fits_the_nearest_counts(module: ModuleType) -> None:
    jump = module.scale_for(
        lambda scale: 4 if scale < 0.3 else 40, first=0.2, stride=1.1, within=1.0, tries=9
    )
    assert jump < 0.3


def test_a_repeated_minute_has_the_requests_in_the_order_they_came(module: ModuleType) -> None:
    minute = module.Minute([0.0, 1.0], [10, 20], [3, 4])
    served = [module.Served(1.3, [1.4], ["fp16"]), module.Served(1.1, [1.2], ["fp16"])]
    assert module.as_arrived(minute, served) == module.Minute([1.1, 1.3], [20, 10], [4, 3])


def test_a_minute_alone_takes_the_time_of_its_steps(module: ModuleType) -> None:
    settings = DeploymentSettings.from_dict(
        {"engine": {"model": "simulated", "device": "simulated"}, "policy": {"controller": "static-fp16"}}
    )
    minute = module.Minute([0.0, 30.0], [2048, 2048], [5, 5])
    slow, fast = (module.alone(minute, settings, mode, seed=3) for mode in ("fp16", "fp8"))
    for one, other in zip(slow, fast, strict=True):
        assert len(one.token_s) == len(other.token_s) == 5
        assert one.arrival_s == other.arrival_s
        assert other.token_s[0] < one.token_s[0]
    assert module.alone(minute, settings, "fp16", seed=3) == slow
    assert module.alone(minute, settings, "fp16", seed=4) != slow


def test_counts_are_of_the_runs_that_count_at_one_scale(module: ModuleType) -> None:
    runs = [
        {
            "scale": scale,
            "counted": counted,
            "policy": policy,
            "violating_seconds": count,
            "seconds_in_fp16": {"mostly": 60 - count},
        }
        for scale, counted, policy, count in [
            (0.2, True, "static-fp16", 9),
            (0.3, True, "static-fp16", 21),
            (0.3, False, "static-fp16", 30),
            (0.3, True, "static-fp16", 18),
            (0.3, True, "static-fp16", 19),
            (0.3, True, "predictive", 1),
            (0.3, True, "predictive", 2),
        ]
    ]
    counted = module.counts(runs, 0.3)
    assert counted["static-fp16"]["violating_seconds"] == {"median": 19, "runs": [21, 18, 19]}
    assert counted["predictive"]["seconds_mostly_in_fp16"] == {"median": 58.5, "runs": [59, 58]}
