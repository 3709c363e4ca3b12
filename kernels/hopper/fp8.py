"""The FP8 product on Hopper, and the configurations worth trying for a shape.

Two kernels: one launch in CUDA C++ that quantises and multiplies (`cuda.gemm_fp8`), and quantiser, then GEMM,
in Gluon. A configuration with `warpgroups` belongs to the first, one with `warps` to the second.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Config as Settings
from nestedfp.kernels.hopper.cuda import gemm_fp8 as fused
from nestedfp.kernels.hopper.gemm_fp8 import Config, gemm_fp8
from nestedfp.kernels.hopper.quantize import quantize
from nestedfp.kernels.layout import KOrder

_TOKEN_TILES = (8, 16, 32, 64)
_MULTIPROCESSORS = 132
# Side by side before the next weight rows; the first wave must quantise them all before it can start.
_GROUP_TOKENS = 1024
# Weight rows of a tile: what fills the last wave best. wgmma takes any multiple of 8, the epilogue of 16.
_FEW_ROWS = (32, 48, 64, 80, 96, 112, 128, 176)
_MANY_ROWS = (48, 64, 80, 96, 128, 160, 192, 224, 256)
# Of warpgroups with two blocks of 64 tokens.
_BLOCK_ROWS = (96, 128, 160, 192)
# Beyond it, a thread's sums leave no registers to exchange parts.
_MOST_SPLIT_COLUMNS = 320


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    config: Settings | None = None,
) -> Tensor:
    """y [M, N] for x [M, K], as `nestedfp.kernels.linear_fp8`, which checks the operands.

    K is a multiple of 16; x has unit stride in K and rows on 16-byte boundaries.
    """
    (M, K), N = x.shape, upper.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if config is not None and "warpgroups" in config:
        fused.product(x, upper, row_exponent, bias, y, order, fused.Config(**config))
        return y
    codes = torch.empty((M, K), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    chosen = default_config(M, N) if config is None else Config(**config)
    quantize(x, codes, scale, order)
    gemm_fp8(codes, scale, upper, row_exponent, bias, y, chosen)
    return y


def default_config(M: int, N: int) -> Config:
    """A fair configuration without a table: the smallest tile that holds M, then large square ones."""
    if M <= 64:
        return Config(_token_tile(M), 32 if N <= 8192 else 64, warps=4, ctas=2)
    if M <= 128:
        return Config(128, 64, ctas=2)
    return Config(128, 256) if M * N >= 132 * 128 * 256 else Config(128, 128)


def candidates(M: int, N: int, K: int) -> list[Settings]:
    """What the tuner times for a shape."""
    gluon: list[Config] = []
    if M <= 64:
        tokens = _token_tile(M)
        gluon = [Config(tokens, rows, warps=4, ctas=ctas) for rows in (32, 64) for ctas in (1, 2)]
    elif M <= 128:
        gluon = [Config(64, 64, warps=4), Config(128, 64), Config(128, 64, ctas=2)]
    return [config.to_dict() for config in [*gluon, *fused_candidates(M, N, K)]]


def fused_candidates(M: int, N: int, K: int, most: int = 12) -> list[fused.Config]:
    """Of all tiles, clusters, schedules and splits of K the `most` that a model of the multiprocessor finds
    fastest, half of each schedule where both apply; for many tokens the first also with other groups."""
    space = sorted(_fused_space(M, N, K), key=lambda config: estimated_cycles(config, M, N, K))
    shared = [config for config in space if not config.pingpong]
    turns = [config for config in space if config.pingpong]
    chosen = _varied(turns, most // 2)
    chosen += _varied(shared, most - len(chosen))
    chosen.sort(key=lambda config: estimated_cycles(config, M, N, K))
    if M < 1024:
        return chosen
    groups = [(config, group) for config in chosen[:2] for group in (config.group // 2, config.group * 2)]
    return chosen + [replace(config, group=group) for config, group in groups if group]


def _varied(ranked: list[fused.Config], most: int) -> list[fused.Config]:
    """The first `most`, no tile more than twice."""
    chosen: list[fused.Config] = []
    tiles: Counter[tuple[int, int]] = Counter()
    for config in ranked:
        if tiles[config.tokens, config.rows] < 2 and len(chosen) < most:
            tiles[config.tokens, config.rows] += 1
            chosen.append(config)
    return chosen


def _fused_space(M: int, N: int, K: int) -> Iterator[fused.Config]:
    few = M <= 64
    # warpgroups, blocks, rows, whether warpgroups take turns
    shapes = [(1, 1, rows, 0) for rows in _FEW_ROWS] if few else [(2, 1, rows, 0) for rows in _MANY_ROWS]
    if M > 64:
        shapes += [(2, 2, rows, 1) for rows in _BLOCK_ROWS]
    if M > 128:
        shapes += [(2, 2, rows, 0) for rows in _BLOCK_ROWS]
    for warpgroups, blocks, rows, pingpong in shapes:
        for cluster_tokens, cluster_rows in ((1, 1), (2, 1), (1, 2)):
            tile = fused.Config(
                rows,
                warpgroups,
                blocks,
                chunks=2 if rows <= 64 or (few and rows <= 128) else 1,
                promote=int(few),
                cluster_tokens=cluster_tokens,
                cluster_rows=cluster_rows,
                pingpong=pingpong,
            )
            if cluster_tokens > 1 and tile.tokens * (cluster_tokens - 1) >= M:
                continue
            tile = replace(tile, group=max(1, _GROUP_TOKENS // (tile.tokens * cluster_tokens)))
            yield tile
            most = 1 if blocks * rows > _MOST_SPLIT_COLUMNS else K // (8 * 128 * tile.chunks)
            split = replace(tile, split=max(1, min(8, most)))
            parts = fused.plan(split, M, N, K, _MULTIPROCESSORS // tile.cluster).split
            if parts > 1:
                yield replace(tile, split=parts)
            if parts > 3:
                yield replace(tile, split=parts // 2)


def estimated_cycles(config: fused.Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, shared memory, L2 and memory in each
    step of K, and what a tile costs beside its steps. It ranks configurations; it predicts no times."""
    workers = _MULTIPROCESSORS // config.cluster
    cut = fused.plan(config, M, N, K, workers)
    tensor = config.tokens * config.rows / 32
    operands = config.tokens // 64 * 4 * (2048 + config.rows * 32)
    shared = ((config.tokens + config.rows) * 128 + operands) / 128
    l2 = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128 / 36
    memory = config.rows * 128 / 13.5 if M <= 128 else 0
    tile = K / 128 * max(tensor, shared, l2, memory)
    # Scaling and storing keeps the tensor cores waiting after each tile, or once where warpgroups take turns.
    ending = 1200 + config.rows * config.blocks * 6
    whole = -(-cut.whole // workers)
    cycles = whole * (tile + 300) + ending if config.pingpong else whole * (tile + ending)
    if cut.split > 1:
        moved = 2 * config.tokens * config.rows * 4 * (cut.split - 1) / cut.split
        cycles += tile / cut.split + ending + 2500 + moved / 40
    return cycles


def _token_tile(M: int) -> int:
    return next(tokens for tokens in _TOKEN_TILES if tokens >= M)
