"""Runs an application on a Ray of its own on this machine, and ends it without leaving a process behind.

This is what `nestedfp serve`, the demonstration and the tests use. In a cluster that already runs, `serve
deploy` takes the same file.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ReplicaState  # type: ignore[attr-defined]

from nestedfp import models
from nestedfp.deployments import front_door, policy_actor
from nestedfp.deployments.app import build_app
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.interrupt import interrupts_held
from nestedfp.deployments.policy_calls import CALL_TIMEOUT_S, PolicyCalls
from nestedfp.deployments.processes import is_running, none_left_behind
from nestedfp.deployments.serve_file import ServeFile

_OBJECT_STORE_BYTES: Final = 256 * 2**20
_POLL_S: Final = 0.5
_ROUNDING: Final = 1e-6
_RAY_PROCESSES: Final = ("gcs_server", "raylet")
"""What calls to Serve need of Ray on this machine."""
DEPLOYMENT: Final = "EngineReplica"

Say = Callable[[str], None]


class StartFailed(RuntimeError):
    """The application did not come up; the message holds what Serve knows."""


class RunningApp:
    """An application that serves. Made by :func:`running`."""

    def __init__(self, file: ServeFile) -> None:
        self.file = file
        self.model = file.settings.engine.served_model_name
        self._handle: Any = None

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients, with `/v1`."""
        return self.file.url

    def policy_status(self) -> dict[str, Any]:
        """The policy actor's status: targets, last reports, and `log`: mode changes with their signals."""
        return self._policy().status()

    def pin(self, mode: str, expires_s: float) -> None:
        """Pin every replica to `mode` for `expires_s` seconds."""
        self._policy().pin(mode, expires_s)

    def unpin(self) -> None:
        self._policy().unpin()

    def kill_policy(self) -> None:
        """Kill the policy actor; the replicas bring a new one up."""
        policy_actor.end(self.file.app_name, self.file.settings.policy)

    def replica_status(self) -> dict[str, Any]:
        """One replica's own view: process, control loop, engine. With several replicas, any of them."""
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, self.file.app_name)
        status: dict[str, Any] = self._handle.control_status.remote().result(timeout_s=CALL_TIMEOUT_S)
        return status

    def close(self) -> None:
        """Ends the router of `replica_status`, whose thread must not outlive Ray."""
        if self._handle is not None:
            self._handle.shutdown()

    def _policy(self) -> PolicyCalls:
        return PolicyCalls(policy_actor.find_or_create(self.file.app_name, self.file.settings.policy))


@contextmanager
def running(
    file: ServeFile, *, say: Say = lambda _: None, temp_dir: Path | None = None
) -> Iterator[RunningApp]:
    """Start Ray and the application, yield when every replica is ready, and stop both.

    Raises :class:`StartFailed` where the port is taken, the machine is too small, or Ray or a replica fails
    to start. Once in a process: Ray 2.60 leaves the metrics exporter of a second one running, which may crash
    the process as it exits.
    """
    _check_port(file.host, file.port)
    models.resolve(file.settings.engine.model)
    _prepare_environment()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    say("starting Ray")
    with none_left_behind():
        try:
            with interrupts_held():
                _start_ray(file, temp_dir)
            _check_resources(file.settings)
            _deploy(file, say)
            app = RunningApp(file)
            try:
                yield app
            finally:
                say("stopping")
                with interrupts_held():
                    app.close()
                    _delete_unless_ray_ends(file, say)
        finally:
            # A replica that is still loading cannot end in good order; it ends with Ray.
            with interrupts_held():
                ray.shutdown()


def _start_ray(file: ServeFile, temp_dir: Path | None) -> None:
    folder = temp_dir or Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"
    logs = folder / "session_latest" / "logs"
    with _own_signal_handlers(), _waiting_for("Ray's own processes", logs):
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=None if temp_dir is None else str(temp_dir),
        )
    with _waiting_for(f"Serve's HTTP proxy on {file.host}:{file.port}", logs / "serve"):
        serve.start(
            proxy_location=file.proxy_location,
            http_options={
                "host": file.host,
                "port": file.port,
                "request_timeout_s": file.request_timeout_s,
            },
        )


