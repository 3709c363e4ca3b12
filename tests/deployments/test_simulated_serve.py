"""Real Ray Serve on the simulated engine: scaling, precision classes, a control plane that loses parts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from nestedfp.deployments import policy_actor
from nestedfp.deployments.app import build_app
from nestedfp.deployments.cluster import DEPLOYMENT, RunningApp
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.policies.config import PolicyConfig

from .serving import ANSWER_S, eventually, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

STEP_S = 0.02
COSTS = {"weights_s": 0.0, "token_s": 1e-5}
SETTINGS: dict[str, Any] = {
    "engine": {
        "model": "simulated",
        "device": "simulated",
        "arguments": {"max_num_seqs": 4, "stream_interval": 8},
    },
    "replicas": {
        "num_cpus": 0.1,
        "max_ongoing_requests": 64,
        "graceful_shutdown_timeout_s": ANSWER_S,
        "signal_window_s": 3.0,
    },
    "http": {"max_strict_requests": 2, "strict_wait_s": 10.0},
    "policy": {
        "controller": "threshold",
        "slo": {"ttft_s": 0.5, "tpot_s": 0.1},
        "thresholds": {
            "waiting": {"high": 2, "low": 0},
            "oldest_waiting_s": {"high": 0.2, "low": 0.05},
        },
        "latency": {
            "chunk_tokens": 256,
            "costs": {
                "fp16": {"overhead_s": STEP_S, **COSTS},
                "fp8": {"overhead_s": 0.8 * STEP_S, **COSTS},
            },
        },
        "min_dwell_s": 0.0,
        "calm_s": 0.5,
        "return_gap_s": 0.0,
        "max_flips_per_minute": 60,
        "lease_s": 3.0,
        "sync_wait_s": 0.2,
    },
    "autoscaling": {
        "min_replicas": 1,
        "max_replicas": 2,
        "interval_s": 0.5,
        "rule": {"overload_s": 1.0, "fp8_patience_s": 600.0, "spare_s": 3.0},
    },
}


class App:
    """The application, and every replica's own view of itself."""

    def __init__(self, running: RunningApp) -> None:
        self.running = running
        self.handle = serve.get_deployment_handle(DEPLOYMENT, running.file.app_name)

    def statuses(self) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.handle.broadcast("control_status").results(timeout_s=ANSWER_S)
        return answers

    def all_in(self, mode: str) -> bool:
        return all(status["engine"]["mode"] == mode for status in self.statuses())

    def policy(self) -> dict[str, Any]:
        return self.running.policy_status()

    def redeploy(self, args: dict[str, Any]) -> None:
        """Deploy `args` over what runs; their policy names the actor from then on."""
        settings = DeploymentSettings.from_dict(args)
        file = dataclasses.replace(self.running.file, settings=settings)
        serve.run(build_app(settings.to_dict()), name=file.app_name, route_prefix=file.route_prefix)
        self.running.file = file

    def pin(self, mode: str) -> None:
        self.running.pin(mode, 120.0)


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    with serving(SETTINGS) as started:
        app = App(started)
        yield app
        # With autoscaling a handle reports to Serve; one that outlived Ray would start another Ray.
        app.handle.shutdown()


@pytest.fixture(scope="module")
def http(app: App) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=app.running.url, timeout=ANSWER_S, limits=limits) as client:
        yield client


def complete(http: httpx.Client, *, strict: bool = False, **more: Any) -> httpx.Response:
    body = {"model": "simulated", "prompt": "some words", "max_tokens": 8, **more}
    headers = {"x-nestedfp-precision": "fp16"} if strict else {}
    return http.post("/completions", json=body, headers=headers)


class Load:
    """So many clients, each with one request after the other, until it is stopped."""

    def __init__(self, http: httpx.Client, clients: int) -> None:
        self._http = http
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._run) for _ in range(clients)]

    def _run(self) -> set[int]:
        seen: set[int] = set()
        while not self._stop.is_set():
            seen.add(complete(self._http, max_tokens=30).status_code)
        return seen

    def stop(self) -> set[int]:
        """The HTTP statuses seen."""
        self._stop.set()
        seen = set[int]().union(*(client.result() for client in self._clients))
        self._pool.shutdown()
        return seen


