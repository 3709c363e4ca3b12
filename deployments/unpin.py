"""`nestedfp unpin`: the controller decides again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nestedfp.deployments import operate, policy_table

if TYPE_CHECKING:
    from nestedfp.deployments.policy_search import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    operate.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """End a pin, and print what is in force then; 1 with a message where the actor is not reached."""

    def unpin(found: Found) -> None:
        found.calls.unpin()
        print(policy_table.render(found.app_name, found.calls.status()))

    return operate.operate("unpin", args, unpin)
