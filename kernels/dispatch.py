"""From mode, shape, dtype and device to a backend and its configuration: pure, total, testable anywhere.

The configuration of a GPU kernel comes from a table in `tables/`, written by `nestedfp tune kernels` on
the device it names. A shape the table does not hold takes the entry of the nearest one; a device without
a table takes the kernel's own rule (configuration None). No shape is an error.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from importlib import resources
from math import log2
from typing import Any, NamedTuple, TypeVar

import torch

from nestedfp.kernels.layout import PANEL, KOrder

Config = Mapping[str, int]
Kind = TypeVar("Kind")

# The bulk copy engine needs base addresses and row pitches in multiples of 16 bytes.
TMA_ALIGNMENT = 16


class Mode(StrEnum):
    """Which product: `BITS16` rebuilds 16-bit weights, `FP8` reads the upper bytes alone."""

    BITS16 = "16-bit"
    FP8 = "fp8"


class Backend(StrEnum):
    """A subpackage of `nestedfp.kernels` with `linear_16bit` and `linear_fp8`."""

    CPU = "cpu"
    HOPPER = "hopper"
    PORTABLE = "portable"


class Problem(NamedTuple):
    """One product. dtype: "float16" or "bfloat16". tma: x and the weight are laid out for bulk copies."""

    mode: Mode
    M: int
    N: int
    K: int
    dtype: str
    order: KOrder
    tma: bool = True


class Choice(NamedTuple):
    """The backend to call, and its configuration; None leaves that to the kernel's own rule."""

    backend: Backend
    config: Config | None


@dataclass(frozen=True)
class TableRow:
    """The best configuration found for one shape; `us` is what it took on the table's device, as the header's
    `method` says, with the kernel of its day: it compares with no other row."""

    mode: Mode
    dtype: str
    M: int
    N: int
    K: int
    us: float
    config: Config


Capability = tuple[int, int]


def choose(problem: Problem, capability: Capability | None) -> Choice:
    """The backend and configuration for `problem` on a CUDA device of `capability`, or None for a CPU."""
    backend = choose_backend(problem, capability)
    if backend is Backend.CPU or capability is None:
        return Choice(backend, None)
    return Choice(backend, configuration(backend, problem, capability))


def choose_backend(problem: Problem, capability: Capability | None) -> Backend:
    """Hopper's kernels for what they can address, the portable ones for everything else with a GPU."""
    if capability is None:
        return Backend.CPU
    if capability != (9, 0) or not problem.tma:
        return Backend.PORTABLE
    fits = problem.order is KOrder.HOPPER
    if problem.mode is Mode.FP8:
        fits = problem.K % TMA_ALIGNMENT == 0
    return Backend.HOPPER if fits else Backend.PORTABLE


def preferred_order(device: torch.device | str, N: int, K: int) -> KOrder:
    """The order in which `device` wants the columns of a [N, K] weight stored."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and K % PANEL == 0:
        return KOrder.HOPPER
    return KOrder.NATURAL


def configuration(backend: Backend, problem: Problem, capability: Capability) -> Config | None:
    """The tabled configuration of the shape nearest to `problem`, or None without a table."""
    rows = rows_near(backend, capability, problem.mode, problem.dtype, problem.N, problem.K)
    return holding(rows, problem.M).config if rows else None


@lru_cache(maxsize=4096)
def rows_near(
    backend: Backend, capability: Capability, mode: Mode, dtype: str, N: int, K: int
) -> list[TableRow]:
    """The rows for the nearest N and K: serving meets few weights and many numbers of tokens."""
    rows = [row for row in table(backend, capability) if row.mode is mode]
    return nearest([row for row in rows if row.dtype == dtype] or rows, N, K)


def nearest(rows: list[TableRow], N: int, K: int) -> list[TableRow]:
    """The rows whose N and K are nearest, by the sum of their distances in octaves; ascending in M.

    N and K come first since they fix how many tiles a matrix gives and how long each runs.
    """

    def distance(row: TableRow) -> float:
        return abs(log2(row.N / N)) + abs(log2(row.K / K))

    shortest = min(map(distance, rows), default=0.0)
    return sorted((row for row in rows if distance(row) == shortest), key=lambda row: row.M)


def holding(rows: list[TableRow], M: int) -> TableRow:
    """Of `rows`, ascending in M and not empty, the first that holds M tokens, or the last.

    Tiles are cut for so many tokens: one that is too wide wastes less than one that must run twice.
    """
    return rows[min(bisect_left(rows, M, key=lambda row: row.M), len(rows) - 1)]


@cache
def table(backend: Backend, capability: Capability) -> tuple[TableRow, ...]:
    """The tuned rows for a backend and an architecture, empty where none were made."""
    name = f"{backend}-sm{capability[0]}{capability[1]}.json"
    path = resources.files("nestedfp.kernels") / "tables" / name
    return parse_table(json.loads(path.read_text())) if path.is_file() else ()


@lru_cache(maxsize=1024)
def parsed(kind: Callable[..., Kind], *settings: tuple[str, int]) -> Kind:
    """The items of a configuration as a kernel's own kind of it: the same few for every launch."""
    return kind(**dict(settings))


def parse_table(data: dict[str, Any]) -> tuple[TableRow, ...]:
    """The rows of a table file, whose layout `nestedfp.kernels.tune` documents."""
    return tuple(
        TableRow(Mode(row["mode"]), row["dtype"], row["M"], row["N"], row["K"], row["us"], row["config"])
        for row in data["rows"]
    )
