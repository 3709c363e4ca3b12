"""What the start of an application says where Ray does not come up, without a Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from nestedfp.deployments import cluster
from nestedfp.deployments.cluster import StartFailed, running
from nestedfp.deployments.serve_file import ServeFile

from .serving import free_port

NODE = "The current node timed out during startup. This could happen because ..."


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> ServeFile:
    """An application whose start takes 30 s wherever the clock is read."""
    clock = iter(range(0, 3000, 30))
    monkeypatch.setattr(cluster.time, "monotonic", lambda: float(next(clock)))
    engine = {"model": "m", "device": "simulated"}
    return ServeFile.from_dict(
        {
            "http_options": {"host": "127.0.0.1", "port": free_port()},
            "applications": [
                {"import_path": "nestedfp.deployments.app:build_app", "args": {"engine": engine}}
            ],
        }
    )


def failing(error: Exception) -> Any:
    def call(**_: Any) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Exception(NODE), NODE),
        (RuntimeError("no GCS\nmore"), "no GCS"),
        (GetTimeoutError(), "GetTimeoutError"),
    ],
)
def test_a_ray_that_does_not_start_is_one_error_with_the_time_and_a_remedy(
    file: ServeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    monkeypatch.setattr(cluster.models, "resolve", lambda model: model)
    monkeypatch.setattr(cluster.ray, "init", failing(error))
    with pytest.raises(StartFailed) as caught, running(file, temp_dir=tmp_path):
        raise AssertionError("it never ran")
    assert str(caught.value) == (
        f"Ray's own processes did not come up in 30 s ({reason}); free processors or memory of this machine "
        f"and start again, or see {tmp_path}/session_latest/logs"
    )


def test_a_proxy_that_does_not_start_is_named_with_its_address(
    file: ServeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    monkeypatch.setattr(
        cluster.serve, "start", failing(TimeoutError("HTTP proxies not available after 60s."))
    )
    with pytest.raises(StartFailed, match=f"proxy on 127.0.0.1:{file.port} did not come up in 30 s"):
        cluster._start_ray(file, None)


def test_proxies_run_where_the_file_says(file: ServeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    monkeypatch.setattr(cluster.serve, "start", lambda **given: told.update(given))
    cluster._start_ray(dataclasses.replace(file, proxy_location="EveryNode"), None)
    assert told["proxy_location"] == "EveryNode"


def test_a_mistake_in_the_call_is_not_called_a_timeout(
    file: ServeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.ray, "init", failing(ValueError("bad memory size")))
    with pytest.raises(ValueError, match="bad memory size"):
        cluster._start_ray(file, None)
