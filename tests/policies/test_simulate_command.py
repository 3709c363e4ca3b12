"""The command line of the simulator."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulate_command import add_arguments, run
from nestedfp.policies.simulation.calibration import Cell, Limits, errors_of
from nestedfp.policies.simulation.state import Columns


def read(path: Path) -> Columns:
    if not path.exists():
        raise ValueError(f"{path}: no such trace")
    count = 200
    return Columns(
        np.arange(count) * 0.05,
        np.full(count, 500, dtype=np.int32),
        np.full(count, 20, dtype=np.int32),
        np.zeros(count, dtype=np.bool_),
    )


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words), read)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text("")
    return str(path)


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


@pytest.mark.parametrize("policy", ["static-fp16", "static-fp8", "threshold", "predictive"])
def test_json_is_the_same_for_the_same_seed(
    trace: str, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trace", trace, "--policy", policy, "--replicas", "2", "--seed", "7", "--json")
    assert call(*words) == 0
    first = output(capsys)
    assert call(*words) == 0
    assert output(capsys) == first
    assert first["requests"]["ok"] == 200
    assert first["policy"] == policy
    assert first["label"].startswith("simulated")


def test_a_rate_is_what_arrives(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--trace", trace, "--rate", "100", "--policy", "static-fp8", "--json") == 0
    assert output(capsys)["duration_s"] == pytest.approx(2.0, abs=0.5)


def test_the_table_says_that_it_is_simulated(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--trace", trace) == 0
    text = capsys.readouterr().out
    assert "simulated: H100 roofline" in text
    assert "SLO attainment" in text


def measured(tmp_path: Path, factor: float, contenders: tuple[str, ...]) -> str:
    """A benchmark's file of an engine whose steps take `factor` times the roofline's."""
    rows = []
    for contender in contenders:
        costs = latency_model().of("fp16" if contender == "nestedfp-16bit" else "fp8").scaled(factor)
        for batch, prompt, tokens in ((1, 128, 64), (64, 128, 64), (16, 1024, 32)):
            unit = Cell(
                batch=batch,
                prompt_tokens=prompt,
                output_tokens=tokens,
                tokens_per_s=1.0,
                ttft_s=1.0,
                tpot_s=1.0,
            )
            speed, ttft, tpot = errors_of(costs, [unit], Limits(chunk_tokens=8192)).errors[0]
            rows.append(
                {"model": "some-8b", "dtype": "float16", "contender": contender, "batch": batch}
                | {"input_len": prompt, "output_len": tokens, "tokens_per_s": 1 + speed}
                | {"ttft_ms": 1e3 * (1 + ttft), "tpot_ms": 1e3 * (1 + tpot), "kv_blocks": 10_000}
            )
    path = tmp_path / "engine.json"
    settings = {"max_num_batched_tokens": 8192, "max_num_seqs": 512}
    path.write_text(
        json.dumps({"device": "GPU", "date": "2026-01-02T03", "settings": settings, "rows": rows})
    )
    return str(path)


def test_step_times_of_a_measured_engine(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trace", trace, "--policy", "static-fp8", "--json")
    assert call(*words) == 0
    usual = output(capsys)
    path = measured(tmp_path, 2.0, ("nestedfp-16bit", "nestedfp-fp8"))
    assert call(*words, "--engine", path) == 0
    shown = capsys.readouterr()
    slower = json.loads(shown.out)
    assert not shown.err, "progress is for terminals"
    assert slower["tpot_ms"]["p50"] == pytest.approx(2 * usual["tpot_ms"]["p50"], rel=0.15)
    assert "some-8b on GPU, 2026-01-02" in slower["label"]
    path = measured(tmp_path, 2.0, ("nestedfp-fp8",))
    assert call(*words, "--engine", path) == 2
    assert "nestedfp-16bit in float16" in capsys.readouterr().err
    Path(path).write_text(Path(path).read_text().replace("contender", "kernel"))
    assert call(*words, "--engine", path) == 2
    assert "rows of nestedfp-16bit in float16: got 0" in capsys.readouterr().err
    path = measured(tmp_path, 2.0, ("nestedfp-16bit", "nestedfp-fp8"))
    Path(path).write_text(Path(path).read_text().replace("kv_blocks", "blocks"))
    assert call(*words, "--engine", path) == 2
    assert "kv_blocks: got None" in capsys.readouterr().err


def test_the_fit_shows_its_progress_on_a_terminal_and_clears_it(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured(tmp_path, 2.0, ("nestedfp-16bit", "nestedfp-fp8"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert call("--trace", trace, "--policy", "static-fp8", "--json", "--engine", path) == 0
    lines = capsys.readouterr().err.split("\r\033[K")
    off = [int(line.split(": ")[1].split(" %")[0]) for line in lines if line.startswith("fitting")]
    assert lines[-1] == ""
    assert any("fp16" in line for line in lines)
    assert any("fp8" in line for line in lines)
    assert off[0] > off[-1] < 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trace", "missing.csv"), "no such trace"),
        (("--replicas", "0"), "replicas: got 0"),
        (("--rate", "-1"), "rate: got -1.0"),
        (("--seed", "-1"), "--seed: got -1"),
    ],
)
def test_bad_input_is_explained(
    trace: str, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--trace", trace, *words) == 2
    assert said in capsys.readouterr().err


def test_bad_settings_are_explained(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"lease_s": -1}))
    assert call("--trace", trace, "--settings", str(settings)) == 2
    assert "--settings.lease_s: got -1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--settings", "--engine"])
@pytest.mark.parametrize(
    ("content", "remedy"), [("no JSON", "give a file of JSON"), ("[1]", "that holds one JSON object")]
)
def test_a_file_that_holds_something_else_is_named_with_its_option(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, content: str, remedy: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert call("--trace", trace, option, str(path)) == 2
    said = capsys.readouterr().err
    assert f"{option}: got '{path}'; " in said
    assert remedy in said


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"settings": {"replicas": 4}}, "settings.max_num_batched_tokens"),
        ({"settings": None}, "settings"),
        ({"rows": None}, "rows"),
        ({"device": None}, "device"),
    ],
)
def test_a_file_of_another_benchmark_is_no_engine(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], field: str
) -> None:
    path = Path(measured(tmp_path, 1.0, ("nestedfp-16bit", "nestedfp-fp8")))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert call("--trace", trace, "--engine", str(path)) == 2
    assert f"--engine.{field}: got None; give a file that `nestedfp bench engine`" in capsys.readouterr().err
