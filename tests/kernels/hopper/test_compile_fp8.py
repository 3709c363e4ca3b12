"""The one-launch FP8 kernel compiled for sm_90a without a GPU, and how it is planned."""

import re
from math import ceil

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Backend, Mode, table
from nestedfp.kernels.hopper.cuda.gemm_fp8 import SHARED_MEMORY, Config, code, plan
from nestedfp.kernels.hopper.fp8 import fused_candidates

from .machine_code import disassemble

PER_PROGRAM = SHARED_MEMORY - 1024


def tabled() -> list[Config]:
    configs = (row.config for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.FP8)
    cut = {Config(**{**config, "split": 1, "group": 8}) for config in configs if "warpgroups" in config}
    return sorted(cut, key=repr)


SOME = [
    Config(256, cluster_tokens=2),
    Config(192, blocks=2, cluster_rows=2),
    Config(48, chunks=2, cluster_rows=2),
    Config(64, warpgroups=1, chunks=2),
    Config(64, warpgroups=1, ctas=2),
    Config(128, promote=1),
]


@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled()]), ids=repr)
def test_machine_code(config: Config) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        sass = disassemble(code(config, dtype))
        products = re.findall(r"QGMMA\.64x(\d+)x32\.F32\.E4M3\.E4M3 R\d+, gdesc", sass)
        assert len(products) >= 4 * config.chunks * config.blocks
        assert all(int(rows) == config.rows for rows in products)
        assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
        assert sass.count("WARPGROUP.DEPBAR") <= 2, "ptxas runs products one at a time"
        assert ("UTMALDG.2D.MULTICAST" in sass) == (config.cluster > 1)
    assert config.stages >= 2
    assert config.shared_memory <= PER_PROGRAM // config.ctas


@pytest.mark.parametrize("M", [1, 2, 17, 64, 65, 128, 256, 300, 512, 1024, 4096, 16384])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (65536, 5120), (5120, 32768), (77, 80), (16, 16)])
def test_candidates_and_plans_cover_any_shape(M: int, N: int, K: int) -> None:
    configs = fused_candidates(M, N, K)
    assert configs
    for config in configs:
        resident = 132 // config.cluster
        cut = plan(config, M, N, K, resident)
        steps = ceil(K / (128 * config.chunks))
        assert 1 <= cut.split <= min(config.split, steps)
        assert 1 <= cut.clusters <= resident
        assert 1 <= cut.front <= M
        assert cut.team_warps in (1, 4, 4 * config.warpgroups)
        tiles = ceil(M / (config.tokens * config.cluster_tokens)) * ceil(
            N / (config.rows * config.cluster_rows)
        )
        assert cut.clusters == min(tiles * cut.split, resident)
        if tiles * cut.split <= resident:
            assert cut.front == M


def test_front_holds_every_token_of_the_first_tiles() -> None:
    M, N, K = 8192, 6144, 4096
    for config in fused_candidates(M, N, K):
        resident = 132 // config.cluster
        cut = plan(config, M, N, K, resident)
        height = ceil(M / (config.tokens * config.cluster_tokens))
        width = ceil(N / (config.rows * config.cluster_rows))
        for unit in range(cut.clusters):
            tile = unit // cut.split
            first = tile // (config.group * width) * config.group
            within = tile - first * width
            row = first + within % min(height - first, config.group)
            assert min(M, (row + 1) * config.tokens * config.cluster_tokens) <= cut.front


def test_a_split_tuned_for_another_shape_is_lowered() -> None:
    config = Config(128, split=4)
    assert plan(config, 128, 4096, 4096, 132).split == 4
    assert plan(config, 128, 65536, 4096, 132).split == 1
    assert plan(config, 128, 4096, 256, 132).split == 2
