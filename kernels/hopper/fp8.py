"""The FP8 product on Hopper, and the configurations of `cuda.gemm_fp8` worth trying for a shape."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Config as Settings
from nestedfp.kernels.dispatch import parsed
from nestedfp.kernels.hopper.cuda.gemm_fp8 import Config, plan, product
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
# Cycles after a tile whose outputs are packed to be stored later, and what that way costs the last tile.
_DEFERRED_ENDING, _LAST_ENDING = 700, 1000


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    config: Settings | None = None,
    ahead: tuple[Tensor, ...] = (),
) -> Tensor:
    """y [M, N] for x [M, K], as `nestedfp.kernels.linear_fp8`, which checks the operands.

    K is a multiple of 16; x has unit stride in K and rows on 16-byte boundaries. `config` None takes `rule`.
    """
    (M, K), N = x.shape, upper.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    chosen = rule(M, N, K) if config is None else parsed(Config, *config.items())
    product(x, upper, row_exponent, bias, y, order, chosen, ahead)
    return y


@lru_cache(maxsize=1024)
def rule(M: int, N: int, K: int) -> Config:
    """A configuration for any product, without a table."""
    return min(_space(M, N, K), key=lambda config: estimated_cycles(config, M, N, K))


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
    resident = _MULTIPROCESSORS * tile.ctas // tile.cluster
    most = 1 if tile.blocks * tile.rows > _MOST_SPLIT_COLUMNS else K // (8 * 128 * tile.chunks)
    parts = plan(replace(tile, split=max(1, min(8, most))), M, N, K, resident).split
    for split in sorted({1, parts, parts // 2 if parts > 3 else 1}):
        config = replace(tile, split=split)
        yield config
        if config.deferrable and plan(config, M, N, K, resident).units > resident:
            yield replace(config, deferred=1)


def estimated_cycles(config: Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, shared memory, L2 and memory in each
    step of K, and what a tile costs beside its steps. It ranks configurations; it predicts no times."""
    workers = _MULTIPROCESSORS * config.ctas // config.cluster
    cut = plan(config, M, N, K, workers)
    tensor = config.tokens * config.rows / 32
    operands = config.tokens // 64 * 4 * (2048 + config.rows * 32)
    shared = ((config.tokens + config.rows) * 128 + operands) / 128
    l2 = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128 / 36
    memory = config.rows * 128 / 13.5 if M <= 128 else 0
    tile = K / 128 * max(tensor, shared, l2, memory) * config.ctas
    ending = 1200 + config.rows * config.blocks * 6
    waves = -(-cut.whole // workers)
    endings = (waves - 1) * _DEFERRED_ENDING + ending + _LAST_ENDING if config.deferred else waves * ending
    cycles = waves * tile + endings
    if cut.split > 1:
        moved = 2 * config.tokens * config.rows * 4 * (cut.split - 1) / cut.split
        cycles += tile / cut.split + ending + 2500 + moved / 40
    return cycles
