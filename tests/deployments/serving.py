"""A real application on a Ray of its own, for tests that go through the front door."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from nestedfp.deployments.cluster import RunningApp, running
from nestedfp.deployments.serve_file import ServeFile

ANSWER_S = 60.0
"""Nothing may take longer than this, on a machine with other work too."""


def free_port() -> int:
    """A port that nothing listens on, below those that connections of Ray's processes are given by chance."""
    while True:
        port = random.randint(12_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def eventually(holds: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.1)


@contextmanager
def serving(args: dict[str, Any]) -> Iterator[RunningApp]:
    """The application with the settings `args`; at the end none of its processes may be left."""
    file = ServeFile.from_dict(
        {
            "http_options": {"host": "127.0.0.1", "port": free_port(), "request_timeout_s": ANSWER_S},
            "applications": [{"import_path": "nestedfp.deployments.app:build_app", "args": args}],
        }
    )
    # Ray's sockets lie under this folder, and the path of a socket is short.
    folder = Path(tempfile.mkdtemp(prefix="nfp-", dir="/tmp"))
    before = set(psutil.Process().children(recursive=True))
    try:
        with running(file, temp_dir=folder) as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
