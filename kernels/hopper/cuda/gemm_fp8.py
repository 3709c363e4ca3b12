"""The FP8 product on Hopper in one launch, quantiser included: see gemm_fp8.cu for what the kernel does.

With NESTEDFP_BOUNDED_WAITS=1 in the environment a wait inside the kernel of millions of polls ends
it with an error: for trying out changes, since other work on the device may rightly make a wait long.
"""

import ctypes
import os
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from math import gcd
from typing import Any, NamedTuple

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
from nestedfp.kernels.hopper.workspace import workspace
from nestedfp.kernels.layout import KOrder

# Of a multiprocessor; each CTA also costs 1 KiB that the system keeps.
SHARED_MEMORY = 228 * 1024
_SYSTEM_SHARE = 1024
_CHUNK = 128
_MOST_STAGES = 16
# Of each 64 that a warpgroup multiplies.
_ROWS_A_WARP = 16
# Columns that a warp's threads take in a turn while they quantise.
_TURN = 16 * 32
# Of a warpgroup's two blocks together; with more, whole lines spill.
_MOST_COLUMNS_WHOLE_LINES = 320
# As gemm_fp8.cu lays out its flags: counts of token tiles, of CTAs, of parts of split tiles.
_TOKEN_FLAGS = 1024
_FLAGS = _TOKEN_FLAGS + 1 + 4096
# Longer batches go through in pieces, which bounds the scratch for codes.
MOST_TOKENS = 16384
# Tokens of the tallest cluster; those of any other divide it.
_TALLEST = 512


