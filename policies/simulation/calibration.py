"""The simulated engine against measured ones: step costs fitted to the cells of an engine benchmark.

A cell is a batch of equal requests, with its throughput and the medians of its requests' TTFT and TPOT. The
benchmark hands all of them over one after another before the first step, each at its own time of arrival, so
half of that is part of the median TTFT. The simulator serves the same batch with the same limits; the costs
are fitted so that its three figures meet the measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import Slo
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.roofline import KV_CAPACITY_TOKENS, latency_model
from nestedfp.policies.simulation.cluster import Cluster
from nestedfp.policies.simulation.state import Columns, EngineSettings
from nestedfp.policies.simulation.summary import tpot_s, ttft_s

_COSTS: Final = ("overhead_s", "weights_s", "token_s", "sequence_s", "context_token_s", "pair_s")
_FIRST_STEP, _LAST_STEP = 1.4, 1.02
_BLOCK_TOKENS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured batch; times in seconds. kv_tokens: what the engine's KV cache held."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    kv_tokens: int = KV_CAPACITY_TOKENS
    tokens_per_s: float
    ttft_s: float
    tpot_s: float

    def figures(self) -> tuple[float, float, float]:
        return self.tokens_per_s, self.ttft_s, self.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of the measured engine: tokens of a step, and requests in a batch."""

    chunk_tokens: int
    max_sequences: int = 512


class Host(NamedTuple):
    """What the benchmark's host adds: a first token takes so long beside its steps, and each request of a
    batch so long to be handed over."""

    first_token_s: float
    request_s: float