def test_everything_it_says_is_labelled(app: App, http: httpx.Client) -> None:
    answer = complete(http)
    assert answer.headers["x-nestedfp-replica"].startswith("simulated-")
    assert answer.json()["system_fingerprint"].startswith("simulated")
    assert answer.json()["usage"]["simulated"]["label"].startswith("simulated")
    assert [status["simulated"] for status in app.statuses()] == [True]
    eventually(lambda: len(app.policy()["replicas"]) == 1)
    assert all(replica.startswith("simulated-") for replica in app.policy()["replicas"])


def test_overload_goes_to_fp8_first_then_to_a_second_replica_and_all_the_way_back(
    app: App, http: httpx.Client
) -> None:
    assert len(app.statuses()) == 1
    load = Load(http, 32)
    try:
        eventually(lambda: app.all_in("fp8"))
        assert len(app.statuses()) == 1
        eventually(lambda: len(app.statuses()) == 2, within_s=60.0)
    finally:
        seen = load.stop()
    assert seen == {200}
    eventually(lambda: app.all_in("fp16"))
    eventually(lambda: len(app.statuses()) == 1, within_s=60.0)
    assert complete(http).status_code == 200


def test_strict_streams_wait_their_turn_and_have_no_fp8(app: App, http: httpx.Client) -> None:
    app.pin("fp8")
    eventually(lambda: app.all_in("fp8"))

    def strict_stream(_: int) -> dict[str, int]:
        body = {"prompt": "some words", "max_tokens": 20, "stream": True}
        body["stream_options"] = {"include_usage": True}
        headers = {"x-nestedfp-precision": "fp16"}
        with http.stream("POST", "/completions", json=body, headers=headers) as response:
            assert response.status_code == 200
            assert response.headers["x-nestedfp-precision-at-start"] == "fp16"
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        tokens: dict[str, int] = json.loads(lines[-1].removeprefix("data: "))["usage"]["nestedfp"]
        return tokens

    with ThreadPoolExecutor(6) as clients:
        served = list(clients.map(strict_stream, range(6)))
    assert all(tokens == {"fp16": 21, "fp8": 0} for tokens in served)
    assert complete(http).json()["usage"]["nestedfp"]["fp8"] > 0
    app.running.unpin()


def test_a_killed_actor_comes_back_without_its_pin_and_flips_once(app: App, http: httpx.Client) -> None:
    app.pin("fp8")
    eventually(lambda: app.all_in("fp8"))
    owner = app.policy()["owner"]
    flips = app.statuses()[0]["engine"]["flips"]
    app.running.kill_policy()
    eventually(lambda: app.policy()["owner"] != owner and bool(app.policy()["replicas"]))
    # The new actor takes the mode over as it is; the calm controller then returns.
    eventually(lambda: app.all_in("fp16"))
    assert app.statuses()[0]["engine"]["flips"] <= flips + 1


def test_a_replica_killed_in_the_middle_of_a_flip_is_replaced_in_the_mode_ordered(
    app: App, http: httpx.Client
) -> None:
    victim = app.statuses()[0]
    app.pin("fp8")
    os.kill(victim["pid"], signal.SIGKILL)

    def replaced() -> bool:
        replicas = app.policy()["replicas"]
        mine = [entry for name, entry in replicas.items() if name != victim["replica"]]
        return bool(mine) and all(
            entry["target"]["mode"] == "fp8" and entry["delivery_s"] is not None for entry in mine
        )

    eventually(replaced, within_s=60.0)
    eventually(lambda: complete(http).headers.get("x-nestedfp-precision-at-start") == "fp8")
    entry = app.policy()["replicas"].get(victim["replica"])
    eventually(lambda: not app.policy()["replicas"].get(victim["replica"], {"leased": False})["leased"])
    assert entry is None or entry["report"]["boot_id"] == victim["control"]["boot_id"]
    app.running.unpin()


