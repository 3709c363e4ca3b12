"""Times of GPU work under CUDA graphs: contenders interleaved, inputs rotated past the L2 cache.

A contender is a function of the index of an input set. A graph holds at least one call for each set, so that
a weight is read again only after all the others; the host's launch cost does not enter.

A device at its power limit slows its clock some milliseconds after the work that is to blame. So each pass
visits the contenders in another order, lest one always pays for the same neighbour; and where a contender is
to pay for its own energy alone, it runs for `settle_us` before it is timed for as long.
"""

import math
import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import torch

Contender = Callable[[int], object]

# Enough sets that their sum is well past the 50 MB of an H100's L2.
ROTATED_BYTES = 160 << 20
_WARM_UP_CALLS = 3


def copies_past_cache(bytes_per_set: int) -> int:
    """How many sets of inputs of `bytes_per_set` to rotate through."""
    return max(2, -(-ROTATED_BYTES // bytes_per_set))


def capture(contender: Contender, sets: int, calls: int, *, warm_up: int = 0) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls, walking through the sets, after `warm_up` calls outside it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(warm_up):
            contender(i % sets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            contender(i % sets)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int, repeats: int, unmeasured: int = 1) -> float:
    """Median microseconds a call over `repeats` replays, after `unmeasured` others."""
    events: list[Any] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(repeats + 1)
    ]
    for _ in range(unmeasured):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    times: list[float] = [a.elapsed_time(b) * 1e3 / calls for a, b in pairwise(events)]
    return median(times)


def sized_graph(contender: Contender, sets: int, graph_us: float) -> tuple[torch.cuda.CUDAGraph, int, float]:
    """A graph of about `graph_us` of work, or one call for each set where that takes longer; its calls, and
    roughly what a replay takes in microseconds."""
    graph = capture(contender, sets, sets, warm_up=_WARM_UP_CALLS)
    once_us = replay_us(graph, sets, 1) * sets
    rounds = round(graph_us / once_us)
    if rounds < 2:
        return graph, sets, once_us
    return capture(contender, sets, sets * rounds), sets * rounds, once_us * rounds


def measure(
    contenders: Mapping[str, Contender],
    sets: int,
    *,
    passes: int = 5,
    repeats: int = 3,
    graph_us: float = 400.0,
    settle_us: float = 0.0,
) -> dict[str, list[float]]:
    """Microseconds a call of each contender, one number a pass. Every pass visits all of them, in an order
    drawn anew; each runs for `settle_us`, then is timed for as long and for `repeats` graphs at least."""
    graphs = {name: sized_graph(contender, sets, graph_us) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, draw = list(graphs), random.Random(0)
    for _ in range(passes):
        draw.shuffle(order)
        for name in order:
            graph, calls, us = graphs[name]
            settle = math.ceil(settle_us / us)
            times[name].append(replay_us(graph, calls, max(repeats, settle), max(1, settle)))
    return times
