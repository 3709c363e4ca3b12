"""The 16-bit kernel in CUDA C++ compiled for sm_90a without a GPU, and how it is planned."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Backend, Mode, table
from nestedfp.kernels.hopper.cuda.gemm_16bit import (
    SHARED_MEMORY,
    Config,
    cluster_tiles,
    code,
    plan,
)
from nestedfp.kernels.hopper.linear_16bit import cuda_candidates

from .machine_code import disassemble

SOME = [
    Config(256),
    Config(256, cluster_tokens=2),
    Config(144, warpgroups=3, cluster_rows=1),
    Config(80, warpgroups=1, blocks=2),
    Config(64, warpgroups=1, ctas=2),
    Config(16, warpgroups=1),
]
SHAPES = [(4096, 4096), (65536, 5120), (5120, 32768), (77, 128), (16, 64)]
TOKENS = [1, 2, 17, 64, 65, 128, 256, 300, 512, 1024, 4096, 16384]


def tabled() -> list[Config]:
    rows = (row.config for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.BITS16)
    cut = {Config(**{**row, "split": 0, "group": 8}) for row in rows if "warpgroups" in row}
    return sorted(cut, key=repr)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled()]), ids=repr)
def test_machine_code(config: Config, dtype: torch.dtype) -> None:
    sass = disassemble(code(config, dtype))
    products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(?:\.BF16)? R\d+, (\w+)", sass)
    # Two stages of four 16-wide steps for each block of rows.
    assert len(products) == 8 * config.blocks
    assert all(int(tokens) == config.tokens for tokens, _ in products)
    assert all(operand.startswith("R") for _, operand in products), "weights must come from registers"
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
    assert sass.count("WARPGROUP.DEPBAR") <= 2 * config.blocks + 1, "ptxas runs products one at a time"
    assert ("UTMALDG.2D.MULTICAST" in sass) == (config.cluster > 1)
    assert config.stages >= 2
    assert config.shared_memory <= SHARED_MEMORY // config.ctas - 1024


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_candidates_and_plans_cover_any_shape(M: int, N: int, K: int) -> None:
    configs = cuda_candidates(M, N, K, 16)
    assert configs
    for config in configs:
        resident = 132 * config.ctas // config.cluster
        work = plan(config, M, N, K, resident)
        tiles = cluster_tiles(config, M, N)
        assert tiles * config.cluster * config.rows * config.tokens >= M * N
        assert 1 <= work.clusters <= resident
        assert 0 <= work.stream_tiles <= tiles
        # Without a unit for everyone an owner would wait for a run that holds nothing.
        assert work.clusters <= work.stream_tiles * -(-K // 128) or work.stream_tiles == 0
        assert work.clusters <= tiles or work.stream_tiles


def test_a_split_tuned_for_another_shape_is_lowered() -> None:
    config = Config(128, split=3)
    assert plan(config, 128, 4096, 4096, 132).clusters == 3 * 32
    assert plan(config, 128, 4096, 128, 132) == plan(replace(config, split=0), 128, 4096, 128, 132)
    assert plan(config, 128, 65536, 4096, 132).stream_tiles == 0
