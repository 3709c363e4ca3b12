"""Where the operator's commands look for a Ray, and what they say where there is none; starts none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nestedfp.deployments import ray_connection
from nestedfp.deployments.ray_connection import NotJoined, find_address, joined
from nestedfp.policies.checks import InvalidField

from .serving import free_port


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The Rays on this machine."""
    here: set[str] = set()
    monkeypatch.setattr(ray_connection.services, "find_gcs_addresses", lambda: frozenset(here))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return here


def test_the_option_comes_before_the_variable_and_that_before_this_machine(
    machine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("10.0.0.1:6379")
    assert find_address(None) == find_address("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "head:6380")
    assert find_address(None) == find_address("auto") == "head:6380"
    assert find_address("[::1]:6381") == "[::1]:6381"


@pytest.mark.parametrize("address", ["local", "head", "ray://head:10001", "head:0", "head:65536", "a b:1"])
def test_an_address_that_would_start_a_ray_or_is_none_is_refused(
    machine: set[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    with pytest.raises(InvalidField, match=r"--address: got '.*'; give the host:port"):
        find_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InvalidField, match=r"RAY_ADDRESS: got '.*'; give the host:port"):
        find_address(None)


def test_no_ray_and_several_are_told(machine: set[str]) -> None:
    with pytest.raises(InvalidField, match="no Ray runs on this machine"):
        find_address(None)
    machine |= {"10.0.0.1:6379", "10.0.0.1:6380"}
    with pytest.raises(InvalidField, match=r"choose 10\.0\.0\.1:6379 or 10\.0\.0\.1:6380"):
        find_address(None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Version mismatch:\n    Ray: 2.60"), r"\(Version mismatch: Ray: 2\.60\); run this on"),
        (ConnectionError("Traceback (most recent call last):\n  x\nRpcError: no"), r"\(RpcError: no\); run"),
    ],
)
def test_a_ray_that_does_not_take_it_in_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def refuse(**_: object) -> None:
        print("a line for each attempt", file=sys.stderr)
        raise error

    monkeypatch.setattr(ray_connection, "_check_listening", lambda _: None)
    monkeypatch.setattr(ray_connection.ray, "init", refuse)
    with pytest.raises(NotJoined, match=told) as caught, joined("head:6379"):
        raise AssertionError("it was not joined")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [("status",), ("pin", "fp8", "--for", "1m"), ("unpin",)])
def test_where_nothing_listens_each_command_says_so(command: tuple[str, ...]) -> None:
    address = f"127.0.0.1:{free_port()}"
    program = [sys.executable, "-m", "nestedfp.cli", *command, "--address", address]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(
        f"nestedfp {command[0]}: no Ray listens at {address} (Connection refused);"
    )
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("pin", "fp8"), "--for"),
        (("pin", "fp8", "--for", "5x"), "argument --for: got '5x'; give a number and its unit"),
        (("pin", "fp8", "--for", "25h"), "at most 24h"),
        (("pin", "--for", "5m"), "MODE"),
        (("status", "--log", "-1"), "argument --log: got '-1'; give a whole number"),
    ],
)
def test_a_wrong_call_is_told_without_a_ray(command: tuple[str, ...], told: str) -> None:
    program = [sys.executable, "-m", "nestedfp.cli", *command]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert told in ended.stderr
