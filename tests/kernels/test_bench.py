"""The kernel benchmark without a GPU: shapes, rows, summaries and files."""

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from nestedfp.kernels import bench, rowfile
from nestedfp.kernels.compile_ahead import Job
from nestedfp.kernels.dispatch import Backend, Mode, parse_table
from nestedfp.kernels.shapes import SHAPES, TOKENS, Shape, by_size, parse_shapes, parse_tokens, traffic

HEADER = {"device": "D", "torch": "1", "triton": "2"}


def test_sixteen_layers_share_fourteen_sizes() -> None:
    assert len(SHAPES) == 16
    assert len(by_size(list(SHAPES))) == 14
    assert len(TOKENS) == 14


def test_shapes_by_model_layer_and_size() -> None:
    assert {shape.model for shape in parse_shapes("Phi-4")} == {"Phi-4"}
    assert len(parse_shapes("qkv")) == 4
    assert parse_shapes("Phi-4/o,7x70") == [Shape("Phi-4", "o", 5120, 5120), Shape("any", "7x70", 7, 70)]


@pytest.mark.parametrize("text", ["phi", "0x64", "4096x", ""])
def test_an_unknown_shape_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
        parse_shapes(text)


@pytest.mark.parametrize("text", ["0", "1,-2", "many", ""])
def test_tokens_must_be_positive(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_tokens(text)


def test_a_row_holds_medians_and_the_spread_of_ratios_within_passes() -> None:
    job = Job(Backend.HOPPER, Mode.FP8, "float16", 16, 4096, 14336, {"tokens": 16})
    row = bench.entry(job, SHAPES[3], [10.0, 12.0, 11.0], "cublas-16bit", [20.0, 20.0, 22.0])
    assert (row["us"], row["us_min"], row["us_max"]) == (11.0, 10.0, 12.0)
    assert (row["baseline_us"], row["ratio"]) == (20.0, 0.55)
    assert (row["ratio_min"], row["ratio_max"]) == (0.5, 0.6)
    assert (row["model"], row["layer"], row["config"]) == ("Llama-3.1-8B", "down", {"tokens": 16})


def test_a_line_gives_rates() -> None:
    job = Job(Backend.HOPPER, Mode.BITS16, "float16", 1024, 4096, 4096, None)
    text = bench.line(job, [SHAPES[1]], [50.0], {"cublas-16bit": [40.0]})
    assert "50.00 us 687 TFLOP/s 1.01 TB/s" in text
    assert "cublas-16bit 1.250" in text
    assert "[hopper rule]" in text


def test_traffic_counts_each_byte_once() -> None:
    assert traffic(Mode.BITS16, 1, 100, 10) == 2 * 1000 + 2 * 110
    assert traffic(Mode.FP8, 3, 100, 10) == 1000 + 6 * 110


def test_the_summary_shows_geometric_means_and_the_worst() -> None:
    row = {"mode": "16-bit", "dtype": "float16", "baseline": "cublas-16bit", "M": 1}
    text = bench.summary([{**row, "ratio": 0.5}, {**row, "ratio": 2.0}])
    assert "1.000 (2.000)" in text


def test_a_run_on_the_same_machine_adds_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rowfile.write(path, HEADER, [{"M": 1, "us": 5.0}, {"M": 2, "us": 6.0}])
    rows = rowfile.merged(rowfile.read_rows(path, HEADER), [{"M": 2, "us": 4.0}], ["M"])
    rowfile.write(path, HEADER, rows)
    assert json.loads(path.read_text()) == {
        "header": HEADER,
        "rows": [{"M": 1, "us": 5.0}, {"M": 2, "us": 4.0}],
    }
    assert len(path.read_text().splitlines()) == 5 + 2 + 2
    with pytest.raises(SystemExit, match="triton 2, this run has 3"):
        rowfile.read_rows(path, HEADER | {"triton": "3"})


def test_dispatch_reads_what_the_tuner_writes(tmp_path: Path) -> None:
    row = {"mode": "fp8", "dtype": "float16", "M": 1, "N": 64, "K": 64, "us": 1.5, "config": {"tokens": 16}}
    rowfile.write(tmp_path / "table.json", HEADER, [row])
    (read,) = parse_table(json.loads((tmp_path / "table.json").read_text()))
    assert (read.mode, read.M, read.config) == (Mode.FP8, 1, {"tokens": 16})


class FakeOperands:
    sets = 2

    def __init__(self, N: int, K: int) -> None:
        self.N, self.K = N, K


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Contenders that only have a time; returns the errors to report, by mode."""
    errors = {"16-bit": 0.0, "fp8": 0.0}
    us = {"16-bit": 12.0, "fp8": 6.0, "cublas-16bit": 10.0, "torch-scaled-mm": 8.0}
    monkeypatch.setattr(bench.contest, "cublas", lambda operands, M: "cublas-16bit")
    monkeypatch.setattr(bench.contest, "product", lambda mode, operands, M: str(mode))
    monkeypatch.setattr(
        bench.contest, "fp8_baselines", lambda operands, M: {"torch-scaled-mm": "torch-scaled-mm"}
    )
    monkeypatch.setattr(bench.contest, "error", lambda contender, operands, M: errors[contender])
    monkeypatch.setattr(
        bench,
        "measure",
        lambda contenders, sets, passes: {k: [us[v]] * passes for k, v in contenders.items()},
    )
    monkeypatch.setattr(
        bench, "chosen", lambda mode, dtype, M, N, K: Job(Backend.HOPPER, mode, dtype, M, N, K, None)
    )
    return errors


def cell_rows() -> list[rowfile.Row]:
    shapes = [shape for shape in SHAPES if (shape.N, shape.K) == (6144, 5120)]
    return bench.cell(shapes, 16, list(Mode), {"float16": FakeOperands(6144, 5120)}, 5)  # type: ignore[dict-item]


def test_a_cell_has_a_row_for_each_layer_mode_and_baseline(fake_gpu: dict[str, float]) -> None:
    rows = cell_rows()
    found = {(row["model"], row["mode"], row["baseline"], row["ratio"]) for row in rows}
    models = ("Mistral-Small-24B", "Mistral-Nemo-12B")
    expected = [
        ("16-bit", "cublas-16bit", 1.2),
        ("fp8", "cublas-16bit", 0.6),
        ("fp8", "torch-scaled-mm", 0.75),
    ]
    assert found == {(model, *rest) for model in models for rest in expected}
    assert all(row["passes"] == 5 and row["config"] is None for row in rows)


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_product_is_named_and_not_timed(
    error: float, fake_gpu: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_gpu["fp8"] = error
    assert {row["mode"] for row in cell_rows()} == {"16-bit"}
    assert "WRONG: fp8 float16, 16x6144x5120" in capsys.readouterr().out
