"""The plots of the kernel benchmark: floors, and one line a contender."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from nestedfp.kernels.dispatch import Mode

pytest.importorskip("matplotlib")

CEILINGS = {"copy_tb_s": 2.0, "float16_tflop_s": 500.0, "fp8_tflop_s": 1000.0}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "roofline.py"
    spec = importlib.util.spec_from_file_location("bench_roofline", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_few_tokens_are_bound_by_bytes_and_many_by_operations(module: ModuleType) -> None:
    bytes_moved = 2 * 4096 * 4096 + 2 * (4096 + 4096)
    assert module.floor_us(Mode.BITS16, 1, 4096, 4096, CEILINGS) == pytest.approx(bytes_moved / 2e6)
    operations = 2 * 8192 * 4096 * 4096
    assert module.floor_us(Mode.FP8, 8192, 4096, 4096, CEILINGS) == pytest.approx(operations / 1000e6)


def test_every_size_has_a_panel_with_every_contender(module: ModuleType) -> None:
    row = {"dtype": "float16", "model": "m", "layer": "o", "us": 20.0, "baseline_us": 30.0}
    rows = [
        {**row, "mode": mode, "baseline": baseline, "M": M, "N": 4096, "K": K}
        for mode, baseline in [("16-bit", "cublas-16bit"), ("fp8", "cublas-16bit"), ("fp8", "vllm-cutlass")]
        for M in (1, 64)
        for K in (64, 128)
    ]
    data = {"header": {"ceilings": CEILINGS}, "rows": rows}
    for draw in module.FIGURES.values():
        figure = draw(data)
        drawn = [axis for axis in figure.axes if axis.get_title()]
        assert len(drawn) == 2
        assert all(len(axis.get_legend_handles_labels()[1]) == 4 for axis in drawn)
