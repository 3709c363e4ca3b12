"""The FP8 product on Hopper, and the configurations worth trying for a shape.

Two kernels: one launch in CUDA C++ that quantises and multiplies (`cuda.gemm_fp8`), and quantiser, then GEMM,
in Gluon. A configuration with `warpgroups` belongs to the first, one with `warps` to the second.
"""

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


def fused_candidates(M: int, N: int, K: int, most: int = 14) -> list[fused.Config]:
    """Of all tiles, clusters and splits of K the `most` that a model of the multiprocessor finds fastest."""
    ranked = sorted(_fused_space(M, N, K), key=lambda config: estimated_cycles(config, M, N, K))
    chosen: list[fused.Config] = []
    tiles: dict[tuple[int, int, int], int] = {}
    for config in ranked:
        tile = (config.tokens, config.rows, config.split)
        if tiles.get(tile, 0) < 3:
            tiles[tile] = tiles.get(tile, 0) + 1
            chosen.append(config)
    chosen = chosen[:most]
    if M < 1024:
        return chosen
    return chosen + [replace(config, group=config.group * more) for config in chosen[:3] for more in (2, 4)]


def _fused_space(M: int, N: int, K: int) -> Iterator[fused.Config]:
    few = M <= 64
    shapes = [(1, 1, rows) for rows in _FEW_ROWS] if few else [(2, 1, rows) for rows in _MANY_ROWS]
    if M > 128:
        shapes += [(2, 2, rows) for rows in (96, 128, 160, 192)]
    for warpgroups, blocks, rows in shapes:
        for cluster_tokens, cluster_rows in ((1, 1), (2, 1), (1, 2)):
            tile = fused.Config(
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
            for split in range(1, 7):
                config = replace(tile, split=split)
                fits = _units(config, M, N) <= _MULTIPROCESSORS and split * 8 * 128 * config.chunks <= K
                if split == 1 or fits:
                    yield config


def _units(config: fused.Config, M: int, N: int) -> int:
    """CTAs' shares of work, those of CTAs outside the output included."""
    along_m = -(-M // (config.tokens * config.cluster_tokens))
    along_n = -(-N // (config.rows * config.cluster_rows))
    return along_m * along_n * config.cluster * config.split


def estimated_cycles(config: fused.Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, shared memory, L2 and memory in each
    step of K, and what a tile costs beside its steps. It ranks configurations; it predicts no times."""
    slots = _MULTIPROCESSORS // config.cluster * config.cluster
    waves = -(-_units(config, M, N) // slots)
    tensor = config.tokens * config.rows / 32
    operands = config.tokens // 64 * 4 * (2048 + config.rows * 32)
    shared = ((config.tokens + config.rows) * 128 + operands) / 128
    l2 = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128 / 36
    memory = config.rows * 128 / 13.5 if M <= 128 else 0
    beside = 1200 + config.rows * config.blocks * 6
    if config.split > 1:
        beside += 1500 + config.tokens * config.rows * config.split // 32
    return waves * (K / 128 / config.split * max(tensor, shared, l2, memory) + beside)


def _token_tile(M: int) -> int:
    return next(tokens for tokens in _TOKEN_TILES if tokens >= M)
