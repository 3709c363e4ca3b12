"""The plots of the kernel benchmark: floors, and one line a contender."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from nestedfp.kernels.dispatch import Mode

pytest.importorskip("matplotlib")

DATASHEET = {"tb_s": 2.0, "16-bit": 500.0, "fp8": 1000.0}


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
    assert module.floor_us(Mode.BITS16, 1, 4096, 4096, DATASHEET) == pytest.approx(bytes_moved / 2e6)
    operations = 2 * 8192 * 4096 * 4096
    assert module.floor_us(Mode.FP8, 8192, 4096, 4096, DATASHEET) == pytest.approx(operations / 1000e6)


def test_no_product_is_under_its_floor(module: ModuleType) -> None:
    for path in module.DATA.glob("kernels-*.json"):
        data = json.loads(path.read_text())
        datasheet = module.DATASHEETS[data["header"]["device"]]
        for row in data["rows"]:
            floor = module.floor_us(Mode(row["mode"]), row["M"], row["N"], row["K"], datasheet)
            assert row["us"] >= floor, row
            if row["baseline"] != "cublas-16bit" or row["mode"] == "16-bit":
                assert row["baseline_us"] >= floor, row


def test_every_size_has_a_panel_with_every_contender(module: ModuleType) -> None:
    row = {"dtype": "float16", "model": "m", "layer": "o", "us": 20.0, "baseline_us": 30.0}
    rows = [
        {**row, "mode": mode, "baseline": baseline, "M": M, "N": 4096, "K": K}
        for mode, baseline in [("16-bit", "cublas-16bit"), ("fp8", "cublas-16bit"), ("fp8", "vllm-cutlass")]
        for M in (1, 64)
        for K in (64, 128)
    ]
    device = next(iter(module.DATASHEETS))
    data = {"header": {"device": device, "ceilings": {"copy_tb_s": 2.0}}, "rows": rows}
    for name, labels in (("floor", 5), ("rates", 4)):
        figure = module.FIGURES[name](data)
        drawn = [axis for axis in figure.axes if axis.get_title()]
        assert len(drawn) == 2
        assert all(len(axis.get_legend_handles_labels()[1]) == labels for axis in drawn)
