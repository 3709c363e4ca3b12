"""The 16-bit product on Hopper, and the configurations worth trying for a shape.

Two kernels: `cuda.gemm_16bit` in CUDA C++, whose tiles take any multiple of 16 tokens and share operands in
clusters, and `gemm_16bit` in Gluon. A configuration with `warpgroups` belongs to the first, one with
`consumers` to the second.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Config as Settings
from nestedfp.kernels.hopper import choose_16bit, gemm_16bit
from nestedfp.kernels.hopper.choose_16bit import STREAM_REST, STREAM_REST_AND_WAVE, ceil_div
from nestedfp.kernels.hopper.cuda import gemm_16bit as cuda
from nestedfp.kernels.hopper.cuda.gemm_16bit import cluster_tiles
from nestedfp.kernels.layout import KOrder

_MULTIPROCESSORS = 132
# Tokens of a tile by warpgroups: what ptxas (CUDA 13.0) compiles without spilling, clustered or not.
_TOKENS = {
    1: (64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 256),
    2: (64, 80, 96, 112, 128, 144, 160, 176, 256),
    3: (64, 80, 96, 112, 144),
}
_CLUSTERS = ((1, 1), (1, 2), (2, 1))
# Bytes a cycle that the L2 gives each multiprocessor, and the memory, where all of them read.
_L2_BYTES = 40
_MEMORY_BYTES = 13.5
_TILE_CYCLES = 2200
# From writing a part of a tile to having read it elsewhere.
_PART_CYCLES = 4000


def linear_16bit(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.HOPPER,
    config: Settings | None = None,
) -> Tensor:
    """y [M, N] for x [M, K], as `nestedfp.kernels.linear_16bit`, which checks the operands.

    The planes are in `KOrder.HOPPER`; x has unit stride in K and rows on 16-byte boundaries. `config` None
    takes the rule of `choose_16bit`.
    """
    if order is not KOrder.HOPPER:
        raise ValueError(f"order is {order}, expected {KOrder.HOPPER}; the portable kernel reads any order")
    y = torch.empty((x.shape[0], upper.shape[0]), dtype=x.dtype, device=x.device)
    if config is not None and "warpgroups" in config:
        cuda.product(x, upper, lower, row_exponent, bias, y, cuda.Config(**config))
    else:
        gemm_16bit.product(x, upper, lower, row_exponent, bias, y, config)
    return y


def candidates(M: int, N: int, K: int, dtype: str) -> list[Settings]:
    """What the tuner times for a shape, the rule's own configuration first."""
    gluon = choose_16bit.candidates(M, N, K, dtype)
    few = M <= 64
    ours = cuda_candidates(M, N, K, 6 if few else 16)
    return [config.to_mapping() for config in gluon] + [config.to_dict() for config in ours]


def cuda_candidates(M: int, N: int, K: int, most: int) -> list[cuda.Config]:
    """Of all tiles, clusters and splits of K the `most` that a model of the multiprocessor finds fastest."""
    ranked = sorted(_space(M, N, K), key=lambda config: estimated_cycles(config, M, N, K))
    chosen: list[cuda.Config] = []
    seen: dict[tuple[int, ...], int] = {}
    for config in ranked:
        # Two ways to cluster each tile and split: what they save differs more than the model knows.
        kind = (config.tokens, config.warpgroups, config.split)
        if seen.get(kind, 0) < 2:
            seen[kind] = seen.get(kind, 0) + 1
            chosen.append(config)
    chosen = chosen[:most]
    if M < 1024:
        return chosen
    return chosen + [replace(config, group=group) for config in chosen[:2] for group in (4, 16)]


def _space(M: int, N: int, K: int) -> Iterator[cuda.Config]:
    widest = 16 * ceil_div(M, 16)
    for warpgroups, tabled in _TOKENS.items():
        for tokens in [count for count in tabled if count <= widest] or [widest]:
            for cluster_tokens, cluster_rows in _CLUSTERS:
                tile = cuda.Config(tokens, warpgroups, 1, cluster_tokens, cluster_rows)
                if tokens % (16 * cluster_rows) or tokens * (cluster_tokens - 1) >= M or tile.stages < 3:
                    continue
                yield from _splits(tile, M, N, K)
                if warpgroups == 1 and tokens <= 64:
                    yield from _splits(replace(tile, ctas=2), M, N, K)


def _splits(tile: cuda.Config, M: int, N: int, K: int) -> Iterator[cuda.Config]:
    tiles, resident = cluster_tiles(tile, M, N), _resident(tile)
    yield tile
    for parts in range(2, 7):
        if tiles * parts <= resident and parts * 512 <= K:
            yield replace(tile, split=parts)
    if tiles % resident and tiles <= 16 * resident:
        yield replace(tile, split=STREAM_REST)
        if tiles > resident:
            yield replace(tile, split=STREAM_REST_AND_WAVE)


def _resident(config: cuda.Config) -> int:
    return _MULTIPROCESSORS * config.ctas // config.cluster


def estimated_cycles(config: cuda.Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, L2 and memory in each step of K, and
    what a tile costs beside its steps. It ranks configurations; it predicts no times."""
    tiles, resident = cluster_tiles(config, M, N), _resident(config)
    work = cuda.plan(config, M, N, K, resident)
    steps = K / 64
    tensor = config.rows * config.tokens * 64 / 2048
    l2 = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128 / _L2_BYTES
    memory = config.rows * 128 / config.cluster_tokens / _MEMORY_BYTES * min(1.0, 256 / M)
    step = max(tensor, l2, memory) * config.ctas
    whole = ceil_div(tiles - work.stream_tiles, work.clusters)
    cycles = whole * (steps * step + _TILE_CYCLES)
    if work.stream_tiles:
        share = work.stream_tiles / work.clusters
        adds = ceil_div(work.clusters, work.stream_tiles)
        cycles += (
            share * steps * step + _TILE_CYCLES + _PART_CYCLES + (adds + 1) * config.rows * config.tokens / 16
        )
    return cycles