@dataclass(frozen=True)
class Config:
    """One way to cut the product.

    A tile has warpgroups * blocks * 64 tokens by `rows` weight rows, a multiple of 16. chunks: 128-byte
    stretches of K a stage. cluster_tokens, cluster_rows: CTAs of a cluster along each. ctas: programs a
    multiprocessor. split: most parts of K, for tiles that do not fill a wave. group: tiles along M that run
    side by side before the next rows. promote: 1 adds each stage's sums to float32 totals, since wgmma keeps
    about 14 bits of them; gemm_fp8.cu states the error of either. deferred: 1 keeps the outputs of a tile
    that another follows in registers, half as many as its sums, and stores them beside the other's products.
    It pays where a program has several tiles, and makes one alone slower; see `deferrable`.
    """

    rows: int
    warpgroups: int = 2
    blocks: int = 1
    chunks: int = 1
    cluster_tokens: int = 1
    cluster_rows: int = 1
    ctas: int = 1
    split: int = 1
    group: int = 8
    promote: int = 0
    deferred: int = 0

    @property
    def tokens(self) -> int:
        return 64 * self.blocks * self.warpgroups

    @property
    def cluster(self) -> int:
        return self.cluster_tokens * self.cluster_rows

    @property
    def _stage_bytes(self) -> int:
        """Of both operands, and of two barriers."""
        return (self.tokens + self.rows) * _CHUNK * self.chunks + 16

    @property
    def slice(self) -> int:
        """Columns of the products whose outputs a warp stages at once: a line of 128 bytes where it can, half
        a line where its sums leave no registers for more; of gated products half of that."""
        most = 64 if self.blocks * self.rows <= _MOST_COLUMNS_WHOLE_LINES else 32
        return max(gcd(self.rows, most), 16) if self.rows > 64 else 16

    @property
    def _slice_bytes(self) -> int:
        """Of all warps."""
        return self.warpgroups * 64 * self.slice * 2

    @property
    def _fixed_bytes(self) -> int:
        """Beside stages and slices: factors and biases of columns, scratch of the quantiser."""
        return self.warpgroups * (self.rows * 8 + 32)

    @property
    def _room(self) -> int:
        """For stages and slices."""
        return SHARED_MEMORY // self.ctas - _SYSTEM_SHARE - self._fixed_bytes

    @property
    def stages(self) -> int:
        return min((self._room - self._slice_bytes) // self._stage_bytes, _MOST_STAGES)

    @property
    def slices(self) -> int:
        """Places that a warp stages slices in by turns: one, and what the stages leave room for."""
        left = self._room - self.stages * self._stage_bytes
        return min(left // self._slice_bytes, self.blocks * self.rows // self.slice)

    @property
    def deferrable(self) -> bool:
        """There is no room for outputs beside the totals of `promote`, more sums than of 256 columns, or a
        second program."""
        return not self.promote and self.ctas == 1 and self.blocks * self.rows <= 256

    @property
    def held(self) -> int:
        """Turns of a token, sixteen columns each, that a thread keeps in registers while it quantises."""
        return 14 if self._reshares_registers else 8

    @property
    def _reshares_registers(self) -> bool:
        """Whether the producer's warps leave registers to the consumers."""
        return self.ctas == 1 and self.warpgroups == 2

    @property
    def shared_memory(self) -> int:
        return self._fixed_bytes + self.stages * self._stage_bytes + self.slices * self._slice_bytes

    def defines(self, dtype: torch.dtype, gated: bool = False) -> dict[str, int]:
        """The macros of gemm_fp8.cu."""
        producer, consumer = 0, 0
        # Of the 168 that each of 384 threads is launched with.
        if self._reshares_registers:
            producer, consumer = (56, 224) if self.blocks * self.rows <= 256 else (40, 232)
        return {
            "CONSUMERS": self.warpgroups,
            "BLOCKS": self.blocks,
            "BLOCK_N": self.rows,
            "CHUNKS": self.chunks,
            "STAGES": self.stages,
            "SLICE": self.slice,
            "SLICES": self.slices,
            "CLUSTER_M": self.cluster_tokens,
            "CLUSTER_N": self.cluster_rows,
            "CTAS": self.ctas,
            # A gate leaves registers for fewer; what is not held is read twice.
            "HELD": min(self.held, 12) if gated else self.held,
            "PROMOTE": self.promote,
            "DEFERRED": self.deferred,
            "SPLITS": int(self.split > 1),
            "BFLOAT16": int(dtype is torch.bfloat16),
            "GATED": int(gated),
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
            "BOUNDED": int(os.environ.get("NESTEDFP_BOUNDED_WAITS") == "1"),
        }

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How a launch covers a shape.

    Tiles of a cluster along M and N, and steps of K; `whole` tiles are multiplied whole, the others in
    `split` parts of K, which makes `units`. clusters: the grid. front: tokens quantised before the first
    tile; team_warps: warps for each of them.
    """

    tiles_m: int
    tiles_n: int
    steps: int
    whole: int
    split: int
    units: int
    clusters: int
    front: int
    team_warps: int


def plan(config: Config, M: int, N: int, K: int, resident: int) -> Plan:
    """For a device that holds `resident` clusters at once.

    Tiles that fill no wave are split into as many parts as there are clusters for them, `config.split` at
    most: all parts of a tile run at once.
    """
    tiles_m = -(-M // (config.tokens * config.cluster_tokens))
    tiles_n = -(-N // (config.rows * config.cluster_rows))
    steps = -(-K // (_CHUNK * config.chunks))
    tiles = tiles_m * tiles_n
    left = tiles % resident
    split = min(config.split, resident // left, steps) if left else 1
    whole = tiles - left if split > 1 else tiles
    units = whole + (tiles - whole) * split
    clusters = min(units, resident)
    front = M
    if units > clusters:
        groups, beyond = divmod(clusters, config.group * tiles_n)
        high = groups * config.group + min(beyond, config.group)
        front = min(M, high * config.cluster_tokens * config.tokens)
    team_warps = _team_warps(config, front, K, clusters * config.cluster)
    return Plan(tiles_m, tiles_n, steps, whole, split, units, clusters, front, team_warps)


def _team_warps(config: Config, front: int, K: int, ctas: int) -> int:
    """Warps that quantise a token together: enough to hold it, since what registers do not hold is read
    twice and a load at a time; of these, as many as leave the fewest tokens one after another."""
    warps = 4 * config.warpgroups
    tokens_a_cta = -(-front // ctas)

    def rounds(team: int) -> int:
        return -(-tokens_a_cta // (warps // team))

    teams = [team for team in (1, 2, 4, warps) if team * config.held * _TURN >= K] or [warps]
    return min(teams, key=lambda team: (rounds(team), -team))


def code(config: Config, dtype: torch.dtype, gated: bool = False) -> bytes:
    """The cubin of `config` for activations of `dtype`; `gated` as `nestedfp.kernels.gated` has it."""
    headers = {"wgmma.cuh": wgmma_header(config.rows, "e4m3", a_in_registers=False)}
    return cubin("gemm_fp8.cu", headers, config.defines(dtype, gated))


@cache
def _kernel(config: Config, dtype: torch.dtype, gated: bool, device: int) -> Kernel:
    return Kernel(
        code(config, dtype, gated),
        "gemm_fp8",
        threads=(config.warpgroups + 1) * 128,
        shared=config.shared_memory,
        cluster=config.cluster,
    )


class _Scratch:
    """Of a device, for all its products, which run one after another. It only grows, and what graphs have
    captured stays."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scale = torch.empty(MOST_TOKENS, dtype=torch.float32, device=device)
        self.partials, _ = workspace(device)
        self.flags = torch.zeros(_FLAGS, dtype=torch.int32, device=device)
        self._codes = [torch.empty(1 << 24, dtype=torch.uint8, device=device)]

    def codes(self, height: int, K: int) -> Tensor:
        """At least height * K bytes, contents undefined.

        What a capture needs was allocated before, by a product of the same K and as many tokens or more.
        """
        have = self._codes[-1].numel()
        # Fewer tokens may have tiles that reach further.
        if have < (size := -(-height // _TALLEST) * _TALLEST * K):
            if not torch.cuda.is_current_stream_capturing():
                more = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, device=self.device)
                self._codes.append(more)
            elif have < height * K:
                raise RuntimeError(
                    f"a captured FP8 product of up to {height} tokens and K = {K} needs {height * K} bytes "
                    f"of scratch, and {have} were allocated before; run one of as many tokens before it"
                )
        return self._codes[-1]


@cache
def _scratch(device: torch.device) -> _Scratch:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first FP8 product on a device allocates its scratch and cannot be captured; run one before"
        )
    return _Scratch(device)


class _Shape(NamedTuple):
    """All of a launch but where the operands lie. height: rows of the codes; boxes in rows, those of y in
    columns, 0 where the copy engine stores nothing; numbers: the kernel's parameters between the pitch of x
    and what is asked ahead."""

    kernel: Kernel
    clusters: int
    height: int
    x_box: int
    weight_box: int
    y_box: int
    size: tuple[ctypes.c_int, ...]
    numbers: tuple[Any, ...]


@lru_cache(maxsize=4096)
def _shape(
    config: Config,
    M: int,
    N: int,
    K: int,
    panels: bool,
    dtype: torch.dtype,
    gated: bool,
    device: torch.device,
) -> _Shape:
    kernel = _kernel(config, dtype, gated, device.index)
    cut = plan(config, M, N, K, kernel.resident_clusters)
    box = config.tokens // config.cluster_rows if config.cluster_rows > 1 else min(config.tokens, M)
    rest = (box * config.cluster_rows * _CHUNK, int(panels), cut.front, cut.team_warps)
    tiles = (cut.tiles_m, cut.tiles_n, cut.steps, config.group, cut.whole, cut.split, cut.units)
    sent = config.deferred and cut.units > cut.clusters and N % 8 == 0
    return _Shape(
        kernel,
        cut.clusters,
        cut.tiles_m * config.tokens * config.cluster_tokens,
        box,
        config.rows // config.cluster_tokens,
        output_columns(config.slice, gated) if sent else 0,
        tuple(map(ctypes.c_int, (M, N, K))),
        (*map(ctypes.c_int, rest), (ctypes.c_int * len(tiles))(*tiles)),
    )


@lru_cache(maxsize=4096)
def _launch(
    config: Config, M: int, N: int, K: int, panels: bool, dtype: torch.dtype, gated: bool,
    device: torch.device, x: int, x_pitch: int, upper: int, row_exponent: int, bias: int | None, y: int,
    ahead: Planes,
) -> Launch:  # fmt: skip
    """Of operands at these addresses; x_pitch in elements."""
    shape = _shape(config, M, N, K, panels, dtype, gated, device)
    width = output_columns(N, gated)
    stored = (N * K // _CHUNK, _CHUNK, _CHUNK) if panels else (N, K, K)
    scratch = _scratch(device)
    codes = scratch.codes(shape.height, K).data_ptr()
    scale, partials, flags = map(address, (scratch.scale, scratch.partials, scratch.flags))
    arguments = (
        tensor_map(torch.uint8, codes, shape.height, K, K, shape.x_box, _CHUNK),
        tensor_map(torch.uint8, upper, *stored, shape.weight_box, _CHUNK),
        tensor_map(dtype, y, M, width, width, _ROWS_A_WARP, shape.y_box) if shape.y_box else NO_MAP,
        *map(ctypes.c_void_p, (y, x, codes, scale, row_exponent, bias, partials, flags)),
        *shape.size,
        ctypes.c_int((x_pitch if M > 1 else K) * dtype.itemsize),
        *shape.numbers,
        ahead_of(ahead),
    )
    return Launch(shape.kernel, shape.clusters, arguments, device.index)


def product(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    y: Tensor,
    order: KOrder,
    config: Config,
    ahead: tuple[Tensor, ...] = (),
    gated: bool = False,
) -> None:
    """Writes y [M, N], or [M, N / 2] if `gated`, contiguous, in x's dtype, on a 16-byte boundary if its rows
    are multiples of 16 bytes.

    x [M, K] has unit stride in K and rows on 16-byte boundaries; K is a multiple of 16. ahead: one plane or
    two that the next product reads.
    """
    if x.shape[0] <= MOST_TOKENS:
        _product(x, upper, row_exponent, bias, y, order, config, ahead, gated)
        return
    for first in range(0, x.shape[0], MOST_TOKENS):
        piece = slice(first, first + MOST_TOKENS)
        _product(x[piece], upper, row_exponent, bias, y[piece], order, config, (), gated)


def _product(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    y: Tensor,
    order: KOrder,
    config: Config,
    ahead: tuple[Tensor, ...],
    gated: bool,
) -> None:
    (M, K), N = x.shape, upper.shape[0]
    panels = order is KOrder.HOPPER
    where = (upper.data_ptr(), row_exponent.data_ptr(), address(bias), y.data_ptr())
    how = (config, M, N, K, panels, x.dtype, gated, x.device)
    launch = _launch(*how, x.data_ptr(), x.stride(0), *where, planes_of(ahead))
    launch()
