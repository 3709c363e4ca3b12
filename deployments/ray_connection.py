"""Joins a Ray that runs already, as one of its drivers; never starts one."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import ray
from ray._private import services
from ray.exceptions import AuthenticationError, RayError

from nestedfp.deployments import ray_token
from nestedfp.deployments.policy_actor import NAMESPACE
from nestedfp.policies.checks import InvalidField

_AUTO: Final = "auto"
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):([0-9]{1,5})")
_LISTENS_WITHIN_S: Final = 3.0
_ATTEMPTS: Final = 1
_STDERR: Final = 2


class NotJoined(RuntimeError):
    """This Ray did not take the process in; the message says why and what to do."""


def find_address(given: str | None) -> str:
    """The `host:port` to join: `given`, else RAY_ADDRESS, else that of the one Ray on this machine."""
    field, address = "--address", given or _AUTO
    if address == _AUTO:
        variable = os.environ.get("RAY_ADDRESS") or _AUTO
        field, address = (field, _AUTO) if variable == _AUTO else ("RAY_ADDRESS", variable)
    if address != _AUTO:
        # Ray would take `local` for an order to start another, and `ray://` for a client of another kind.
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match[2]) < 2**16:
            raise InvalidField(field, address, "give the host:port of the head of a Ray that runs")
        return address
    found = sorted(services.find_gcs_addresses())  # type: ignore[no-untyped-call]
    if not found:
        remedy = "no Ray runs on this machine; run this on a node or in a pod of the cluster"
        raise InvalidField(field, address, remedy)
    if len(found) > 1:
        # Ray would take any of them.
        raise InvalidField(field, address, f"several Rays run on this machine; choose {' or '.join(found)}")
    return str(found[0])


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be a driver of the Ray at `address` for the block. Raises :class:`NotJoined`."""
    _check_listening(address)
    # Ray makes as many attempts as there are seconds here. One takes 40 s where what listens does not answer.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(_ATTEMPTS))
    try:
        with _silent():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise NotJoined(_refusal(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listening(address: str) -> None:
    """Ray itself would try for minutes where nothing listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENS_WITHIN_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotJoined(
            f"no Ray listens at {address} ({reason}); see --address, RAY_ADDRESS and whether it still runs"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what the block writes to stderr: Ray's C++ writes lines there, past Python's loggers. What failed
    is in the exception.
    """
    sys.stderr.flush()
    kept = os.dup(_STDERR)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), _STDERR)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, _STDERR)
        os.close(kept)


def _refusal(address: str, error: Exception) -> str:
    # Ray wraps what its C++ says twice, at last as the text of a traceback.
    told = str(error.__cause__ or error).strip()
    if isinstance(error, AuthenticationError) or AuthenticationError.__name__ in told:
        got = "a token that it refuses" if ray_token.sent() else "no token, and it demands one"
        return (
            f"RAY_AUTH_TOKEN: the Ray at {address} got {got}; set it as it was where that Ray started "
            "(`nestedfp serve` makes a random one unless it is set), and RAY_AUTH_MODE to token or not at all"
        )
    reason = told.splitlines()[-1] if "Traceback" in told else " ".join(told.split())
    return (
        f"the Ray at {address} could not be joined ({reason}); run this on a node or in a pod of the "
        "cluster, with the versions of Ray and Python that run there"
    )
