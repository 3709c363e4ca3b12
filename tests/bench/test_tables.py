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


HEADER = {"device": "D", "torch": "1", "triton": "2", "date": "2026-01-01T00:00:00", "method": "CUDA graphs."}
ROW = {
    "mode": "16-bit", "dtype": "float16", "model": "m", "layer": "o", "M": 1,
    "baseline": "cublas-16bit", "baseline_us": 10.0,
}  # fmt: skip


def test_kernel_ratios_are_geometric_means_of_a_column(module: ModuleType) -> None:
    rows = [{**ROW, "us": 5.0}, {**ROW, "M": 64, "us": 20.0}, {**ROW, "M": 256, "us": 11.0}]
    table = module.kernels({"header": HEADER, "rows": rows})
    assert "| 1.00 (2.00); bar ≤ 1.00 (1.10) | 1.10 (1.10); bar ≤ 1.03 (1.12) | not measured;" in table
    assert "2026-01-01)" in table


def test_fp8_is_held_against_the_better_baseline_of_each_cell(module: ModuleType) -> None:
    fp8 = {**ROW, "mode": "fp8", "us": 10.0}
    rows = [
        {**fp8, "baseline": "cublas-16bit", "baseline_us": 17.0},
        {**fp8, "baseline": "torch-scaled-mm", "baseline_us": 20.0},
        {**fp8, "baseline": "vllm-cutlass", "baseline_us": 8.0},
    ]
    table = module.kernels({"header": HEADER, "rows": rows})
    assert "better FP8 baseline | 1.25 (1.25); bar ≤ 1.00 (1.05)" in table
    assert "speed-up over cuBLAS FP16 | 1.70 (1.70); bar ≥ 1.6" in table
    assert "`torch._scaled_mm` | 0.50 (0.50) |" in table


def test_bfloat16_is_held_against_our_own_float16(module: ModuleType) -> None:
    rows = [{**ROW, "us": 10.0}, {**ROW, "dtype": "bfloat16", "us": 11.0}]
    assert "BF16: time over FP16 | 1.10 (1.10); bar ≤ 1.02 |" in module.kernels(
        {"header": HEADER, "rows": rows}
    )


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
