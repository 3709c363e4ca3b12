"""One family of CUDA graphs for each plan, and the swap between them.

A graph freezes the kernels it was captured with, so every plan needs graphs of its own. vLLM keeps graphs
in a handful of dictionaries ("holders": its graph wrappers, and the second-generation runner's manager).
A family is what all holders hold after vLLM has captured the model under one plan; putting a plan in
force installs its family's dictionaries. That is a few dozen attribute writes on the host: nothing is
launched, nothing waits, and steps already under way keep the graphs they were launched from.

All families draw on vLLM's one graph memory pool, which is sound because only one graph runs at a time.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nestedfp.vllm.plan import Plan

logger = logging.getLogger("vllm.nestedfp")

GraphDict = dict[Any, Any]

_REMEDY = "start with enforce_eager=True and report it"
_POOL_BYTES = 580 << 20
_FAMILY_BYTES = 80 << 20
_GRAPH_BYTES = 170 << 10


class GraphFamilyError(RuntimeError):
    """A family lacks graphs, so that flips would not reach the steps that replay them."""


@dataclass(frozen=True)
class Holder:
    """An attribute of one of vLLM's objects that holds a dictionary from batch shape to graph."""

    owner: Any
    attribute: str

    def take(self) -> GraphDict:
        graphs: GraphDict = getattr(self.owner, self.attribute)
        return graphs

    def install(self, graphs: GraphDict) -> None:
        setattr(self.owner, self.attribute, graphs)

    @property
    def key(self) -> int:
        return id(self.owner)

    def __str__(self) -> str:
        return f"{type(self.owner).__name__}.{self.attribute}"


@dataclass(frozen=True)
class Family:
    """The graphs of one plan: what each holder holds, the GPU memory they took, the time of capture."""

    dictionaries: tuple[tuple[Holder, GraphDict], ...]
    taken_bytes: int
    seconds: float

    @property
    def graphs(self) -> int:
        return sum(len(graphs) for _, graphs in self.dictionaries)

    def install(self) -> None:
        for holder, graphs in self.dictionaries:
            holder.install(graphs)


class GraphBank:
    """The families of all plans."""

    def __init__(self, find_holders: Callable[[], Iterable[Holder]]) -> None:
        """`find_holders` lists vLLM's holders; wrappers may come into being during a capture."""
        self._find_holders = find_holders
        self.families: dict[str, Family] = {}

    def capture(self, plans: Sequence[Plan], capture_under: Callable[[Plan], int]) -> int:
        """Captures a family for each plan, in this order, and leaves the last one installed.

        `capture_under(plan)` runs vLLM's capture with the plan in force and returns the bytes it took.
        Returns the bytes of all families. Raises GraphFamilyError unless all hold the same keys.
        """
        for plan in plans:
            for holder in self._find_holders():
                holder.install({})
            start = time.perf_counter()
            taken = capture_under(plan)
            seconds = time.perf_counter() - start
            held = tuple((holder, holder.take()) for holder in self._find_holders())
            family = self.families[plan.name] = Family(held, taken, seconds)
            logger.info(
                "nestedfp: plan %s: %d CUDA graphs in %d holders, %.2f GiB, %.1f s",
                plan.name, family.graphs, len(held), taken / 2**30, seconds,
            )  # fmt: skip
        self._compare()
        return sum(family.taken_bytes for family in self.families.values())

    def require(
        self, batches: Collection[tuple[int, bool]], batch_of: Callable[[Any], tuple[int, bool]]
    ) -> None:
        """Raises GraphFamilyError unless every family holds a graph of each of `batches`: one that none holds
        would be replayed under every plan. To be called once all is captured.

        `batch_of` tells the batch of a graph's key.
        """
        if batches and not self.families:
            raise GraphFamilyError(
                f"this vLLM was to capture CUDA graphs of {len(batches)} batches, but not by the runner's "
                f"capture_model: flips would not reach them; {_REMEDY}"
            )
        for name, family in self.families.items():
            held = {batch_of(key) for _, graphs in family.dictionaries for key in graphs}
            if missing := sorted(set(batches) - held):
                tokens, whole = missing[0]
                raise GraphFamilyError(
                    f"plan {name} lacks CUDA graphs of {len(missing)} of {len(batches)} batches, first of "
                    f"{tokens} tokens {'in one graph' if whole else 'in pieces'}: this vLLM keeps them where "
                    f"they are not looked for, and flips would not reach them; {_REMEDY}"
                )

    def install(self, plan: Plan) -> None:
        """Puts the plan's graphs in place; does nothing in an engine that captured none."""
        if self.families:
            self.families[plan.name].install()

    def facts(self) -> dict[str, dict[str, float]]:
        """By plan: graphs, bytes taken, seconds to capture."""
        return {
            name: {"graphs": family.graphs, "bytes": family.taken_bytes, "seconds": family.seconds}
            for name, family in self.families.items()
        }

    def _compare(self) -> None:
        """A graph that one family lacks would be captured, or run eagerly, in the middle of service."""
        (first_name, first), *others = self.families.items()
        expected = {holder.key: (holder, set(graphs)) for holder, graphs in first.dictionaries if graphs}
        for name, family in others:
            found = {holder.key: (holder, set(graphs)) for holder, graphs in family.dictionaries if graphs}
            for key in expected.keys() | found.keys():
                holder, wanted = expected.get(key, (None, set()))
                other_holder, present = found.get(key, (holder, set()))
                if difference := wanted ^ present:
                    raise GraphFamilyError(
                        f"plans {first_name} and {name} differ in {len(difference)} CUDA graphs of "
                        f"{other_holder}, the first for {next(iter(difference))}; this vLLM captures "
                        f"in a way that is not known here: {_REMEDY}"
                    )


def estimated_bytes(plans: int, sizes: int, layers: int) -> int:
    """GPU memory of the families of `plans`, for `sizes` captured batch sizes of a model of `layers`.

    The activations in the pool, which all families share, and for each family a share of its own and what the
    driver keeps of each graph; a size has one graph between any two attention layers and one of the whole.
    Seen with Llama-3.1-8B on an H100 (vLLM 0.26, second-generation runner, two plans): 0.55, 0.81 and 1.28
    GiB for 9, 10 and 51 sizes, 1.16 for 51 with fused MLPs; this gives 0.82, 0.83 and 1.28.
    """
    graphs = sizes * (layers + 2)
    return _POOL_BYTES + plans * (_FAMILY_BYTES + graphs * _GRAPH_BYTES)