_NO_HOST: Final = Host(0.0, 0.0)
_FIRST_HOST: Final = Host(first_token_s=0.005, request_s=0.0002)


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs of steps and of the host, and by cell the relative error of throughput, TTFT and TPOT: model over
    measured, less one."""

    costs: StepCosts
    host: Host
    errors: tuple[tuple[float, float, float], ...]

    @property
    def worst(self) -> float:
        return max(abs(error) for cell in self.errors for error in cell)


def limits_of(benchmark: Mapping[str, Any]) -> Limits:
    """The limits in a file of ``nestedfp bench engine``; raises :class:`InvalidField` where it is none."""
    settings = _entry(benchmark, "", "settings", Mapping)
    chunk_tokens = _entry(settings, "settings.", "max_num_batched_tokens", int)
    return Limits(chunk_tokens=chunk_tokens, max_sequences=_entry(settings, "settings.", "max_num_seqs", int))


def cells_of(benchmark: Mapping[str, Any], contender: str, dtype: str) -> list[Cell]:
    """The cells of one contender and dtype in such a file, without those that lack a figure."""
    return [
        Cell(
            batch=checks.integer("batch", row["batch"], minimum=1),
            prompt_tokens=row["input_len"],
            output_tokens=row["output_len"],
            kv_tokens=_BLOCK_TOKENS * checks.integer("kv_blocks", row.get("kv_blocks"), minimum=1),
            tokens_per_s=row["tokens_per_s"],
            ttft_s=1e-3 * row["ttft_ms"],
            tpot_s=1e-3 * row["tpot_ms"],
        )
        for row in _entry(benchmark, "", "rows", list)
        if (row.get("contender"), row.get("dtype")) == (contender, dtype)
        and row.get("ttft_ms")
        and row.get("tpot_ms")
        and row["output_len"] > 1
    ]


def errors_of(costs: StepCosts, cells: Sequence[Cell], limits: Limits, host: Host = _NO_HOST) -> Fit:
    """How far the simulated engine is from the measured cells with these costs."""
    return Fit(costs, host, tuple(_errors(costs, cell, limits, host) for cell in cells))


def calibrate(
    start: StepCosts, cells: Sequence[Cell], limits: Limits, heard: Callable[[Fit], None] = lambda _: None
) -> Fit:
    """What brings the simulated engine closest to the cells, by coordinate descent on logarithms.

    ``heard`` is told the best so far after every round. Raises :class:`InvalidField` without cells.
    """
    if not cells:
        raise InvalidField("cells", 0, "give at least one measured cell")
    best = errors_of(start, cells, limits, _FIRST_HOST)
    step = _FIRST_STEP
    while step > _LAST_STEP:
        improved = False
        for name in (*_COSTS, *Host._fields):
            for factor in (step, 1.0 / step):
                costs, host = best.costs, best.host
                if name in Host._fields:
                    host = host._replace(**{name: getattr(host, name) * factor})
                else:
                    costs = replace(costs, **{name: getattr(costs, name) * factor})
                trial = errors_of(costs, cells, limits, host)
                if _loss(trial) < _loss(best):
                    best, improved = trial, True
        heard(best)
        if not improved:
            step = math.sqrt(step)
    return best


def measured_engine(
    benchmark: Mapping[str, Any], dtype: str = "float16", say: Callable[[str], None] = lambda _: None
) -> EngineSettings:
    """A simulated engine with the step times of the measured one; other limits stay the simulator's own.

    ``say`` is told how far the fit is. Raises :class:`InvalidField` where the file has no cells of both
    precisions in ``dtype``.
    """
    limits = limits_of(benchmark)
    costs: dict[str, StepCosts] = {}
    for mode, contender in ((FP16, "nestedfp-16bit"), (FP8, "nestedfp-fp8")):
        cells = cells_of(benchmark, contender, dtype)
        if not cells:
            raise InvalidField(f"rows of {contender} in {dtype}", 0, "measure them: nestedfp bench engine")
        fitting = f"fitting the step times of {mode} to {len(cells)} cells"

        def heard(fit: Fit, fitting: str = fitting) -> None:
            say(f"{fitting}: {100 * fit.worst:.0f} % off at most")

        costs[mode] = calibrate(latency_model().of(mode), cells, limits, heard).costs
    names = sorted({row["model"] for row in benchmark["rows"]})
    device, date = (_entry(benchmark, "", name, str) for name in ("device", "date"))
    source = f"{', '.join(names)} on {device}, {date[:10]}"
    label = f"simulated: step times fitted to {source}"
    return EngineSettings(model=LatencyModel(costs=costs), label=label)


def _entry(block: Mapping[str, Any], place: str, name: str, kind: type) -> Any:
    """What a file of ``nestedfp bench engine`` has under this name; InvalidField in any other file."""
    value = block.get(name)
    if not isinstance(value, kind):
        raise InvalidField(f"{place}{name}", value, "give a file that `nestedfp bench engine` has written")
    return value


def _loss(fit: Fit) -> float:
    return sum(error * error for cell in fit.errors for error in cell)


def _errors(costs: StepCosts, cell: Cell, limits: Limits, host: Host) -> tuple[float, float, float]:
    model = LatencyModel(costs={FP16: costs, FP8: costs}, chunk_tokens=limits.chunk_tokens)
    settings = EngineSettings(
        model=model,
        max_sequences=limits.max_sequences,
        kv_tokens=cell.kv_tokens,
        noise=0.0,
        flip_s=0.0,
    )
    load = Columns(
        np.zeros(cell.batch),
        np.full(cell.batch, cell.prompt_tokens, dtype=np.int32),
        np.full(cell.batch, cell.output_tokens, dtype=np.int32),
        np.zeros(cell.batch, dtype=np.bool_),
    )
    cluster = Cluster(load, 1, settings, seed=0, slo=Slo())
    while cluster.busy:
        cluster.tick(cluster.now + 60.0)
    requests = cluster.requests
    handed_over_s = cell.batch * host.request_s
    seconds = handed_over_s + host.first_token_s + float(requests["finish_s"].max())
    figures = (
        cell.batch * cell.output_tokens / seconds,
        handed_over_s / 2 + host.first_token_s + float(np.median(ttft_s(requests))),
        float(np.median(tpot_s(requests))),
    )
    first, second, third = (ours / theirs - 1.0 for ours, theirs in zip(figures, cell.figures(), strict=True))
    return first, second, third
