"""What `nestedfp status`, `pin` and `unpin` have in common: reach an application's policy actor in a Ray that
already runs, or say in one line why not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from nestedfp.deployments import ray_token
from nestedfp.policies.checks import InvalidField

if TYPE_CHECKING:
    from nestedfp.deployments.policy_search import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which Ray and which application."""
    parser.add_argument("--address", help="host:port of Ray's head (default: RAY_ADDRESS, or this machine's)")
    parser.add_argument("--app", help="application, where the Ray has several")


def operate(command: str, args: argparse.Namespace, act: Callable[[Found], None]) -> int:
    """Call `act` with the policy actor while connected; 1 with a line on stderr where that fails, else 0."""
    ray_token.heed()
    # Only now: importing them imports Ray.
    from ray.exceptions import RayError

    from nestedfp.deployments.policy_calls import why
    from nestedfp.deployments.policy_search import NoPolicy, find
    from nestedfp.deployments.ray_connection import NotJoined, find_address, joined

    try:
        with joined(find_address(args.address)):
            found = find(args.app)
            for other, replicas in found.others.items():
                remark = f"{found.app_name} has another policy actor, {other}, with {replicas} live replicas"
                _say(command, f"{remark}; this is about {found.name}, which the newest replica follows")
            act(found)
    except (InvalidField, NoPolicy, NotJoined) as error:
        _say(command, str(error))
        return 1
    except RayError as error:
        remedy = "try again, or end its process: the replicas bring up another"
        _say(command, f"policy actor: {why(error)}; {remedy}")
        return 1
    return 0


def _say(command: str, message: str) -> None:
    print(f"nestedfp {command}: {message}", file=sys.stderr)
