"""The benchmark's bookkeeping, without an engine."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from nestedfp.vllm import bench

SPEEDS = {
    "vllm-16bit": [100.0, 110.0, 90.0],
    "nestedfp-16bit": [99.0, 98.0, 102.0],
    "nestedfp-fp8": [150.0, 160.0, 155.0],
}


def result(engine: str, *contenders: str) -> dict[str, Any]:
    passes = [
        {"contender": name, "input_len": 128, "output_len": 64, "batch": 8, "tokens_per_s": speed,
         "ttft_ms": 10.0, "tpot_ms": 5.0}
        for name in contenders
        for speed in SPEEDS[name]
    ]  # fmt: skip
    return {
        "engine": engine,
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {},
        "settings": {},
        "start_s": 60.0,
        "memory": {"weights_bytes": 16},
        "passes": passes,
    }


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser


def test_the_file_holds_medians_and_spread_of_all_passes(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = {
        "nestedfp": result("nestedfp", "nestedfp-16bit", "nestedfp-fp8"),
        "vllm-16bit": result("vllm-16bit", "vllm-16bit"),
    }
    monkeypatch.setattr(bench, "_measure", lambda engine, *_: answers[engine])
    out = tmp_path / "engine.json"
    order = "nestedfp,vllm-16bit,vllm-16bit,nestedfp"
    assert bench.run(parser.parse_args(["--engines", order, "--out", str(out)])) == 0
    data = json.loads(out.read_text())
    assert data["order"] == order.split(",")
    rows = {row["contender"]: row for row in data["rows"]}
    assert rows["vllm-16bit"]["tokens_per_s"] == 100.0
    assert (rows["vllm-16bit"]["tokens_per_s_min"], rows["vllm-16bit"]["tokens_per_s_max"]) == (90.0, 110.0)
    assert rows["nestedfp-fp8"]["passes"] == 6


def test_the_table_states_ratios_by_cell() -> None:
    rows = [
        {"input_len": 1, "output_len": 1, "batch": batch, "contender": name, "tokens_per_s": speed}
        for batch, ours, theirs in ((1, 90.0, 100.0), (8, 160.0, 100.0))
        for name, speed in (("nestedfp-16bit", ours), ("vllm-16bit", theirs))
    ]
    assert "nestedfp-16bit / vllm-16bit: geometric mean 1.200, worst 0.900" in bench.table(rows)


def test_a_failed_engine_leaves_the_others(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        bench, "_measure", lambda engine, *_: None if engine == "nestedfp" else result(engine, engine)
    )
    out = tmp_path / "engine.json"
    assert bench.run(parser.parse_args(["--engines", "nestedfp,vllm-16bit", "--out", str(out)])) == 0
    assert json.loads(out.read_text())["order"] == ["vllm-16bit"]
    assert bench.run(parser.parse_args(["--engines", "nestedfp", "--out", str(out)])) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--cells", "128x128"], ["--capture-sizes", "few"], ["--engines", "sglang"], ["--model", "none"]],
)
def test_bad_arguments_are_refused(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run(parser.parse_args(arguments))
