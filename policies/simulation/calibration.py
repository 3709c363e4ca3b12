"""The simulated engine against measured ones: step costs fitted to the cells of an engine benchmark.

A cell is a batch of equal requests sent at once, with its throughput, mean TTFT and mean TPOT. The simulator
serves the same batch; the costs are fitted so that its three figures meet the measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import Slo
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.simulation.cluster import Cluster
from nestedfp.policies.simulation.state import Columns, EngineSettings
from nestedfp.policies.simulation.summary import tpot_s, ttft_s

FITTED: Final = ("overhead_s", "weights_s", "token_s", "sequence_s")
_FIRST_STEP, _LAST_STEP = 1.4, 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured batch; times in seconds."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_s: float
    ttft_s: float
    tpot_s: float

    def figures(self) -> tuple[float, float, float]:
        return self.tokens_per_s, self.ttft_s, self.tpot_s


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs, and the relative error of each cell's throughput, TTFT and TPOT, model over measured - 1."""

    costs: StepCosts
    errors: tuple[tuple[float, float, float], ...]

    @property
    def worst(self) -> float:
        return max(abs(error) for cell in self.errors for error in cell)


def cells_of(benchmark: Mapping[str, Any], contender: str) -> list[Cell]:
    """The cells of one contender in a file of ``nestedfp bench engine``, without those that lack a figure."""
    return [
        Cell(
            batch=int(checks.integer("batch", row["batch"], minimum=1)),
            prompt_tokens=row["input_len"],
            output_tokens=row["output_len"],
            tokens_per_s=row["tokens_per_s"],
            ttft_s=1e-3 * row["ttft_ms"],
            tpot_s=1e-3 * row["tpot_ms"],
        )
        for row in benchmark["rows"]
        if row["contender"] == contender
        and row.get("ttft_ms")
        and row.get("tpot_ms")
        and row["output_len"] > 1
    ]


def errors_of(costs: StepCosts, cells: Sequence[Cell], chunk_tokens: int) -> Fit:
    """How far the simulated engine is from the measured cells with these costs."""
    return Fit(costs, tuple(_errors(costs, cell, chunk_tokens) for cell in cells))


def calibrate(start: StepCosts, cells: Sequence[Cell], chunk_tokens: int) -> Fit:
    """Costs that bring the simulated engine closest to the cells, by coordinate descent on their logarithms.

    Context and attention terms keep the values of ``start``: cells of one length cannot tell them apart.
    Raises :class:`InvalidField` without cells.
    """
    if not cells:
        raise InvalidField("cells", 0, "give at least one measured cell")
    best = errors_of(start, cells, chunk_tokens)
    step = _FIRST_STEP
    while step > _LAST_STEP:
        improved = False
        for name in FITTED:
            for factor in (step, 1.0 / step):
                costs = replace(best.costs, **{name: getattr(best.costs, name) * factor})
                trial = errors_of(costs, cells, chunk_tokens)
                if _loss(trial) < _loss(best):
                    best, improved = trial, True
        if not improved:
            step = math.sqrt(step)
    return best


def _loss(fit: Fit) -> float:
    return sum(error * error for cell in fit.errors for error in cell)


def _errors(costs: StepCosts, cell: Cell, chunk_tokens: int) -> tuple[float, float, float]:
    model = LatencyModel(costs={FP16: costs, FP8: costs}, chunk_tokens=chunk_tokens)
    settings = EngineSettings(model=model, max_sequences=max(256, cell.batch), noise=0.0, flip_s=0.0)
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
    made = cell.batch * cell.output_tokens / float(requests["finish_s"].max())
    figures = (made, float(ttft_s(requests).mean()), float(tpot_s(requests).mean()))
    first, second, third = (ours / theirs - 1.0 for ours, theirs in zip(figures, cell.figures(), strict=True))
    return first, second, third
