"""`nestedfp status`: what the policy of a running application does, and why."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

from nestedfp.deployments import operate, policy_table

if TYPE_CHECKING:
    from nestedfp.deployments.policy_search import Found

_CHANGES: Final = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    operate.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole status as one JSON object")
    parser.add_argument(
        "--log", type=_count, default=_CHANGES, metavar="N", help=f"last mode changes to show ({_CHANGES})"
    )


def run(args: argparse.Namespace) -> int:
    """Print it; 1 with a message where the policy actor cannot be reached."""

    def show(found: Found) -> None:
        if not args.json:
            print(policy_table.render(found.app_name, found.status, args.log))
            return
        # JSON has no infinities, which a threshold may be.
        plain = json.loads(json.dumps(found.status), parse_constant=lambda _: None)
        print(json.dumps(plain, allow_nan=False))

    return operate.operate("status", args, show)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number of at least 0")
    return int(text)
