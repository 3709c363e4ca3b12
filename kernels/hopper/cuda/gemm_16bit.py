"""The 16-bit product on Hopper in CUDA C++: see gemm_16bit.cu for what the kernel does.

With NESTEDFP_BOUNDED_WAITS=1 in the environment a wait inside the kernel of millions of polls ends it with
an error: for trying out changes, since other work on the device may rightly make a wait long.
"""

import ctypes
import os
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import cache, lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from nestedfp.kernels.gated import output_columns
from nestedfp.kernels.hopper.cuda.compile import cubin
from nestedfp.kernels.hopper.cuda.launch import (
    NO_MAP,
    Kernel,
    Launch,
    Planes,
    address,
    ahead_of,
    planes_of,
    tensor_map,
)
from nestedfp.kernels.hopper.cuda.wgmma import wgmma_header
from nestedfp.kernels.hopper.workspace import SCRATCH_COUNTERS, SCRATCH_FLOATS, workspace

# Of a multiprocessor; each CTA also costs 1 KiB that the system keeps.
SHARED_MEMORY = 228 * 1024
_SYSTEM_SHARE = 1024
_STEP = 64
_UNIT = 128
_MOST_STAGES = 16
# Of y that a warpgroup stores: a line of 128 bytes, of gated products half of one.
_ROWS = 64
# Measured: from here on the copy engine stores y as fast as threads or faster.
_LEAST_TOKENS_SENT = 512
# Of the 65,536 registers: what (producer, consumer) threads get, by consumer warpgroups, at one CTA.
_REGISTERS = {1: (0, 0), 2: (40, 232), 3: (32, 160), 4: (24, 112)}
# The same for two warpgroups with the sums of more tokens than one product takes.
_MOST_REGISTERS = (24, 240)
_MOST_TOKENS_A_PRODUCT = 256
# Tokens up to which two sets of weights fit a consumer's registers beside its sums.
_TWO_SETS = {1: 256, 2: 256, 3: 144, 4: 0}
# Tokens up to which a lone warpgroup gains from loading bytes ahead.
_MOST_TOKENS_AHEAD = 96


