"""The command line of the simulator."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.simulate_command import add_arguments, run
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
    assert call("--trace", trace, "--rate", "100", "--json") == 0
    assert output(capsys)["duration_s"] == pytest.approx(2.0, abs=0.5)


def test_the_table_says_that_it_is_simulated(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--trace", trace) == 0
    text = capsys.readouterr().out
    assert "simulated: H100 roofline" in text
    assert "SLO attainment" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trace", "missing.csv"), "no such trace"),
        (("--replicas", "0"), "replicas: got 0"),
        (("--rate", "-1"), "rate: got -1.0"),
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
    assert "lease_s: got -1" in capsys.readouterr().err
