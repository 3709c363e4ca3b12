"""The README's tables come from the data files, and are up to date."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_tables", ROOT / "bench" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_readme_shows_the_data(module: ModuleType) -> None:
    page = (ROOT / "README.md").read_text()
    assert module.with_tables(page, module.tables(ROOT / "bench" / "data")) == page


def test_kernel_ratios_are_geometric_means_of_a_column(module: ModuleType) -> None:
    row = {"mode": "16-bit", "dtype": "float16", "baseline": "cublas-16bit", "baseline_us": 10.0}
    data = {
        "header": {
            "device": "D",
            "torch": "1",
            "triton": "2",
            "date": "2026-01-01",
            "method": "CUDA graphs.",
        },
        "rows": [{**row, "M": 1, "us": 5.0}, {**row, "M": 64, "us": 20.0}, {**row, "M": 256, "us": 11.0}],
    }
    table = module.kernels(data)
    assert "| 1.00 (2.00) | 1.10 (1.10) | not measured |" in table


def test_a_page_without_markers_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="tables: begin"):
        module.with_tables("# page", "table")


def test_the_demonstration_is_shown_beside_static_fp16(module: ModuleType) -> None:
    run = {"requests": {"sent": 9, "failed": 0}, "ttft_ms": {"p90": 100.0}, "tokens": {"fp16": 5, "fp8": 7}}
    data = {
        **run,
        "static_fp16": {**run, "ttft_ms": {"p90": 200.0}, "tokens": {"fp16": 12, "fp8": 0}},
        "model": "m", "engine": "vllm 0", "replicas": 2, "machine": {"processor": "P"}, "date": "2026-01-01",
        "slo": {"ttft_s": 3.0, "tpot_s": 0.25},
    }  # fmt: skip
    table = module.demo(data)
    assert "| TTFT p90 | 200 ms | 100 ms | 0.50 |" in table
    assert "| tokens in FP8 | 0 | 7 |  |" in table
    assert "TTFT 3 s, TPOT 250 ms" in table
