"""A node that must go: SIGTERM to one of a real Ray under load, as Kubernetes sends it to a pod.

Three nodes on one machine: a head that takes no replica, and two workers with one replica each and no room
for another. The HTTP proxy runs on the head, as two would need the same port.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from nestedfp.deployments import front_door
from nestedfp.deployments.cluster import DEPLOYMENT

from .serving import eventually, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

ANSWERS_S = 10.0
DRAIN_S = 20.0
TOKENS, STEP_S = 100, 0.02
REQUEST = {"model": "simulated", "prompt": [1] * 8, "max_tokens": TOKENS, "stream": True}
SETTINGS: dict[str, Any] = {
    "engine": {"model": "simulated", "device": "simulated", "arguments": {"stream_interval": 10}},
    "replicas": {"count": 2, "num_cpus": 0.6, "graceful_shutdown_timeout_s": ANSWERS_S},
    "policy": {
        "controller": "static-fp16",
        "latency": {
            "chunk_tokens": 256,
            "costs": {
                mode: {"overhead_s": STEP_S, "weights_s": 0.0, "token_s": 1e-5} for mode in ("fp16", "fp8")
            },
        },
    },
}


class Cluster:
    """A Ray of several nodes, each a `ray start --block` as in a pod of KubeRay."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._token = secrets.token_hex(16)
        self._gcs, self._dashboard, self.http = free_port(), free_port(), free_port()
        self.start(
            "head",
            "0",
            "--head",
            f"--port={self._gcs}",
            "--num-cpus=0",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={folder}",
        )

    def start(self, name: str, drain_s: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a node; returns once it is part of the cluster."""
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": drain_s,
            front_door.CALLBACK_VARIABLE: front_door.CALLBACK,
        }
        # Several nodes share the machine: no port may be a default.
        ports = ["--min-worker-port=0", "--max-worker-port=0", f"--metrics-export-port={free_port()}"]
        ports += [f"--dashboard-agent-listen-port={free_port()}"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments, *ports]
        command += ["--object-store-memory=100000000", f"--node-name={name}"]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._stack.callback(_kill, process)
        eventually(lambda: "Ray runtime started" in self.log(name) or process.poll() is not None, within_s=60)
        assert process.poll() is None, self.log(name)
        return process

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        address = f"--address={ray.util.get_node_ip_address()}:{self._gcs}"
        return self.start(name, str(DRAIN_S), address, "--num-cpus=1")

    def log(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def _log(self, name: str) -> Path:
        return self._folder.with_name(f"{self._folder.name}-{name}.log")

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        """The dashboard's API, as KubeRay's operator uses it; None while it does not answer."""
        headers = {"Authorization": f"Bearer {self._token}"}
        url = f"http://127.0.0.1:{self._dashboard}{path}"
        with suppress(httpx.HTTPError):
            response = httpx.request(method, url, headers=headers, timeout=30, **arguments)
            if response.status_code == 200:
                return response.json() if response.text else {}
        return None

    def deploy(self) -> None:
        application = {
            "name": "nestedfp",
            "import_path": "nestedfp.deployments.app:build_app",
            "args": SETTINGS,
        }
        content = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http, "request_timeout_s": ANSWERS_S},
            "applications": [application],
        }
        path = "/api/serve/applications/"
        eventually(lambda: self.ask("PUT", path, json=content) is not None, within_s=60)
        eventually(lambda: self.application().get("status") == "RUNNING", within_s=90)

    def application(self) -> dict[str, Any]:
        found = self.ask("GET", "/api/serve/applications/") or {"applications": {}}
        application: dict[str, Any] = found["applications"].get("nestedfp", {})
        return application

    def replicas(self) -> dict[str, str]:
        """The node of each replica."""
        entries = self.application()["deployments"][DEPLOYMENT]["replicas"]
        return {entry["replica_id"]: entry["node_id"] for entry in entries}

    def nodes(self, key: str, table: str, field: str) -> dict[str, str]:
        """`key` -> node, of what lives, from a table of Ray's state API."""
        rows = self.ask("GET", f"/api/v0/{table}?detail=1")["data"]["result"]["result"]
        return {row[key]: row[field] for row in rows if row["state"] == "ALIVE"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Ray's sockets lie under this folder, and the path of a socket is short.
    folder = Path(tempfile.mkdtemp(prefix="nfp-", dir="/tmp"))
    try:
        with ExitStack() as stack:
            yield Cluster(folder, stack)
    finally:
        for path in folder.parent.glob(f"{folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Users:
    """Clients that ask one after the other, and what they were answered: replica and start of each stream."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self.answered: list[tuple[str, float]] = []
        self.failed: list[str] = []
        self._stop = threading.Event()

    @contextmanager
    def calling(self, count: int) -> Iterator[None]:
        threads = [threading.Thread(target=self._call, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(60)

    def _call(self) -> None:
        while not self._stop.is_set():
            started_s = time.monotonic()
            try:
                with httpx.stream("POST", self._url, json=REQUEST, timeout=60) as response:
                    lines = [line for line in response.iter_lines() if line]
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            if response.status_code == 200 and lines[-1] == "data: [DONE]":
                replica = response.headers["x-nestedfp-replica"].removeprefix("simulated-")
                self.answered.append((replica, started_s))
            else:
                self.failed.append(f"{response.status_code}: {lines[-1:]}")


def test_a_node_that_must_go_loses_no_answer(cluster: Cluster) -> None:
    workers = {name: cluster.worker(name) for name in ("w1", "w2")}
    cluster.deploy()
    nodes = cluster.nodes("node_name", "nodes", "node_id")
    going = next(replica for replica, node in cluster.replicas().items() if node == nodes["w1"])
    users = Users(cluster.http)
    with users.calling(8):
        eventually(lambda: len({replica for replica, _ in users.answered}) == 2, within_s=30)
        # On a worker, the policy actor would keep it from ending until the time is up.
        assert cluster.nodes("class_name", "actors", "node_id")["PolicyService"] == nodes["head"]
        told_s = time.monotonic()
        workers["w1"].send_signal(signal.SIGTERM)
        workers["w1"].wait(DRAIN_S + 30)
        ended_s = time.monotonic()
        time.sleep(2 * TOKENS * STEP_S)
    assert users.failed == []
    assert "finished draining" in cluster.log("w1")
    assert ended_s - told_s < DRAIN_S
    # It has served on, as there was nowhere to go, and ended what it had accepted.
    assert any(replica == going and started_s > told_s for replica, started_s in users.answered)
    assert any(replica != going and started_s > ended_s for replica, started_s in users.answered)
