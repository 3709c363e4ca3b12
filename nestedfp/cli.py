"""The command `nestedfp`. Each subcommand's module is imported only when it is called."""

import argparse
import importlib
import sys
from types import ModuleType
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: `module` offers `add_arguments(parser)` and `run(args) -> int | None`."""

    module: str
    help: str


EXIT_INTERRUPTED = 130
"""What shells report for a program ended by SIGINT."""

COMMANDS: dict[str, Command] = {
    "serve": Command(
        "nestedfp.deployments.serve", "serve a model on Ray Serve behind an OpenAI-compatible endpoint"
    ),
    "status": Command("nestedfp.deployments.status", "show what the policy of a running application does"),
    "pin": Command("nestedfp.deployments.pin", "keep every replica in one precision for a while"),
    "unpin": Command("nestedfp.deployments.unpin", "end a pin: the controller decides again"),
    "demo": Command(
        "nestedfp.deployments.demo", "replay a burst on two CPU replicas and report what the policy did"
    ),
    "replay": Command(
        "nestedfp.loadtests.replay", "replay a trace of requests against an OpenAI-compatible endpoint"
    ),
    "simulate": Command(
        "nestedfp.deployments.simulate", "replay a trace on simulated replicas under a policy"
    ),
    "bench kernels": Command(
        "nestedfp.kernels.bench", "time both products beside cuBLAS and the FP8 products of torch and vLLM"
    ),
    "tune kernels": Command(
        "nestedfp.kernels.tune", "time the kernels' configurations on this GPU and write the best as a table"
    ),
    "compile kernels": Command(
        "nestedfp.kernels.precompile", "compile the CUDA C++ kernels for given weights; needs no GPU"
    ),
    "report policy": Command(
        "nestedfp.deployments.policy_report", "draw the policies' figures and write their tables into docs"
    ),
    "bench engine": Command(
        "nestedfp.vllm.bench", "time vLLM engines: plain 16 bits, online FP8, NestedFP in both"
    ),
}


def build_parser(selected: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the arguments of the `selected` command are filled in (its module is imported)."""
    parser = argparse.ArgumentParser(
        prog="nestedfp", description=__doc__.splitlines()[0] if __doc__ else None
    )
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    for name, command in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        if group not in groups:
            leaves = " or ".join(other.split()[1] for other in COMMANDS if other.split()[0] == group)
            parent = groups[""].add_parser(group, help=f"{group} {leaves}")
            groups[group] = parent.add_subparsers(metavar="WHAT", required=True)
        child = groups[group].add_parser(leaf, help=command.help, description=command.help)
        if name == selected:
            module = importlib.import_module(command.module)
            module.add_arguments(child)
            child.set_defaults(module=module)
    return parser


def selected_command(arguments: list[str]) -> str | None:
    """The command that `arguments` begin with, or None."""
    words = [word for word in arguments[:2] if not word.startswith("-")]
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name
    return None


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = build_parser(selected_command(arguments)).parse_args(arguments)
        module: ModuleType = args.module
        return int(module.run(args) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
