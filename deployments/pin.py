"""`nestedfp pin`: every replica in one precision for a while, whatever the load."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nestedfp.deployments import durations, operate, policy_table
from nestedfp.policies.actor import LONGEST_OVERRIDE_S

if TYPE_CHECKING:
    from nestedfp.deployments.policy_search import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mode", metavar="MODE", help="fp16, fp8, auto, or one of the policy's plans")
    parser.add_argument(
        "--for", type=_seconds, required=True, dest="seconds", metavar="DURATION", help="90s, 15m, 2h"
    )
    operate.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Pin, and print what is in force then; 1 with a message where the actor refuses or is not reached."""

    def pin(found: Found) -> None:
        found.calls.pin(args.mode, args.seconds)
        print(policy_table.render(found.app_name, found.calls.status()))

    return operate.operate("pin", args, pin)


def _seconds(text: str) -> float:
    try:
        return durations.parse(text, LONGEST_OVERRIDE_S)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