def test_orders_reach_the_engine_quickly(app: App) -> None:
    def delays() -> list[float | None]:
        return [entry["delivery_s"] for entry in app.policy()["replicas"].values() if entry["leased"]]

    app.pin("fp16")
    eventually(lambda: app.all_in("fp16"))
    seen: list[float] = []
    for mode in ("fp8", "fp16") * 5:
        app.pin(mode)
        eventually(lambda: None not in delays())
        seen += [delay for delay in delays() if delay is not None]
    app.running.unpin()
    # On an idle machine a few milliseconds; what is excluded is a wait for the next poll or the next report.
    assert sorted(seen)[len(seen) // 2] < 0.2


def operator(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`nestedfp` as from another shell, which knows the address and the token."""
    known = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    known["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, "-m", "nestedfp.cli", *arguments],
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )


def test_an_operator_pins_and_unpins_from_another_process(app: App) -> None:
    eventually(lambda: app.all_in("fp16"))
    before = operator("status")
    assert (before.returncode, before.stderr) == (0, "")
    assert "pin: none" in before.stdout

    pinned = operator("pin", "fp8", "--for", "15m")
    assert (pinned.returncode, pinned.stderr) == (0, "")
    assert "pin: every replica in fp8 for 15m more" in pinned.stdout
    eventually(lambda: app.all_in("fp8"))
    eventually(lambda: all(entry["report"]["mode"] == "fp8" for entry in app.policy()["replicas"].values()))

    whole = json.loads(operator("status", "--json").stdout)
    assert whole.keys() == app.policy().keys()
    assert whole["override"]["mode"] == "fp8"
    assert 840.0 < whole["override"]["left_s"] < 900.0
    shown = operator("status", "--log", "1").stdout
    assert "pin: every replica in fp8 for 14m" in shown
    replica = app.statuses()[0]["replica"]
    assert f"{replica}  fp8 " in shown
    assert shown.count("fp16 -> fp8: pinned by hand") == 1

    unpinned = operator("unpin")
    assert (unpinned.returncode, unpinned.stderr) == (0, "")
    assert "pin: none" in unpinned.stdout
    eventually(lambda: app.all_in("fp16"))


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (("status",), {"RAY_AUTH_TOKEN": "wrong"}, "got a token that it refuses; set it"),
        (("status",), {"RAY_AUTH_TOKEN": ""}, "got no token, and it demands one; set it"),
        (("unpin",), {"RAY_AUTH_MODE": "disabled"}, "got no token, and it demands one; set it"),
        (("pin", "fp4", "--for", "1m"), {}, "mode: got 'fp4'; choose one of fp16, fp8, auto"),
        (("status", "--app", "other"), {}, "--app: got 'other'; choose one of"),
    ],
    ids=["wrong token", "no token", "token not sent", "unknown mode", "unknown application"],
)
def test_what_keeps_an_operator_out_is_told_in_one_line(
    app: App, tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], told: str
) -> None:
    # Ray would find a token in the user's home folder.
    ended = operator(*arguments, HOME=str(tmp_path), **environment)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"nestedfp {arguments[0]}: ")
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert app.policy()["override"] is None


def test_an_operator_among_several_applications(app: App) -> None:
    class Silent:
        def status(self) -> None:
            time.sleep(ANSWER_S)

    dry = PolicyConfig(dry_run=True)
    name = policy_actor.actor_name("silent", dry)
    options = {"name": name, "namespace": policy_actor.NAMESPACE, "num_cpus": 0}
    silent = ray.remote(Silent).options(**options).remote()
    policy_actor.find_or_create("dry", dry)
    try:
        apps = " or ".join(sorted(["dry", "silent", app.running.file.app_name]))
        for arguments, told in [
            (("status",), f"--app: not given, and this Ray has several; choose {apps}"),
            (("pin", "fp8", "--for", "1m", "--app", "dry"), "got 'fp8'; set dry_run to false"),
            (("unpin", "--app", "silent"), "policy actor: no answer in 10 s; try again"),
        ]:
            ended = operator(*arguments)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert told in ended.stderr
            assert ended.stderr.count("\n") == 1
        assert "no replica has reported" in operator("status", "--app", "dry").stdout
    finally:
        ray.kill(silent)
        policy_actor.end("dry", dry)


def test_a_redeployed_policy_meets_an_actor_of_its_own(app: App, http: httpx.Client) -> None:
    old, known = app.running.file, set(app.policy()["replicas"])
    policy = {**SETTINGS["policy"], "controller": "static-fp8"}
    app.redeploy({**SETTINGS, "policy": policy})
    eventually(lambda: bool(set(app.policy()["replicas"]) - known))
    assert app.policy()["controller"] == "static-fp8"
    assert not set(app.policy()["replicas"]) & known
    eventually(lambda: complete(http).headers["x-nestedfp-precision-at-start"] == "fp8")
    seen = operator("status")
    assert ": controller static-fp8;" in seen.stdout
    assert "has another policy actor" in seen.stderr
    # The old one is still there, with the class and the settings it was made with, and nobody calls it.
    name = policy_actor.actor_name(old.app_name, old.settings.policy)
    stale = ray.get(ray.get_actor(name, namespace=policy_actor.NAMESPACE).status.remote())
    assert stale["controller"] == "threshold"
    assert set(stale["replicas"]) <= known
    policy_actor.end(old.app_name, old.settings.policy)
