"""The 16-bit product on Hopper, and the configurations of `cuda.gemm_16bit` worth trying for a shape."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Config as Settings
from nestedfp.kernels.dispatch import parsed
from nestedfp.kernels.gated import output_columns
from nestedfp.kernels.hopper.cuda.gemm_16bit import Config, ceil_div, cluster_tiles, plan, product
from nestedfp.kernels.hopper.overlap import overlapped
from nestedfp.kernels.hopper.rule import Rule
from nestedfp.kernels.layout import KOrder

_MULTIPROCESSORS = 132
# The most tokens of a tile by warpgroups: what ptxas (CUDA 13.0) compiles without spilling, clustered or not.
_MOST_TOKENS = {1: 256, 2: 352, 3: 192, 4: 96}
# And in clusters along the tokens, or with K in turns; and in clusters that share K and panels, of which four
# warpgroups spill at any size.
_MOST_TOKENS_CLUSTERED, _MOST_TOKENS_SHARED = 256, 288
_CLUSTERS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
_MOST_PARTS = 8
# Clusters of four that are resident: a multiprocessor less in some part of the chip costs one of 33 there.
_FOURS = 30
# What the rule leaves out: clusters of four, whose number differs from chip to chip; of few tokens tall
# tiles, which fetch too little at a time.
_RULE_CLUSTERS, _RULE_PARTS, _RULE_WARPGROUPS, _FEW_TOKENS = ((1, 1), (1, 2), (2, 1)), 4, 2, 64
# Fitted to 2,460 products on an H100 (docs/kernels.md), in cycles: of a rebuild of 64 x 64 weights beside
# products; bytes a cycle into a multiprocessor, out of the L2 and out of memory; of a launch, with clusters,
# of a tile beside its steps, of a float32 of a part written and read through the L2, of waiting for the
# parts; and of a float32 that CTAs of a cluster exchange.
_REBUILD = 140
_INTO, _L2, _MEMORY = 100, 11000, 1760
_LAUNCH, _CLUSTER_LAUNCH, _TILE, _PART_FLOAT, _GATHER, _PAIR_FLOAT = 2000, 1450, 3800, 0.5, 3100, 0.085
# What the power limit of 700 W makes of a cycle of all tensor cores, and what a rebuild adds to it by tokens.
_POWER, _REBUILD_POWER = 0.58, 100


def linear_16bit(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.HOPPER,
    config: Settings | None = None,
    ahead: tuple[Tensor, ...] = (),
    gated: bool = False,
) -> Tensor:
    """y [M, N], or [M, N / 2] if `gated`, for x [M, K], as `nestedfp.kernels.linear_16bit`, which checks the
    operands.

    The planes are in `KOrder.HOPPER`; x has unit stride in K and rows on 16-byte boundaries. `config` None
    takes that of `RULE`.
    """
    if order is not KOrder.HOPPER:
        raise ValueError(f"order is {order}, expected {KOrder.HOPPER}; the portable kernel reads any order")
    (M, K), N = x.shape, upper.shape[0]
    y = torch.empty((M, output_columns(N, gated)), dtype=x.dtype, device=x.device)
    chosen = RULE.best(M, N, K) if config is None else parsed(Config, *config.items())
    product(x, upper, lower, row_exponent, bias, y, chosen, ahead, gated)
    return y


def _rule_space(M: int, N: int, K: int) -> Iterator[Config]:
    for config in _space(M, N, K, _RULE_CLUSTERS, _RULE_PARTS):
        if config.cluster <= 2 and (M > _FEW_TOKENS or config.warpgroups <= _RULE_WARPGROUPS):
            yield config


def candidates(M: int, N: int, K: int, most: int = 48) -> list[Settings]:
    """What the tuner times for a shape: the `most` that a model of the multiprocessor finds fastest."""
    space = _space(M, N, K, _CLUSTERS, _MOST_PARTS)
    ranked = sorted(space, key=lambda config: estimated_cycles(config, M, N, K))
    chosen: dict[tuple[int | bool, ...], Config] = {}
    for config in ranked:
        # Each tile in each cluster, whole and split: what either saves differs more than the model knows.
        tile = (config.tokens, config.warpgroups, config.sliced_k, config.ctas)
        cluster = (config.cluster_tokens, config.cluster_rows, config.cluster_k)
        chosen.setdefault((*tile, *cluster, config.split > 1), config)
    found = list(chosen.values())[:most]
    if M >= 1024:
        found += [replace(config, group=group) for config in found[:4] for group in (4, 16)]
    return [config.to_dict() for config in found]


def _space(
    M: int, N: int, K: int, clusters: tuple[tuple[int, int], ...], most_parts: int
) -> Iterator[Config]:
    widest = 16 * ceil_div(M, 16)
    for warpgroups, most in _MOST_TOKENS.items():
        for tokens in range(min(widest, 64), min(widest, most) + 1, 16):
            for cluster_tokens, cluster_rows in clusters:
                tile = Config(tokens, warpgroups, cluster_tokens, cluster_rows)
                if tokens % (8 * cluster_rows) or tokens * (cluster_tokens - 1) >= M:
                    continue
                if tokens > _MOST_TOKENS_CLUSTERED and cluster_tokens > 1:
                    continue
                yield from _splits(tile, M, N, K, most_parts)
                if warpgroups == 2 and tokens % 32 == 0 and tokens <= _MOST_TOKENS_CLUSTERED:
                    yield from _splits(replace(tile, sliced_k=2), M, N, K, most_parts)
                if warpgroups == 1 and tokens <= 64 and tile.cluster == 1:
                    yield from _splits(replace(tile, ctas=2), M, N, K, most_parts)


def _splits(tile: Config, M: int, N: int, K: int, most_parts: int) -> Iterator[Config]:
    tiles, resident = cluster_tiles(tile, M, N), _resident(tile)
    yield tile
    if tiles % resident == 0 or tiles > 16 * resident:
        return
    shared = tile.cluster == 2 and tile.warpgroups < 4 and tile.tokens <= _MOST_TOKENS_SHARED
    if (tile.cluster == 1 or shared) and K >= 1024:
        yield replace(tile, cluster_k=2)
        if tiles > resident:
            yield replace(tile, cluster_k=2, waves=1)
    for parts in range(2, most_parts + 1):
        if parts * 512 <= K:
            yield replace(tile, split=parts)
            if tiles > resident:
                yield replace(tile, split=parts, waves=1)


def _resident(config: Config) -> int:
    return _FOURS if config.cluster == 4 else _MULTIPROCESSORS * config.ctas // config.cluster


def estimated_cycles(config: Config, M: int, N: int, K: int) -> float:
    """Cycles of the busiest multiprocessor: the slowest of tensor cores, rebuild, copies, L2 and memory in
    each step of K, and what a tile costs beside its steps; and what the power limit leaves to all of them. It
    ranks configurations, and knows no dtype; constants are fitted to measured products."""
    tiles = cluster_tiles(config, M, N)
    work = plan(config, M, N, K, _resident(config))
    workers = work.clusters * config.cluster_k
    multiply = config.tokens * 2
    row_groups = config.warpgroups // config.sliced_k
    panel_bytes = (config.tokens + config.rows) * 128
    l2_bytes = (config.tokens / config.cluster_rows + config.rows / config.cluster_tokens) * 128
    floats = config.rows * config.tokens * config.ctas
    part_float, gather = (_PAIR_FLOAT, 0) if config.cluster_k > 1 else (_PART_FLOAT, _GATHER)
    steps = K / 64

    def step(active: int) -> float:
        """Of K, while so many workers have a tile."""
        return overlapped(
            multiply * row_groups * config.ctas,
            # A warpgroup rebuilds once its products before have been handed to the tensor cores.
            (multiply + _REBUILD) / config.sliced_k,
            panel_bytes * config.ctas / _INTO,
            l2_bytes * active * config.worker / _L2,
            config.rows * 128 * active * config.worker / ceil_div(M, config.tokens) / _MEMORY,
        )

    def rounds(segments: int, steps: float, beside: float) -> float:
        """So many tiles or parts, of `steps` steps and what each costs beside them."""
        full, rest = divmod(segments, workers)
        cycles = full * (steps * step(workers) + beside)
        return cycles + steps * step(rest) + beside if rest else cycles

    cycles = _LAUNCH + (_CLUSTER_LAUNCH if config.cluster > 1 else 0)
    cycles += rounds(tiles - work.cut, steps, _TILE)
    if work.cut:
        cycles += rounds(work.cut * work.parts, steps / work.parts, _TILE + part_float * floats) + gather
    products = tiles * config.worker * multiply * row_groups * steps / _MULTIPROCESSORS
    return overlapped(cycles, products * (_POWER + _REBUILD_POWER / config.tokens))


RULE = Rule(_rule_space, estimated_cycles)
"""For any product, without a table."""
