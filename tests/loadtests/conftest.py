"""The dummy server as a fixture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Dummy:
    url: str
    log: Path
    process: subprocess.Popen[str]

    def answered(self) -> dict[int, dict[str, Any]]:
        """What the server wrote about each complete answer, by the request's number."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {entry["number"]: entry for entry in entries}


@pytest.fixture
def dummy(tmp_path: Path) -> Iterator[Callable[..., Dummy]]:
    started: list[Dummy] = []

    def start(**plan: Any) -> Dummy:
        log = tmp_path / f"server{len(started)}.log"
        log.touch()
        script = Path(__file__).with_name("dummy_server.py")
        process = subprocess.Popen(
            [sys.executable, str(script), "0", str(log), json.dumps(plan)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        port = int(process.stdout.readline())
        started.append(Dummy(f"http://127.0.0.1:{port}", log, process))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
