"""``nestedfp simulate`` from the command line to the JSON, on a trace file as the load tests write it."""

import json
from pathlib import Path

import numpy as np
import pytest

from nestedfp.cli import main
from nestedfp.loadtests.traces import Trace
from nestedfp.policies.config import CONTROLLERS


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    random = np.random.default_rng(3)
    path = tmp_path / "trace.jsonl"
    arrival_s = np.cumsum(random.exponential(0.05, 100))
    Trace.from_columns("small", arrival_s, np.full(100, 700), random.integers(1, 40, 100)).save(path)
    return path


@pytest.mark.parametrize("policy", CONTROLLERS)
def test_a_trace_file_gives_one_json_object(
    trace: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["simulate", "--trace", str(trace), "--policy", policy, "--replicas", "2", "--seed", "5"]
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["requests"] == {"sent": 100, "ok": 100, "shed": 0, "failed": 0}
    assert (summary["policy"], summary["replicas"], summary["seed"]) == (policy, 2, 5)
    assert summary["label"].startswith("simulated")
    tokens = {"static-fp16": "fp8", "static-fp8": "fp16"}
    if policy in tokens:
        assert summary["tokens"][tokens[policy]] == 0


def test_a_file_that_is_no_trace_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    assert main(["simulate", "--trace", str(path)]) == 2
    assert "other.csv, line 1" in capsys.readouterr().err