@dataclass(frozen=True)
class Config:
    """One way to cut the product.

    A tile has 64 weight rows for each of its `warpgroups` by `tokens`, a multiple of 16, above 256 for two
    warpgroups alone; with sliced_k 2 two warpgroups have 64 rows together, take turns in K, and `tokens` is a
    multiple of 32. cluster_tokens, cluster_rows: CTAs of a cluster along each. ctas: programs a
    multiprocessor. split: parts into which K is cut in the tiles that do not fill a wave, and in those of
    `waves` full waves beside them; cluster_k 2: there are two, and the two halves of a cluster, each of
    cluster_tokens by cluster_rows CTAs, exchange their sums directly. group: token tiles that run side by
    side.
    """

    tokens: int
    warpgroups: int = 2
    cluster_tokens: int = 1
    cluster_rows: int = 1
    ctas: int = 1
    split: int = 1
    waves: int = 0
    group: int = 8
    sliced_k: int = 1
    cluster_k: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups // self.sliced_k

    @property
    def worker(self) -> int:
        """CTAs that share panels of x or weights, and a place in the schedule."""
        return self.cluster_tokens * self.cluster_rows

    @property
    def cluster(self) -> int:
        return self.worker * self.cluster_k

    @property
    def slice(self) -> int:
        """Tokens of the output that a warpgroup stages at once; from three warpgroups on, one more stage of
        weights is worth more than longer slices."""
        return gcd(self.tokens // self.sliced_k, 32 if self.warpgroups < 3 else 16)

    @property
    def products(self) -> int:
        """wgmma instructions that share the 16 of K and 64 rows of a step: one takes 256 tokens at most."""
        return ceil_div(self.tokens, _MOST_TOKENS_A_PRODUCT)

    @property
    def x_boxes(self) -> int:
        """Copies that a CTA makes for a stage of x, of 256 tokens at most."""
        return ceil_div(self.tokens // self.cluster_rows, _MOST_TOKENS_A_PRODUCT)

    def x_copies(self, M: int) -> tuple[int, int]:
        """Tokens in a copy of x, and the bytes of all copies of a stage. The copy engine is slow where a
        box reaches past the last token."""
        boxes = self.cluster_rows * self.x_boxes
        box = self.tokens // boxes if boxes > 1 else min(self.tokens, M)
        return box, 2 * _STEP * box * boxes

    @property
    def _x_bytes(self) -> int:
        return 2 * _STEP * self.tokens

    @property
    def _weight_bytes(self) -> int:
        return 2 * _UNIT * self.rows

    @property
    def _slice_bytes(self) -> int:
        """Of a staged slice of every warpgroup."""
        return 128 * self.slice * self.warpgroups

    @property
    def _least_slices(self) -> int:
        """That a warpgroup stages; to exchange sums of K in turns each warp takes 2 KiB of it."""
        return 2 if self.sliced_k == 1 else 64 // self.slice

    @property
    def _pair_bytes(self) -> int:
        """Barriers of CTAs that exchange sums: for a warp's slices, every second one, and two more."""
        slices = ceil_div(self.tokens // self.sliced_k // self.slice, 2)
        return 8 * (4 * self.warpgroups * slices + 2) if self.cluster_k > 1 else 0

    @property
    def _room(self) -> int:
        """For stages and slices."""
        fixed = _SYSTEM_SHARE + self._pair_bytes + 32 * _MOST_STAGES
        return SHARED_MEMORY // self.ctas - fixed

    @property
    def stages(self) -> tuple[int, int]:
        """Of x, 64 of K each, and of weights, 128 each: equally far ahead, what is left to either."""
        room = self._room - self._least_slices * self._slice_bytes
        weights = min(room // (self._weight_bytes + 2 * self._x_bytes), _MOST_STAGES // 2)
        room -= weights * (self._weight_bytes + 2 * self._x_bytes)
        more = weights < _MOST_STAGES // 2 and room >= self._weight_bytes
        room -= more * self._weight_bytes
        return 2 * weights + (room >= self._x_bytes), weights + more

    @property
    def slices(self) -> int:
        """That a warpgroup has room to stage: what the stages leave, up to all of a tile's."""
        x, weights = self.stages
        left = self._room - x * self._x_bytes - weights * self._weight_bytes
        return max(
            min(left // self._slice_bytes, self.tokens // self.sliced_k // self.slice), self._least_slices
        )

    @property
    def shared_memory(self) -> int:
        x, weights = self.stages
        stages = x * (self._x_bytes + 16) + weights * (self._weight_bytes + 16)
        return stages + self.slices * self._slice_bytes + self._pair_bytes

    def defines(self, dtype: torch.dtype, gated: bool = False) -> dict[str, int]:
        """The macros of gemm_16bit.cu."""
        x_stages, weight_stages = self.stages
        producer, consumer = _REGISTERS[self.warpgroups] if self.ctas == 1 else (0, 0)
        if self.products > 1:
            producer, consumer = _MOST_REGISTERS
        return {
            "CONSUMERS": self.warpgroups,
            "TOKENS": self.tokens,
            "SLICE": self.slice,
            "SLICED_K": self.sliced_k,
            "WARP_BYTES": 32 * self.slice * self.slices,
            "X_STAGES": x_stages,
            "WEIGHT_STAGES": weight_stages,
            "MMAS": self.products,
            "X_BOXES": self.x_boxes,
            "SETS": 2 if self.sliced_k == 1 and self.tokens <= _TWO_SETS[self.warpgroups] else 1,
            "CLUSTER_TOKENS": self.cluster_tokens,
            "CLUSTER_ROWS": self.cluster_rows,
            "CLUSTER_K": self.cluster_k,
            "CTAS": self.ctas,
            "BFLOAT16": int(dtype is torch.bfloat16),
            "GATED": int(gated),
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
            "AHEAD": int(self.warpgroups == 1 and self.ctas == 1 and self.tokens <= _MOST_TOKENS_AHEAD),
            "BOUNDED": int(os.environ.get("NESTEDFP_BOUNDED_WAITS") == "1"),
        }

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How a launch shares its tiles among `clusters`: K of the first `cut` of them in `parts` parts."""

    clusters: int
    cut: int
    parts: int


def plan(config: Config, M: int, N: int, K: int, resident: int) -> Plan:
    """For a device that holds `resident` clusters at once; no parts without work, or without scratch."""
    tiles = cluster_tiles(config, M, N)
    # CTAs that share K are in one cluster and take tiles of their own.
    wave = resident * config.cluster_k
    cut = min(tiles % wave + config.waves * wave, tiles)
    if config.cluster_k > 1:
        cut = cut if config.cluster_k <= K // _UNIT else 0
        parts = config.cluster_k if cut else 1
    else:
        tile_floats = config.cluster * config.rows * config.tokens
        parts = min(config.split, K // _UNIT, SCRATCH_FLOATS // (tile_floats * max(cut, 1)))
        if not cut or parts < 2 or cut * config.cluster * config.warpgroups > SCRATCH_COUNTERS:
            cut, parts = 0, 1
    busy = max(ceil_div(cut * parts, config.cluster_k), ceil_div(tiles - cut, config.cluster_k))
    return Plan(min(resident, busy), cut, parts)


def cluster_tiles(config: Config, M: int, N: int) -> int:
    """Tiles of whole clusters that cover [M, N]."""
    along_tokens = ceil_div(M, config.tokens * config.cluster_tokens)
    return along_tokens * ceil_div(N, config.rows * config.cluster_rows)


def code(config: Config, dtype: torch.dtype, gated: bool = False) -> bytes:
    """The cubin of `config` for activations of `dtype`; `gated` as `nestedfp.kernels.gated` has it."""
    kind = "bf16" if dtype is torch.bfloat16 else "f16"
    headers = {"wgmma.cuh": wgmma_header(config.tokens // config.products, kind, a_in_registers=True)}
    return cubin("gemm_16bit.cu", headers, config.defines(dtype, gated))


@cache
def _kernel(config: Config, dtype: torch.dtype, gated: bool, device: int) -> Kernel:
    return Kernel(
        code(config, dtype, gated),
        "gemm_16bit",
        threads=(config.warpgroups + 1) * 128,
        shared=config.shared_memory,
        cluster=config.cluster,
    )


class Stores(IntEnum):
    """Who stores y, as in output_16bit.cuh: threads, one element at a time or eight, or the copy engine."""

    NARROW = 0
    WIDE = 1
    SENT = 2


def stores(config: Config, M: int, N: int) -> Stores:
    """The copy engine pays where there is much to store; of few tokens it would delay the end."""
    if N % 8:
        return Stores.NARROW
    return Stores.SENT if M >= _LEAST_TOKENS_SENT and config.slices > 2 else Stores.WIDE


class _Shape(NamedTuple):
    """All of a launch but where the operands lie. numbers: the kernel's parameters behind them; boxes in
    rows, y's 0 where threads store it."""

    kernel: Kernel
    clusters: int
    x_box: int
    weight_box: int
    y_box: int
    numbers: tuple[ctypes.c_int, ...]


@lru_cache(maxsize=4096)
def _shape(
    config: Config, M: int, N: int, K: int, dtype: torch.dtype, gated: bool, device: torch.device
) -> _Shape:
    kernel = _kernel(config, dtype, gated, device.index)
    cut = plan(config, M, N, K, kernel.resident_clusters)
    box, x_bytes = config.x_copies(M)
    who = stores(config, M, N)
    numbers = (M, N, K, config.group, cut.cut, cut.parts, x_bytes, who)
    weight_box = config.rows // config.cluster_tokens
    y_box = config.slice if who is Stores.SENT else 0
    return _Shape(kernel, cut.clusters, box, weight_box, y_box, tuple(map(ctypes.c_int, numbers)))


@lru_cache(maxsize=4096)
def _launch(
    config: Config, M: int, N: int, K: int, dtype: torch.dtype, gated: bool, device: torch.device,
    x: int, x_pitch: int, upper: int, lower: int, row_exponent: int, bias: int | None, y: int, ahead: Planes,
) -> Launch:  # fmt: skip
    """Of operands at these addresses; x_pitch in elements."""
    shape = _shape(config, M, N, K, dtype, gated, device)
    width, line = output_columns(N, gated), output_columns(_ROWS, gated)
    panels = (N * K // _UNIT, _UNIT, _UNIT, shape.weight_box, _UNIT)
    partials, counters = map(address, workspace(device))
    arguments = (
        tensor_map(dtype, x, M, K, x_pitch, shape.x_box, _STEP),
        tensor_map(torch.uint8, upper, *panels),
        tensor_map(torch.uint8, lower, *panels),
        tensor_map(dtype, y, M, width, width, shape.y_box, line) if shape.y_box else NO_MAP,
        *map(ctypes.c_void_p, (y, row_exponent, bias, partials, counters)),
        *shape.numbers,
        ahead_of(ahead),
    )
    return Launch(shape.kernel, shape.clusters, arguments, device.index)


def product(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
    ahead: tuple[Tensor, ...] = (),
    gated: bool = False,
) -> None:
    """Writes y [M, N], or [M, N / 2] if `gated`, contiguous, in x's dtype, on a 16-byte boundary if its rows
    are multiples of 16 bytes.

    x [M, K] has unit stride in K and rows on 16-byte boundaries; the planes are in `KOrder.HOPPER`. ahead:
    one plane or two that the next product reads.
    """
    (M, K), N = x.shape, upper.shape[0]
    where = (upper.data_ptr(), lower.data_ptr(), row_exponent.data_ptr(), address(bias), y.data_ptr())
    how = (config, M, N, K, x.dtype, gated, x.device)
    launch = _launch(*how, x.data_ptr(), x.stride(0), *where, planes_of(ahead))
    launch()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