@contextmanager
def _waiting_for(what: str, logs: Path) -> Iterator[None]:
    """Raises :class:`StartFailed` where Ray gives up waiting for `what`, which logs to `logs`."""
    started_s = time.monotonic()
    try:
        yield
    except Exception as error:
        # Ray raises RuntimeError or a bare Exception where its own processes do not answer in time.
        if not (isinstance(error, (TimeoutError, RayError)) or type(error) in (Exception, RuntimeError)):
            raise
        waited_s = time.monotonic() - started_s
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StartFailed(
            f"{what} did not come up in {waited_s:.0f} s ({reason}); "
            f"free processors or memory of this machine and start again, or see {logs}"
        ) from error


def _delete_unless_ray_ends(file: ServeFile, say: Say) -> None:
    """A signal to the whole process group, as from `timeout` or systemd, ends Ray as well; a call to it would
    then wait for a minute, and end this process."""
    failures: list[Exception] = []

    def delete() -> None:
        try:
            _delete(file, say)
        except (RayError, RayServeException, RuntimeError) as error:
            # Raised where someone waits for it.
            failures.append(error)

    deletion = threading.Thread(target=delete, daemon=True)
    deletion.start()
    while deletion.is_alive():
        deletion.join(_POLL_S)
        if deletion.is_alive() and not all(is_running(name) for name in _RAY_PROCESSES):
            say("Ray was ended from outside: ending what is left of it, requests in progress included")
            return
    for error in failures:
        raise error


def _delete(file: ServeFile, say: Say) -> None:
    policy_actor.end(file.app_name, file.settings.policy)
    try:
        serve.delete(file.app_name)
    except TimeoutError:
        say("the replicas have not finished their requests in time: stopping all the same")


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep this process's handler for SIGTERM, which Ray replaces when it starts."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _prepare_environment() -> None:
    """Ray's processes take these from this one. What the caller has set stays."""
    # Some of Ray's own ports listen on all interfaces. A Ray started by `ray.init` demands a token there
    # (unless RAY_AUTH_MODE says otherwise); this one lives as long as this process and is written nowhere.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault(front_door.CALLBACK_VARIABLE, front_door.CALLBACK)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _deploy(file: ServeFile, say: Say) -> None:
    wanted = file.settings.replicas_at_start
    done = threading.Event()
    watcher = threading.Thread(target=_report_progress, args=(file.app_name, wanted, done, say), daemon=True)
    watcher.start()
    try:
        serve.run(build_app(file.settings.to_dict()), name=file.app_name, route_prefix=file.route_prefix)
    except RuntimeError as error:
        raise StartFailed(f"{error}\n{_failure(file.app_name)}") from error
    finally:
        done.set()
        watcher.join()


def _report_progress(app_name: str, wanted: int, done: threading.Event, say: Say) -> None:
    started_s = time.monotonic()
    seen = -1
    while not done.wait(_POLL_S):
        ready = _ready_replicas(app_name)
        if ready != seen:
            say(f"{ready} of {wanted} replicas ready after {time.monotonic() - started_s:.0f} s")
            seen = ready


def _ready_replicas(app_name: str) -> int:
    app = serve.status().applications.get(app_name)
    if app is None or DEPLOYMENT not in app.deployments:
        return 0
    return app.deployments[DEPLOYMENT].replica_states.get(ReplicaState.RUNNING, 0)


def _failure(app_name: str) -> str:
    app = serve.status().applications.get(app_name)
    if app is None or app.status == ApplicationStatus.RUNNING:
        return ""
    return "\n".join(deployment.message for deployment in app.deployments.values() if deployment.message)


def _check_resources(settings: DeploymentSettings) -> None:
    """Serve would wait for a larger machine for ever."""
    count = settings.replicas_at_start
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, each in (("CPU", settings.replicas.num_cpus), ("GPU", settings.num_gpus)):
        wanted, found = count * each, there.get(resource, 0.0)
        if wanted > found + _ROUNDING:
            raise StartFailed(
                f"{count} replicas need {wanted:g} {resource}s and this machine has {found:g}; "
                f"lower their number, or replicas.num_{resource.lower()}s"
            )


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        message = f"cannot listen on {host}:{port} ({error.strerror}); choose another port with --port"
        raise StartFailed(f"{message}, or another http_options.host") from None
