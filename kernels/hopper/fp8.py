"""The FP8 product on Hopper, and the configurations of `cuda.gemm_fp8` worth trying for a shape."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Config as Settings
from nestedfp.kernels.dispatch import parsed
from nestedfp.kernels.gated import output_columns
from nestedfp.kernels.hopper.cuda.gemm_fp8 import Config, plan, product
from nestedfp.kernels.hopper.overlap import overlapped
from nestedfp.kernels.hopper.rule import Rule
from nestedfp.kernels.layout import KOrder

_MULTIPROCESSORS = 132
# Side by side before the next weight rows; the first wave must quantise them all before it can start.
_GROUP_TOKENS = 1024
# Weight rows of a tile: what fills the last wave best. wgmma takes any multiple of 8, the epilogue of 16.
_FEW_ROWS = (32, 48, 64, 80, 96, 112, 128, 176)
_MANY_ROWS = (32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
# Of warpgroups with two blocks of 64 tokens.
_BLOCK_ROWS = (96, 128, 160, 176, 192)
# Beyond it, a thread's sums leave no registers to exchange parts.
_MOST_SPLIT_COLUMNS = 320
# Fitted to 2,365 products on an H100 (docs/kernels.md): products of a token, a row and 128 of K in a cycle,
# its bytes from shared memory, into a multiprocessor, out of the L2 and out of memory; cycles of a launch,
# with clusters, of a tile's end by weight rows, of the last end where outputs are stored later, of gathering
# parts, and bytes of parts a cycle.
_TENSOR, _SHARED = 35, 166
_INTO, _L2, _MEMORY = 100, 8500, 1760
_LAUNCH, _CLUSTER_LAUNCH, _END_ROW, _LAST_END, _GATHER, _PART_BYTES = 6400, 2300, 17.5, 3100, 1700, 16
# What the power limit of 700 W makes of a cycle of all tensor cores.
_POWER = 1.11


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    config: Settings | None = None,
    ahead: tuple[Tensor, ...] = (),
    gated: bool = False,
) -> Tensor:
    """y [M, N], or [M, N / 2] if `gated`, for x [M, K], as `nestedfp.kernels.linear_fp8`, which checks the
    operands.

    K is a multiple of 16; x has unit stride in K and rows on 16-byte boundaries. `config` None takes that of
    `RULE`.
    """
    (M, K), N = x.shape, upper.shape[0]
    y = torch.empty((M, output_columns(N, gated)), dtype=x.dtype, device=x.device)
    chosen = RULE.best(M, N, K) if config is None else parsed(Config, *config.items())
    product(x, upper, row_exponent, bias, y, order, chosen, ahead, gated)
    return y


def candidates(M: int, N: int, K: int, most: int = 20) -> list[Settings]:
    """What the tuner times for a shape: the `most` that a model of the multiprocessor finds fastest, no tile
    more than three times for each way to store it; for many tokens the first two also with other groups."""
    chosen: list[Config] = []
    tiles: Counter[tuple[int, int, int]] = Counter()
    for config in sorted(_space(M, N, K), key=lambda config: estimated_cycles(config, M, N, K)):
        tile = config.tokens, config.rows, config.deferred
        if tiles[tile] < 3 and len(chosen) < most:
            tiles[tile] += 1
            chosen.append(config)
    if M >= 1024:
        groups = [(config, group) for config in chosen[:2] for group in (config.group // 2, config.group * 2)]
        chosen += [replace(config, group=group) for config, group in groups if group]
    return [config.to_dict() for config in chosen]


def _space(M: int, N: int, K: int) -> Iterator[Config]:
    few = M <= 64
    # warpgroups, blocks, rows
    shapes = [(1, 1, rows) for rows in _FEW_ROWS] if few else [(2, 1, rows) for rows in _MANY_ROWS]
    if M > 128:
        shapes += [(2, 2, rows) for rows in _BLOCK_ROWS]
    for warpgroups, blocks, rows in shapes:
        for cluster_tokens, cluster_rows in ((1, 1), (2, 1), (1, 2)):
            tile = Config(
                rows,
                warpgroups,
                blocks,
                chunks=2 if rows <= 64 or (few and rows <= 128) else 1,
                promote=int(few),
                cluster_tokens=cluster_tokens,
                cluster_rows=cluster_rows,
            )
            if cluster_tokens > 1 and tile.tokens * (cluster_tokens - 1) >= M:
                continue
            tile = replace(tile, group=max(1, _GROUP_TOKENS // (tile.tokens * cluster_tokens)))
            yield from _splits(tile, M, N, K)


def _splits(tile: Config, M: int, N: int, K: int) -> Iterator[Config]:
    resident = _resident(tile)
    most = 1 if tile.blocks * tile.rows > _MOST_SPLIT_COLUMNS else K // (8 * 128 * tile.chunks)
    parts = plan(replace(tile, split=max(1, min(8, most))), M, N, K, resident).split
    for split in sorted({1, parts, parts // 2 if parts > 3 else 1}):
        config = replace(tile, split=split)
        yield config
        if config.deferrable and plan(config, M, N, K, resident).units > resident:
            yield replace(config, deferred=1)


def estimated_cycles(config: Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, shared memory, copies, L2 and memory
    in each step of K, and what a tile costs beside its steps; and what the power limit leaves to all of them.
    It ranks configurations, and knows nothing of the quantiser; constants are fitted to measured products."""
    workers = _resident(config)
    work = plan(config, M, N, K, workers)
    along_tokens = -(-M // config.tokens)
    panel_bytes = (config.tokens + config.rows) * 128
    # Of x a warpgroup reads its own 64 tokens, of the weights all rows.
    operand_bytes = config.tokens // 64 * 4 * (2048 + config.rows * 32)
    l2_bytes = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128
    steps = K / 128

    def step(active: int) -> float:
        """Of K, while so many workers have a tile."""
        return overlapped(
            config.tokens * config.rows * config.ctas / _TENSOR,
            (panel_bytes + operand_bytes) * config.ctas / _SHARED,
            panel_bytes * config.ctas / _INTO,
            l2_bytes * active * config.cluster / _L2,
            config.rows * 128 * active * config.cluster / along_tokens / _MEMORY,
        )

    full, rest = divmod(work.whole, workers)
    end = config.rows * config.blocks * _END_ROW
    cycles = _LAUNCH + (_CLUSTER_LAUNCH if config.cluster > 1 else 0)
    cycles += steps * (full * step(workers) + (step(rest) if rest else 0))
    cycles += end + _LAST_END if config.deferred else (full + (rest > 0)) * end
    if work.split > 1:
        moved = 2 * config.tokens * config.rows * 4 * (work.split - 1) / work.split
        cycles += steps * step(workers) / work.split + end + _GATHER + moved / _PART_BYTES
    products = along_tokens * config.tokens * N * steps / 32 / _MULTIPROCESSORS
    return overlapped(cycles, products * _POWER)


def _resident(config: Config) -> int:
    return _MULTIPROCESSORS * config.ctas // config.cluster


RULE = Rule(_space, estimated_cycles)
"""For any product, without a table."""
