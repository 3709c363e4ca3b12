"""One minute of a trace: which requests of it are kept, what counts as a violating second, and which scale
makes static FP16 violate as many seconds as wanted.

A second violates if the 90th percentile of TPOT, over the requests that finish in it, exceeds 33 ms. It holds
a dozen requests, so one or two misses make the difference, and a minute repeated with other noise is off by
one or two violating seconds. So counts are medians of several runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np

from nestedfp.deployments.config import DeploymentSettings, SimulatedArguments
from nestedfp.deployments.signals import percentile
from nestedfp.deployments.simulated_engine import Generation, SimulatedEngine
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulation.state import EngineSettings, Workload

SECONDS: Final = 60
TPOT_LIMIT_S: Final = 0.033
WANTED_VIOLATIONS: Final = 19
_GOLDEN: Final = 0.5 * (math.sqrt(5.0) - 1.0)


class Minute(NamedTuple):
    """Requests by arrival, in seconds from the start."""

    arrival_s: Sequence[float]
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]


class Served(NamedTuple):
    """One finished request on the clock of the minute: when it came, and its tokens with their precision."""

    arrival_s: float
    token_s: Sequence[float]
    token_modes: Sequence[str]


def first_minute(trace: Workload) -> Minute:
    arrival_s = np.asarray(trace.arrival_s) - float(trace.arrival_s[0])
    inside = arrival_s < SECONDS
    lengths = (trace.prompt_tokens, trace.output_tokens)
    return Minute(arrival_s[inside].tolist(), *(np.asarray(column)[inside].tolist() for column in lengths))


def thinned(minute: Minute, scale: float) -> Minute:
    """Every request `scale` times on average, spread evenly: fewer below 1, some twice above.

    What one scale keeps, every larger one keeps too. Were other requests kept at each scale, their choice
    would move the violating seconds more than the scale does, up and down.
    """
    # Multiples of the golden ratio, modulo 1, leave no gap and no heap whatever part of them is taken.
    kept = [k for k in range(len(minute.arrival_s)) for _ in range(math.ceil(scale - k * _GOLDEN % 1.0))]
    return Minute(*([column[k] for k in kept] for column in minute))


def violating_seconds(served: Iterable[Served]) -> int:
    """Seconds of the minute in which the p90 TPOT of the requests that finish in it is over the limit."""
    tpot_s: list[list[float]] = [[] for _ in range(SECONDS)]
    for request in served:
        times = request.token_s
        if len(times) > 1 and 0 <= times[-1] < SECONDS:
            tpot_s[int(times[-1])].append((times[-1] - times[0]) / (len(times) - 1))
    return sum((percentile(values, 90.0) or 0.0) > TPOT_LIMIT_S for values in tpot_s)


def seconds_in_16_bits(served: Iterable[Served]) -> dict[str, float]:
    """How much of the minute ran in 16 bits, by the steps that gave out tokens.

    `only`: seconds without an FP8 step; `mostly`: seconds with more time in 16-bit steps than in FP8 ones (an
    idle second counts for both); `time_share`: of all time in steps.
    """
    steps = sorted({(at, mode) for request in served for at, mode in zip(*request[1:], strict=True)})
    spent = {FP16: np.zeros(SECONDS), FP8: np.zeros(SECONDS)}
    before = 0.0
    for at, mode in steps:
        if 0 <= at < SECONDS:
            spent[mode][int(at)] += at - max(before, math.floor(at))
            before = at
    total = sum(float(column.sum()) for column in spent.values())
    return {
        "only": int((spent[FP8] == 0).sum()),
        "mostly": int((spent[FP16] >= spent[FP8]).sum()),
        "time_share": float(spent[FP16].sum()) / max(total, 1e-9),
    }


def summary(served: Sequence[Served]) -> dict[str, Any]:
    ttft_s = [request.token_s[0] - request.arrival_s for request in served]
    modes = [mode for request in served for mode in request.token_modes]
    return {
        "requests": len(served),
        "violating_seconds": violating_seconds(served),
        "seconds_in_fp16": seconds_in_16_bits(served),
        "output_tokens_in_fp16": modes.count(FP16) / max(1, len(modes)),
        "ttft_p90_s": percentile(ttft_s, 90.0),
    }


class _Steps:
    """A clock that jumps from arrival to arrival."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def alone(minute: Minute, settings: DeploymentSettings, mode: str, seed: int) -> list[Served]:
    """The minute served by the engine alone in one mode, without Ray and without waiting."""
    given = SimulatedArguments.from_dict(settings.engine.arguments)
    clock = _Steps()
    engine = SimulatedEngine(
        EngineSettings(
            model=settings.policy.latency or latency_model(given.max_num_batched_tokens),
            max_sequences=given.max_num_seqs,
            kv_tokens=given.kv_tokens,
        ),
        places=len(minute.arrival_s),
        seed=seed,
        clock=clock,
    )
    engine.set_target(mode, epoch=1, reason="static", limits=None)
    served: list[Generation] = []
    for arrival_s, prompt, output in zip(*minute, strict=True):
        clock.now = arrival_s
        served.append(engine.submit(prompt, output, strict=False))
    clock.now = 10.0 * SECONDS
    engine.catch_up()
    return [Served(one.arrival_s, one.token_s, one.token_modes) for one in served]


def as_arrived(minute: Minute, served: Sequence[Served]) -> Minute:
    """The minute with its requests at the times at which the engine got them."""
    rows = sorted((one.arrival_s, *lengths) for one, *lengths in zip(served, *minute[1:], strict=True))
    return Minute(*(list(column) for column in zip(*rows, strict=True)))


def scale_for(
    violations: Callable[[float], float], *, first: float, stride: float, within: float, tries: int
) -> float:
    """The scale at which static FP16 violates the wanted number of seconds, give or take `within`.

    From `first` on by factors of `stride` until two scales have it between them, then by halves; after
    `tries` scales, the one that came nearest.
    """
    low, high = 0.0, math.inf
    scale, best = first, (math.inf, first)
    for _ in range(tries):
        missed = violations(scale) - WANTED_VIOLATIONS
        best = min(best, (abs(missed), scale))
        if abs(missed) <= within:
            break
        low, high = (scale, high) if missed < 0 else (low, scale)
        if low == 0.0:
            scale /= stride
        elif math.isinf(high):
            scale *= stride
        else:
            scale = 0.5 * (low + high)
    return best[1]


def counts(runs: Sequence[Mapping[str, Any]], scale: float) -> dict[str, dict[str, Any]]:
    """By policy the violating seconds of its runs at `scale` that count, and those mostly in 16 bits.

    Of each the count of every run and their median.
    """
    by_policy: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["scale"] == scale and run["counted"]:
            by_policy.setdefault(run["policy"], []).append(run)
    return {
        policy: {
            "violating_seconds": _spread(run["violating_seconds"] for run in its),
            "seconds_mostly_in_fp16": _spread(run["seconds_in_fp16"]["mostly"] for run in its),
        }
        for policy, its in by_policy.items()
    }


def _spread(values: Iterable[int]) -> dict[str, Any]:
    every = list(values)
    return {"median": median(every), "runs": every}
