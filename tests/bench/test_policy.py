"""The comparison of policies: what a run of some of them keeps of the figures before."""

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.simulation.state import Columns, EngineSettings, poisson

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("policy")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def load(module: ModuleType, trace: Columns) -> Any:
    return module.Load("a load", 0.9, 12.5, poisson(trace, 20.0, 10.0, seed=2))


@pytest.fixture(scope="module")
def trace() -> Columns:
    lengths = np.array([200, 1500, 700], dtype=np.int32)
    return Columns(np.arange(3.0), lengths, lengths // 20, np.zeros(3, dtype=np.bool_))


@pytest.fixture(scope="module")
def row(module: ModuleType, load: Any) -> dict[str, Any]:
    made: dict[str, Any] = module.compare(load, 1, 1, 0, module.POLICIES, {}, EngineSettings())
    return made | {"oracle": {"bound": 1.0}}


def test_a_load_that_is_not_named_keeps_its_row(module: ModuleType, load: Any, row: dict[str, Any]) -> None:
    assert module.compare(load, 1, 1, 0, (), row, EngineSettings()) == row


def test_a_policy_that_is_not_named_keeps_its_figures(
    module: ModuleType, load: Any, row: dict[str, Any]
) -> None:
    before = copy.deepcopy(row)
    for summary in before["policies"].values():
        summary["attainment"], summary["mark"] = 0.5, "kept"
    after = module.compare(load, 1, 1, 0, ["threshold"], before, EngineSettings())
    assert after["policies"]["threshold"]["attainment"] == row["policies"]["threshold"]["attainment"]
    assert [name for name, summary in after["policies"].items() if "mark" not in summary] == ["threshold"]
    points = 100 * (0.5 - row["policies"]["threshold"]["attainment"])
    assert after["policies"]["threshold"]["points_below_static_fp8"] == pytest.approx(points)
    assert after["oracle"] == row["oracle"]


def test_the_oracle_of_another_run_of_the_predictive_policy_is_not_kept(
    module: ModuleType, load: Any, row: dict[str, Any]
) -> None:
    assert "oracle" not in module.compare(load, 1, 1, 0, ["predictive"], row, EngineSettings())
