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
from nestedfp.kernels.hopper.cuda import gemm_16bit as cuda
from nestedfp.kernels.hopper.cuda.gemm_16bit import ceil_div, cluster_tiles
from nestedfp.kernels.layout import KOrder

_MULTIPROCESSORS = 132
# The most tokens of a tile by warpgroups: what ptxas (CUDA 13.0) compiles without spilling, clustered or not.
_MOST_TOKENS = {1: 256, 2: 256, 3: 192, 4: 112}
_CLUSTERS = ((1, 1), (1, 2), (2, 1))
_MOST_PARTS = 8
# An H100's cycles, measured: of a rebuild of 64 x 64 weights beside wgmma; bytes a cycle into a multiprocessor,
# out of the L2 and out of memory; of a launch, with clusters, of a tile beside its steps, of a float32 of a part
# written and read, of waiting for the parts.
_REBUILD = 250
_INTO, _L2, _MEMORY = 55, 4100, 1480
_LAUNCH, _CLUSTER_LAUNCH, _TILE, _PART_FLOAT, _GATHER = 5000, 1500, 2200, 0.35, 2500


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
        # Two ways to cluster and to split each tile: what they save differs more than the model knows.
        kind = (config.tokens, config.warpgroups)
        if seen.get(kind, 0) < 3:
            seen[kind] = seen.get(kind, 0) + 1
            chosen.append(config)
    chosen = chosen[:most]
    if M < 1024:
        return chosen
    return chosen + [replace(config, group=group) for config in chosen[:2] for group in (4, 16)]


def _space(M: int, N: int, K: int) -> Iterator[cuda.Config]:
    widest = 16 * ceil_div(M, 16)
    for warpgroups, most in _MOST_TOKENS.items():
        for tokens in range(min(widest, 64), min(widest, most) + 1, 16):
            for cluster_tokens, cluster_rows in _CLUSTERS:
                tile = cuda.Config(tokens, warpgroups, cluster_tokens, cluster_rows)
                if tokens % (16 * cluster_rows) or tokens * (cluster_tokens - 1) >= M or tile.stages < 3:
                    continue
                yield from _splits(tile, M, N, K)
                if warpgroups == 1 and tokens <= 64:
                    yield from _splits(replace(tile, ctas=2), M, N, K)


def _splits(tile: cuda.Config, M: int, N: int, K: int) -> Iterator[cuda.Config]:
    tiles, resident = cluster_tiles(tile, M, N), _resident(tile)
    yield tile
    if tiles % resident == 0 or tiles > 16 * resident:
        return
    for parts in range(2, _MOST_PARTS + 1):
        if parts * 512 <= K:
            yield replace(tile, split=parts)
            if tiles > resident:
                yield replace(tile, split=parts, waves=1)


def _resident(config: cuda.Config) -> int:
    return _MULTIPROCESSORS * config.ctas // config.cluster


def estimated_cycles(config: cuda.Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, rebuild, copies, L2 and memory in each
    step of K, and what a tile costs beside its steps. It ranks configurations; it predicts no times."""
    tiles = cluster_tiles(config, M, N)
    work = cuda.plan(config, M, N, K, _resident(config))
    active = work.clusters * config.cluster
    panel_bytes = (config.tokens + config.rows) * 128
    l2_bytes = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128
    multiply = config.tokens * 2
    step = max(
        multiply * config.warpgroups * config.ctas,
        _REBUILD * config.warpgroups * config.ctas,
        multiply + _REBUILD,
        panel_bytes * config.ctas / _INTO,
        l2_bytes * active / _L2,
        config.rows * 128 * active / ceil_div(M, config.tokens) / _MEMORY,
    )
    steps = K / 64
    parts = ceil_div(work.cut * work.parts, work.clusters)
    whole = ceil_div(tiles - work.cut, work.clusters)
    floats = config.rows * config.tokens * config.ctas
    cycles = _LAUNCH + (_CLUSTER_LAUNCH if config.cluster > 1 else 0)
    cycles += whole * (steps * step + _TILE)
    cycles += parts * (steps / work.parts * step + _TILE + _PART_FLOAT * floats)
    return cycles + (_GATHER if parts else 0)
