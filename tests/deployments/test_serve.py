"""`nestedfp serve` where it cannot serve: one line that says why, before any replica has started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.serve import DEFAULT_CONFIG, ready_message

from .serving import free_port

SIMULATED = str(DEFAULT_CONFIG.with_name("simulated.yaml"))


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nestedfp.cli", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_the_examples_it_prints_carry_a_key_where_one_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTEDFP_API_KEYS", raising=False)
    engine = {"model": "m", "environment": {"NESTEDFP_API_KEYS": "secret"}}
    locked = ready_message("http://h/v1", "m", DeploymentSettings.from_dict({"engine": engine}))
    assert "-H 'Authorization: Bearer KEY'" in locked
    assert 'api_key="KEY"' in locked
    assert "secret" not in locked
    opened = ready_message("http://h/v1", "m", DeploymentSettings.from_dict({"engine": {"model": "m"}}))
    assert "Authorization" not in opened
    assert 'api_key="none"' in opened


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "./not/there"), "./not/there does not exist"),
        (("--config", "not-there.yaml"), "not-there.yaml"),
        (("--port", "70000"), "http_options.port: got 70000"),
        (("--replicas", "0"), "replicas.count: got 0"),
        (("--config", SIMULATED, "--replicas", "9000"), "9000 replicas need 900 CPUs and this machine has"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(arguments: tuple[str, ...], told: str) -> None:
    port = () if "--port" in arguments else ("--port", str(free_port()))
    ended = serve(*arguments, *port)
    assert ended.returncode == 1
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
