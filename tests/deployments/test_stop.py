"""`nestedfp serve` ends in good time and leaves nothing, also where a signal reaches Ray as well."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .serving import free_port

ROOT = Path(__file__).resolve().parents[2]
READY_S, END_S = 120.0, 45.0
"""A call to a Ray that has ended waits for 60 s."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A server with one simulated replica, the leader of its process group, and what it prints."""
    log = tmp_path / "log"
    # Ray's sockets lie under this folder, and the path of a socket is short.
    folder = Path(tempfile.mkdtemp(prefix="nfp-", dir="/tmp"))
    config = ROOT / "deployments" / "configs" / "simulated.yaml"
    command = [sys.executable, "-m", "nestedfp.cli", "serve", "--config", str(config), "--replicas", "1"]
    command += ["--port", str(free_port()), "--ray-dir", str(folder)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    started = psutil.Process(process.pid)
    try:
        deadline_s = time.monotonic() + READY_S
        while b"/v1" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)
        below = started.children(recursive=True)
        yield process, log
        _, alive = psutil.wait_procs(below, timeout=5)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    finally:
        if process.poll() is None:
            for child in started.children(recursive=True):
                child.kill()
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_signal_to_the_whole_group_ends_ray_too_and_is_not_waited_out(
    server: tuple[subprocess.Popen[bytes], Path],
) -> None:
    """As from `timeout`, or from systemd to a service."""
    process, log = server
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(END_S) == 0, log.read_text()
    assert "Ray was ended from outside" in log.read_text()
    assert log.read_text().endswith("stopped\n")


def test_a_signal_to_the_server_alone_stops_it_in_order(
    server: tuple[subprocess.Popen[bytes], Path],
) -> None:
    process, log = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(END_S) == 0, log.read_text()
    assert "from outside" not in log.read_text()
