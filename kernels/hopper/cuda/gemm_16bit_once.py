"""The 16-bit product of many tokens on Hopper, each weight rebuilt once for a wave of tiles.

gemm_16bit_once.cu says what the kernel does.
"""

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from nestedfp.kernels.hopper.cuda import gemm_16bit
from nestedfp.kernels.hopper.cuda.gemm_16bit import Stores, ceil_div, stores
from nestedfp.kernels.hopper.cuda.launch import NO_MAP, Kernel, Launch, address, tensor_map
from nestedfp.kernels.hopper.workspace import SCRATCH_FLOATS, workspace

MOST_TOKENS = 320
"""Of a tile: wider ones leave too few registers to rebuild in."""

_WARPGROUPS = 2
_STEP, _UNIT = 64, 128
# Slots of the ring, and units of 128 of K in each: a chunk's counter goes through the L2 four times.
_RING, _CHUNK = 3, 8
# Of 64 of K each, for a weight row.
_RING_LINES = _RING * _CHUNK * 2
# Weight rows of a wave for which the workspace has room; tiles along the tokens from which on that is enough
# on 176 multiprocessors; and rows that the rebuilding warps keep up with.
_RING_ROWS, _LEAST_TILES, _FAST_ROWS = SCRATCH_FLOATS * 4 // (_RING_LINES * 128), 4, 2304
# By a tile's tokens at most: what (producer, consumer) threads get, and the units that are rebuilt at once.
_REGISTERS = {256: (104, 200, 4), MOST_TOKENS: (88, 208, 2)}


@dataclass(frozen=True)
class Config:
    """A tile has 128 weight rows by `tokens`, a multiple of 16 up to `MOST_TOKENS`.

    cluster_tokens, cluster_rows: CTAs of a cluster along each, which share panels. once: tiles of clusters
    along the tokens in a wave, for which a weight is rebuilt once; a launch has that many or what suits its
    number of tokens better.
    """

    tokens: int
    once: int
    cluster_tokens: int = 1
    cluster_rows: int = 1

    @property
    def tile(self) -> gemm_16bit.Config:
        """The same tile with weights rebuilt by who multiplies them, which takes the same shared memory."""
        return gemm_16bit.Config(self.tokens, _WARPGROUPS, self.cluster_tokens, self.cluster_rows)

    def defines(self, dtype: torch.dtype) -> dict[str, int]:
        """The macros of gemm_16bit_once.cu."""
        if self.tokens > MOST_TOKENS:
            raise ValueError(f"tokens is {self.tokens}, expected at most {MOST_TOKENS}")
        producer, consumer, units = next(v for most, v in _REGISTERS.items() if self.tokens <= most)
        return self.tile.defines(dtype) | {
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
            "UNITS_AT_ONCE": min(units, _CHUNK),
            "RING": _RING,
            "CHUNK": _CHUNK,
        }

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How a launch goes through its tiles: `width` of them along the tokens in each of its `waves`, the
    tallest of which has `rows` weight rows."""

    width: int
    waves: int
    rows: int


@lru_cache(maxsize=4096)
def plan(config: Config, M: int, N: int, workers: int) -> Plan:
    """For a device that holds `workers` clusters at once, of what `fits`: the fewest waves that the
    rebuilding warps keep up with, and of those the widths nearest to `config.once`."""
    tile = config.tile
    along_tokens = _tiles_along_tokens(config, M)
    along_rows = ceil_div(N, tile.rows * config.cluster_rows)

    def of(width: int) -> Plan:
        last = along_tokens % width or width
        full, least = workers // width, workers // last
        waves = (ceil_div(along_tokens, width) - 1) * ceil_div(along_rows, full) + ceil_div(along_rows, least)
        return Plan(width, waves, min(least, along_rows) * tile.rows * config.cluster_rows)

    plans = map(of, range(1, min(along_tokens, workers) + 1))
    return min(
        (work for work in plans if work.rows <= _RING_ROWS),
        key=lambda work: (work.waves * max(work.rows / _FAST_ROWS, 1), abs(work.width - config.once)),
    )


def fits(config: Config, M: int, N: int, K: int) -> bool:
    """Whether the ring holds the waves of this product, and 32 bits count the bytes of a plane."""
    return _tiles_along_tokens(config, M) >= _LEAST_TILES and N * K <= 1 << 32


def _tiles_along_tokens(config: Config, M: int) -> int:
    return ceil_div(M, config.tokens * config.cluster_tokens)


def code(config: Config, dtype: torch.dtype) -> bytes:
    """The cubin of `config` for activations of `dtype`."""
    return gemm_16bit.compiled("gemm_16bit_once.cu", config.tile, dtype, config.defines(dtype))


@cache
def _kernel(config: Config, dtype: torch.dtype, device: int) -> Kernel:
    return Kernel(
        code(config, dtype),
        "gemm_16bit_once",
        threads=(_WARPGROUPS + 1) * 128,
        shared=config.tile.shared_memory,
        cluster=config.tile.cluster,
    )


@lru_cache(maxsize=4096)
def _launch(
    config: Config, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device,
    x: int, x_pitch: int, upper: int, lower: int, row_exponent: int, bias: int | None, y: int,
) -> Launch:  # fmt: skip
    """Of operands at these addresses; x_pitch in elements."""
    kernel, tile = _kernel(replace(config, once=0), dtype, device.index), config.tile
    work = plan(config, M, N, kernel.resident_clusters)
    box, x_bytes = tile.x_copies(M)
    who = stores(tile, M, N)
    ring, counters = workspace(device)
    ring_box = tile.rows // config.cluster_tokens
    arguments = (
        tensor_map(dtype, x, M, K, x_pitch, box, _STEP),
        tensor_map(dtype, ring.data_ptr(), _RING_LINES * work.rows, _STEP, _STEP, ring_box, _STEP),
        tensor_map(dtype, y, M, N, N, tile.slice, 64) if who is Stores.SENT else NO_MAP,
        *map(ctypes.c_void_p, (y, upper, lower, address(ring), row_exponent, bias, address(counters))),
        *map(ctypes.c_int, (M, N, K, work.width, work.rows, x_bytes, who)),
    )
    return Launch(kernel, kernel.resident_clusters, arguments, device.index)


def product(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
) -> None:
    """As `gemm_16bit.product`, of what `fits`."""
    (M, K), N = x.shape, upper.shape[0]
    where = (upper.data_ptr(), lower.data_ptr(), row_exponent.data_ptr(), address(bias), y.data_ptr())
    _launch(config, M, N, K, x.dtype, x.device, x.data_ptr(), x.stride(0), *where)()
