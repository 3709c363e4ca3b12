"""What every plan of a product must satisfy, on a device of 132 multiprocessors."""

from math import ceil

from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8
from nestedfp.kernels.hopper.workspace import SCRATCH_COUNTERS, SCRATCH_FLOATS

MULTIPROCESSORS = 132


def assert_covers_16bit(config: gemm_16bit.Config, M: int, N: int, K: int) -> None:
    resident = MULTIPROCESSORS * config.ctas // config.cluster
    work = gemm_16bit.plan(config, M, N, K, resident)
    tiles = gemm_16bit.cluster_tiles(config, M, N)
    assert tiles * config.worker * config.rows * config.tokens >= M * N
    assert 1 <= work.clusters <= resident
    assert 0 <= work.cut <= tiles
    assert 1 <= work.parts <= max(1, K // 128), "a part holds some of K"
    assert (work.cut == 0) == (work.parts == 1)
    if config.cluster_k == 1:
        assert work.cut * work.parts * config.cluster * config.rows * config.tokens <= SCRATCH_FLOATS
        assert work.cut * config.cluster * config.warpgroups <= SCRATCH_COUNTERS


def assert_covers_fp8(config: gemm_fp8.Config, M: int, N: int, K: int) -> None:
    resident = MULTIPROCESSORS // config.cluster
    cut = gemm_fp8.plan(config, M, N, K, resident)
    assert cut.steps == ceil(K / (128 * config.chunks))
    assert cut.tiles_m == ceil(M / (config.tokens * config.cluster_tokens))
    assert cut.tiles_n == ceil(N / (config.rows * config.cluster_rows))
    assert 1 <= cut.split <= min(config.split, cut.steps)
    left = cut.tiles_m * cut.tiles_n - cut.whole
    assert cut.units == cut.whole + left * cut.split
    assert cut.clusters == min(cut.units, resident)
    # Parts of a tile wait for one another: a worker has at most one, after its whole tiles.
    assert cut.split == 1 or (cut.whole % resident == 0 and 0 < left * cut.split <= resident)
    assert 1 <= cut.front <= M
    assert cut.team_warps in (1, 2, 4, 4 * config.warpgroups)
    if cut.units <= resident:
        assert cut.front == M
