"""The pages' tables come from the data files, and are up to date."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module("tables")


@pytest.mark.parametrize("name", ["README.md", "docs/kernels.md", "docs/measured.md"])
def test_a_page_shows_the_data(name: str, module: ModuleType) -> None:
    page = (ROOT / name).read_text()
    assert module.with_tables(page, module.tables(ROOT / "bench" / "data", module.PAGES[name])) == page


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
    dated = [{**row, "date": f"2026-01-0{day}T00:00:00"} for day, row in enumerate(rows, 2)]
    assert "2026-01-02 to 2026-01-04)" in module.kernels({"header": HEADER, "rows": dated})


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
        "slo": {"ttft_s": 3.0, "tpot_s": 0.25}, "trace": {"history": ["square: 5/s"]},
    }  # fmt: skip
    table = module.demo(data)
    assert "| TTFT p90 | 200 ms | 100 ms | 0.50 |" in table
    assert "| tokens in FP8 | 0 | 7 |  |" in table
    assert "TTFT 3 s, TPOT 250 ms" in table
    assert "replicas: 2, P, 2026-01-01). Trace: square: 5/s;" in table
    assert "GPU, 2026" in module.demo({**data, "machine": {"processor": "P", "device": "GPU"}})
    with_fp8 = module.demo({**data, "static_fp8": {**run, "ttft_ms": {"p90": 80.0}}})
    assert "| TTFT p90 | 200 ms | 80.0 ms | 100 ms | 0.50 |" in with_fp8
    assert "once in static FP16, once in static FP8 and once under the policy" in with_fp8


def engine_data(*contenders: str) -> dict[str, Any]:
    speeds = {"vllm-16bit": 100.0, "nestedfp-16bit": 98.0, "vllm-fp8": 150.0, "nestedfp-fp8": 160.0}
    cell = {"model": "m", "dtype": "float16", "input_len": 128, "output_len": 64}
    rows = [
        {**cell, "batch": batch, "contender": name, "tokens_per_s": speeds[name] * batch}
        for name in contenders
        for batch in (1, 8)
    ]
    return {"device": "D", "date": "2026-01-01T00:00:00", "versions": {"vllm": "0"}, "rows": rows,
            "engines": [], "solo": []}  # fmt: skip


def test_engines_are_compared_with_those_of_the_same_run(module: ModuleType) -> None:
    table = module.engine(engine_data("vllm-16bit", "nestedfp-16bit", "vllm-fp8", "nestedfp-fp8"))
    assert "| float16, 128/64, batch 8 | 800 | 784 | 1,200 | 1,280 | 0.98 | 1.07 | 1.60 | 1.63 |" in table
    assert "not measured" not in table
    assert "±" not in table


def test_the_engines_summary_has_means_and_worst_cells_beside_their_bars(module: ModuleType) -> None:
    data = engine_data("vllm-16bit", "nestedfp-16bit", "vllm-fp8", "nestedfp-fp8")
    data["rows"][0]["tokens_per_s"] = 49.0  # vllm-16bit at batch 1: ours is twice that
    table = module.engine_summary(data)
    assert "(m, D, vllm 0, 2026-01-01)" in table
    assert "| float16, 2 cells: geometric mean (worst) | 1.400 (0.980); bar ≥ 0.99 (0.96) |" in table
    assert "batch 8 |" not in table


def test_a_throughput_shows_the_spread_of_its_passes_where_there_were_several(module: ModuleType) -> None:
    data = engine_data("vllm-16bit", "nestedfp-16bit")
    by_name = {(row["contender"], row["batch"]): row for row in data["rows"]}
    by_name["vllm-16bit", 1] |= {"tokens_per_s_min": 97.0, "tokens_per_s_max": 101.0, "passes": 3}
    by_name["nestedfp-16bit", 1] |= {"tokens_per_s_min": 98.0, "tokens_per_s_max": 98.0, "passes": 1}
    table = module.engine(data)
    assert "; medians, ± half the range of the passes over the median; not" in table
    assert "| float16, 128/64, batch 1 | 100 ±2.0 % | 98 | 0.98 |" in table
    assert "| float16, 128/64, batch 8 | 800 | 784 | 0.98 |" in table


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        ({}, "2026-01-01"),
        ({"rows": "2026-01-03"}, "2026-01-03"),
        ({"rows": "2026-01-03", "solo": "2026-01-02"}, "2026-01-02 to 2026-01-03"),
        ({"rows": "2026-01-03", "solo": ""}, "2026-01-03 and before"),
    ],
)
def test_engines_of_several_runs_have_the_range_of_their_dates(
    module: ModuleType, days: dict[str, str], expected: str
) -> None:
    data = engine_data("vllm-16bit", "nestedfp-16bit")
    for row in data["rows"]:
        row |= {"date": f"{days['rows']}T00:00:00"} if days else {}
    if "solo" in days:
        date = {"date": f"{days['solo']}T00:00:00"} if days["solo"] else {}
        memory = {"kv_blocks": 1, "weights_bytes": 1}
        data["solo"] = [
            {"model": "m", "dtype": "float16", "engine": "e", "start_s": 1.0, "memory": memory, **date}
        ]
    assert f"(m, D, vllm 0, {expected})" in module.engine(data)


def test_cells_with_fused_mlps_have_a_star(module: ModuleType) -> None:
    data = engine_data("vllm-16bit", "nestedfp-16bit")
    assert "fused" not in module.engine(data)
    for row in data["rows"]:
        if row["contender"] == "nestedfp-16bit":
            row["fused_mlps"] = 32 if row["batch"] == 8 else 0
    table = module.engine(data)
    assert "; * with fused MLPs." in table
    assert "| float16, 128/64, batch 8* |" in table
    assert "| float16, 128/64, batch 1 |" in table


def test_an_engine_that_was_not_there_is_named_instead_of_a_column(module: ModuleType) -> None:
    data = engine_data("nestedfp-16bit", "nestedfp-fp8")
    checks = {
        "flips": 1024, "flip_us_p99": 38.9, "fp16_tokens_equal_after_flips": True,
        "step_ms": {"fp16": 8.0, "fp8": 4.0, "flipping": 6.6},
    }  # fmt: skip
    data["engines"] = [{"engine": "nestedfp", "memory": {"weights_bytes": 1001}, "checks": checks}]
    data["solo"] = [{"engine": "vllm-16bit", "memory": {"weights_bytes": 1000}}]
    assert "not measured in this run: vllm-16bit, vllm-fp8" in module.engine(data)
    table = module.engine_summary(data)
    assert "nestedfp-16bit / vllm-16bit" not in table
    assert "| step with a flip before it, over the mean of both modes | 1.100 | ≤ 1.02 |" in table
    assert "| memory of weights over plain vLLM's | 1.0010 | ≤ 1.005 |" in table


def test_each_dtype_and_a_start_alone_have_their_own_figures(module: ModuleType) -> None:
    data = engine_data("vllm-16bit", "nestedfp-16bit", "nestedfp-fp8")
    for row in data["rows"]:
        row["output_len"] = 128
    slower = [{**row, "dtype": "bfloat16", "tokens_per_s": row["tokens_per_s"] / 2} for row in data["rows"]]
    data["rows"] += [row for row in slower if row["batch"] == 8]
    sizes = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}
    alone = {
        "dtype": "bfloat16", "start_s": 60.0, "settings": sizes,
        "memory": {"weights_bytes": 1000, "kv_blocks": 980},
    }  # fmt: skip
    data["solo"] = [
        {**alone, "engine": "nestedfp"},
        {**alone, "engine": "vllm-16bit", "start_s": 50.0, "memory": {**alone["memory"], "kv_blocks": 1000}},
    ]
    assert "| bfloat16, 128/128, batch 8 | 400 | 392 | 640 |" in module.engine(data)
    table = module.engine_summary(data)
    assert "| float16: worst of 128/128, batch 1 to 32 | 0.980 | 1.600; bar ≥ 1.45 |" in table
    assert "| flips, memory and starts | bfloat16 | bar |" in table
    row = "| KV-cache blocks at the same setting (3 captured sizes), over plain vLLM's | 0.980 | ≥ 0.97 |"
    assert row in table
    assert "| start alone over plain vLLM's | 60 s, 1.20 | ≤ 1.5 |" in table


def test_both_dtypes_share_the_table_of_flips(module: ModuleType) -> None:
    data = engine_data("vllm-16bit", "nestedfp-16bit")
    data["rows"] += [{**row, "dtype": "bfloat16"} for row in data["rows"]]
    memory = {"memory": {"weights_bytes": 1000, "kv_blocks": 980}, "start_s": 60.0}
    data["engines"] = [
        {"engine": name, "dtype": dtype, **memory}
        for name in ("nestedfp", "vllm-16bit")
        for dtype in ("float16", "bfloat16")
    ]
    data["solo"] = [{**entry} for entry in data["engines"] if entry["dtype"] == "float16"]
    table = module.engine_summary(data)
    assert "| memory of weights over plain vLLM's | 1.0000 | 1.0000 | ≤ 1.005 |" in table
    assert "| start alone over plain vLLM's | 60 s, 1.00 | not measured | ≤ 1.5 |" in table


def test_the_engines_tests_have_a_row_a_run(module: ModuleType) -> None:
    run = {"name": "a", "model": "m", "dtype": "float16", "runner": 2, "complete": True, "failures": {}}
    run["date"] = "2026-01-01T00:00:00"
    figures = {"flips": 9999.0, "failed_requests": 0.0, "mixed_steps": 0.0, "flip_us_p99": 41.2}
    figures |= {"sizes": 6.0, "sizes_with_equal_logits": 6.0}
    runs = [
        {**run, "outcomes": {"passed": 9}, "figures": figures},
        {**run, "outcomes": {"passed": 4, "failed": 1}, "figures": {"ranks_alike": 1.0, "logits_equal": 0.0}},
        {**run, "complete": False},
    ]
    header = {"device": "D", "devices": 2, "vllm": "0", "torch": "1"}
    table = module.engine_tests({"header": header, "runs": runs})
    assert "(2 x D, vllm 0" in table
    assert "runner 2, 2026-01-01 | 9 passed | 9,999 | 0 | 0 | 41 | 6 of 6 batch sizes |  |" in table
    assert "| 1 failed, 4 passed |  |  |  |  | no | yes |" in table
    assert "| not finished |" in table


def test_a_pytest_report_is_read(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("engine_tests", ROOT / "bench" / "engine_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase name="a"><properties><property name="flips" value="7"/></properties></testcase>'
        '<testcase name="b"><failure message="assert 1 == 2">…</failure></testcase>'
        '<testcase name="c"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert module.read(report) == {
        "complete": True,
        "outcomes": {"passed": 1, "failed": 1, "skipped": 1},
        "failures": {"b": "assert 1 == 2"},
        "figures": {"flips": 7.0},
    }
    assert list(module.runs("m", 2)) == ["tp2"]


def test_a_live_load_is_shown_beside_what_was_predicted(module: ModuleType) -> None:
    percentiles = {"p50": 10.2, "p90": 20.0, "p99": 30.7}
    row = {
        "contender": "auto", "requests": {"sent": 1000, "served": 990}, "attainment": 0.95,
        "fp16_token_share": 0.5, "ttft_ms": percentiles, "tpot_ms": percentiles, "steps": 2000,
        "bounded_steps": 30, "flips": 7,
    }  # fmt: skip
    data = {
        "model": "m", "device": "D", "versions": {"vllm": "1"}, "date": "2026-01-01T00:00:00",
        "load": ["square"], "slo": {"ttft_s": 1.0, "tpot_s": 0.033}, "rows": [row],
        "simulated": {"auto": {"attainment": 0.991, "fp16_token_share": 0.6}},
    }  # fmt: skip
    expected = "| auto | 95.0 % (99.1 %) | 0.50 (0.60) | 10, 31 | 10, 31 | 30 of 2,000 | 7 |"
    assert expected in module.live(data)


def test_every_shape_and_m_has_a_cell(module: ModuleType) -> None:
    wide, tall = {**ROW, "N": 28672, "K": 4096}, {**ROW, "N": 4096, "K": 14336, "layer": "down"}
    fp8 = {**tall, "mode": "fp8", "us": 4.0}
    rows = [
        {**wide, "us": 9.0},
        {**wide, "M": 64, "us": 12.5},
        {**tall, "M": 64, "us": 10.0},
        {**fp8, "baseline_us": 8.0},
        {**fp8, "baseline": "vllm-cutlass", "baseline_us": 5.0},
        {**fp8, "baseline": "torch-scaled-mm", "baseline_us": 4.5},
    ]
    text = module.by_shape({"header": {**HEADER, "device": "A B"}, "rows": rows})
    assert "(kernels-a-b-floor.svg)" in text
    header = "|  | 1 | 64 |\n| --- | --- | --- |\n"
    assert header + "| 28672 x 4096 | 0.90 | 1.25 |\n| 4096 x 14336 |  | 1.00 |" in text
    assert header + "| 28672 x 4096 |  |  |\n| 4096 x 14336 | 2.00 |  |" in text
    assert header + "| 28672 x 4096 |  |  |\n| 4096 x 14336 | 0.89 |  |" in text


def test_other_shapes_leave_out_what_the_kernels_table_holds(module: ModuleType) -> None:
    tabled = {**ROW, "N": 4096, "K": 4096, "us": 30.0}
    rows = [
        {**tabled, "M": 64},
        {**tabled, "M": 48, "us": 12.0},
        {**tabled, "N": 3584, "layer": "3584x4096", "M": 64, "us": 8.0},
        {**tabled, "M": 600, "us": 15.0},
    ]
    rows = [{**row, "passes": 3, "date": "2026-01-02T00:00:00"} for row in rows]
    table = module.other_shapes({"header": HEADER, "rows": rows})
    assert "2026-01-02; passes: 3 (16-bit))" in table
    assert "| 16-bit mode, FP16: time over cuBLAS FP16 | 0.98 (1.20) |  | 1.50 (1.50) |  |" in table
    assert "N x K = 3584 x 4096, 4096 x 4096 at M = 48, 64, 600;" in table


def test_gated_products_over_each_baseline(module: ModuleType) -> None:
    row = {**ROW, "baseline": "own product + silu"}
    rows = [
        {**row, "M": 1, "ratio": 0.9},
        {**row, "M": 16, "ratio": 0.4},
        {**row, "M": 512, "ratio": 0.8},
        {**row, "M": 512, "ratio": 0.5, "mode": "fp8"},
    ]
    table = module.gated({"header": HEADER, "rows": rows})
    assert "| 16-bit, float16: time over own product + silu | 0.60 (0.90) | 0.80 (0.80) |  |" in table
    assert "| fp8, float16: time over own product + silu |  | 0.50 (0.50) |  |" in table
    assert "at M = 1, 16, 512." in table
