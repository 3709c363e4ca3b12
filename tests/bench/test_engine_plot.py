"""The plot of throughput over batch."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def engine_plot() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "engine_plot.py"
    spec = importlib.util.spec_from_file_location("bench_engine_plot", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def row(contender: str, batch: int, speed: float, input_len: int = 128) -> dict[str, Any]:
    return {
        "dtype": "float16",
        "contender": contender,
        "input_len": input_len,
        "output_len": 64,
        "batch": batch,
        "tokens_per_s": speed,
        "tokens_per_s_min": speed - 1,
        "tokens_per_s_max": speed + 1,
    }


def test_rows_are_grouped_by_lengths_and_ordered_by_batch(engine_plot: ModuleType) -> None:
    rows = [row("vllm-16bit", 32, 9.0), row("vllm-16bit", 1, 3.0), row("vllm-16bit", 1, 2.0, input_len=1024)]
    panels = engine_plot.panels_of(rows)
    assert list(panels) == [("float16", 128, 64), ("float16", 1024, 64)]
    assert [found["batch"] for found in panels["float16", 128, 64]["vllm-16bit"]] == [1, 32]


def test_only_files_with_plain_vllm_beside_us_are_drawn(
    engine_plot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_plot, "DATA", tmp_path)
    monkeypatch.setattr(engine_plot, "DOCS", tmp_path)
    rows = [row(name, batch, 5.0 * batch) for name in engine_plot.CONTENDERS for batch in (1, 8)]
    (tmp_path / "engine-a.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "engine-b.json").write_text(json.dumps({"rows": [row("nestedfp-fp8", 1, 5.0)]}))
    assert engine_plot.main() == 0
    assert [path.name for path in tmp_path.glob("*.svg")] == ["engine-a.svg"]
    assert "NestedFP, 16-bit mode" in (tmp_path / "engine-a.svg").read_text()
