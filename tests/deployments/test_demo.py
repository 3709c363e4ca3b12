"""The demonstration as its user runs it, on one replica and with a short trace."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from nestedfp.cli import main
from nestedfp.deployments import demo as demo_command
from nestedfp.deployments.demo import _trace, add_arguments
from nestedfp.deployments.serve import DEFAULT_CONFIG
from nestedfp.policies.checks import InvalidField

DEMO_S = 400.0


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nestedfp.cli", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEMO_S, check=False)


def test_a_bad_setting_is_named_before_anything_starts(tmp_path: Path) -> None:
    file = yaml.safe_load(DEFAULT_CONFIG.read_text())
    file["applications"][0]["args"]["policy"]["slo"]["ttft_s"] = -1
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(file))
    ended = demo("--config", str(config), "--out", str(tmp_path / "out"))
    assert ended.returncode == 1
    assert "ttft_s" in ended.stderr
    assert "-1" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--burst-rps", "-1"),
        ("--calm-rps", "nan"),
        ("--calm-s", "0"),
        ("--burst-s", "-2"),
        ("--prompt-tokens", "0"),
        ("--output-tokens", "0"),
        ("--seed", "-1"),
    ],
)
def test_a_bad_option_is_named_before_anything_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
) -> None:
    # The command's handlers would stay with the process that runs the tests.
    monkeypatch.setattr(demo_command, "raise_on_signals", lambda: None)
    assert main(["demo", option, value, "--out", str(tmp_path / "out")]) == 1
    assert f"error: {option}: got {value}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_load_without_a_request_is_refused() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(InvalidField, match=r"--calm-rps: got 0\.0; .*no requests"):
        _trace(parser.parse_args(["--calm-rps", "0", "--calm"]))


def test_the_calm_trace_is_as_long_and_has_no_burst() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    burst, calm = _trace(parser.parse_args([])), _trace(parser.parse_args(["--calm"]))
    assert len(burst) >= 100
    assert len(calm) < len(burst) / 2
    assert calm.duration_s == pytest.approx(burst.duration_s, rel=0.1)


@pytest.mark.engine
@pytest.mark.timeout(DEMO_S + 60)
def test_the_demonstration_leaves_its_results_and_no_process(tmp_path: Path, model_path: str) -> None:
    file = yaml.safe_load(DEFAULT_CONFIG.read_text())
    file["applications"][0]["args"]["replicas"]["count"] = 1
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(file))
    out = tmp_path / "out"
    before = {process.pid for process in psutil.process_iter()}
    ended = demo(
        *("--config", str(config), "--out", str(out), "--port", "8123", "--model", model_path),
        *("--calm-s", "3", "--burst-s", "8", "--burst-rps", "5", "--output-tokens", "8", "--static-fp8"),
    )
    assert ended.returncode == 0, ended.stderr[-2000:]

    summary = json.loads((out / "summary.json").read_text())
    lines = (out / "requests.jsonl").read_text().splitlines()
    assert summary["engine"].startswith("vllm ")
    assert summary["model"] == Path(model_path).name
    assert summary["replicas"] == 1
    assert summary["requests"]["sent"] == summary["requests"]["ok"] == len(lines) > 0
    assert summary["requests"]["failed"] == 0
    assert summary["flips"] >= 1
    assert summary["tokens"]["fp8"] > 0
    # The engine's own count covers prompt and output of every request, in whichever precision.
    used = [json.loads(line) for line in lines]
    assert sum(summary["tokens"].values()) >= sum(record["output_tokens"] for record in used)
    assert summary["static_fp16"]["tokens"]["fp8"] == 0
    assert summary["static_fp8"]["tokens"]["fp16"] == 0
    assert summary["static_fp8"]["requests"] == summary["requests"]
    for name in ("ttft_ms", "tpot_ms"):
        assert 0 < summary[name]["p50"] <= summary[name]["p90"] <= summary[name]["p99"]
    assert re.search("^ +static FP16 +static FP8 +policy +ratio$", ended.stdout, re.MULTILINE)
    assert "<svg" in (out / "report.html").read_text()

    left = [process for process in psutil.process_iter(["cmdline"]) if process.pid not in before]
    assert not [process for process in left if any("ray" in word for word in process.info["cmdline"] or [])]
