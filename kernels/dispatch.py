"""From mode, shape, dtype and device to a backend and its configuration: pure, total, testable anywhere.

The configuration of a GPU kernel comes from a table in `tables/`, written by `nestedfp tune kernels` on
the device it names. An architecture has one, and another device of it may have its own, whose rows go
before. What the tables do not hold, another weight or another number of tokens, takes the
kernel's own rule (configuration None): tiles that fill the waves of one shape may leave half of the next
one's last wave idle, so a neighbour's entry says little. No shape is an error.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import torch

from nestedfp.kernels.layout import PANEL, KOrder
from nestedfp.kernels.rowfile import slug

Config = Mapping[str, int]
Kind = TypeVar("Kind")

TABLES = resources.files("nestedfp.kernels") / "tables"

# The bulk copy engine needs base addresses and row pitches in multiples of 16 bytes.
TMA_ALIGNMENT = 16
# Up to so many tokens a row serves those below it.
_FEW_TOKENS = 64


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


def choose(problem: Problem, capability: Capability | None, device: str = "") -> Choice:
    """The backend and configuration for `problem` on a CUDA device of `capability`, or None for a CPU.

    device: its name, as torch gives it; without one only the table of the architecture serves.
    """
    backend = choose_backend(problem, capability)
    if backend is Backend.CPU or capability is None:
        return Choice(backend, None)
    return Choice(backend, configuration(backend, problem, capability, device))


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


def configuration(
    backend: Backend, problem: Problem, capability: Capability, device: str = ""
) -> Config | None:
    """The tabled configuration for `problem`, or None for the kernel's own rule."""
    rows = rows_of(backend, capability, problem.mode, problem.dtype, problem.N, problem.K, device)
    return holding(rows, problem.M)


@lru_cache(maxsize=4096)
def rows_of(
    backend: Backend, capability: Capability, mode: Mode, dtype: str, N: int, K: int, device: str = ""
) -> list[TableRow]:
    """The rows of a weight, ascending in M: those of the dtype, or where there are none the other one's."""
    rows = [row for row in table(backend, capability, device) if (row.mode, row.N, row.K) == (mode, N, K)]
    return sorted([row for row in rows if row.dtype == dtype] or rows, key=lambda row: row.M)


def holding(rows: list[TableRow], M: int) -> Config | None:
    """The configuration for M tokens among a weight's `rows`, ascending in M, or None.

    Of few tokens a product's time is that of its bytes, whatever the tile: the next larger row serves.
    """
    at = bisect_left(rows, M, key=lambda row: row.M)
    if at == len(rows) or (rows[at].M != M and rows[at].M > _FEW_TOKENS):
        return None
    return rows[at].config


def token_grid(largest: int) -> list[int]:
    """Numbers of tokens, ascending, up to the first from `largest` on: multiples of 16, and of a quarter of
    the power of two below them."""
    grid = [16]
    while grid[-1] < largest:
        grid.append(grid[-1] + max(16, 1 << grid[-1].bit_length() >> 3))
    return grid


@cache
def table(backend: Backend, capability: Capability, device: str = "") -> tuple[TableRow, ...]:
    """The tuned rows for a backend and a device, its own before those of its architecture; empty where none
    were made."""
    found: dict[tuple[Mode, str, int, int, int], TableRow] = {}
    for name in dict.fromkeys(table_name(backend, capability, which) for which in ("", device)):
        path = TABLES / name
        rows = parse_table(json.loads(path.read_text())) if path.is_file() else ()
        found |= {(row.mode, row.dtype, row.M, row.N, row.K): row for row in rows}
    return tuple(found.values())


def table_name(backend: Backend, capability: Capability, device: str = "") -> str:
    """The file of an architecture's table, or of a device's own."""
    own = f"-{slug(device)}" if device else ""
    return f"{backend}-sm{capability[0]}{capability[1]}{own}.json"


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
