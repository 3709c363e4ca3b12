"""``nestedfp simulate``: the policies' simulator fed by the load tests' readers of trace files."""

import argparse

from nestedfp.loadtests.readers import read_trace
from nestedfp.policies import simulate_command
from nestedfp.policies.simulate_command import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    return simulate_command.run(args, read_trace)
