"""Gated products compiled for sm_90a without a GPU: that the gates' functions fit beside the sums."""

import re

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8
from nestedfp.kernels.precompile import AnyConfig, recipes

from .machine_code import disassemble

# Of what a tile of 256 weight rows with outputs that wait keeps from one tile to the next.
MOST_SPILLED_BYTES = 32

WEIGHTS = [(28672, 4096), (14336, 4096)]
"""Of layers that are gated: Llama-3.1-8B's, and a rank's half of it."""
DTYPES = [torch.float16, torch.bfloat16]


def needed(mode: Mode, dtype: torch.dtype) -> list[AnyConfig]:
    """What engines compile for these weights, each piece of machine code once."""
    found = {
        recipe.macros: recipe.config
        for N, K in WEIGHTS
        for recipe in recipes(N, K, dtype, gated=True)
        if recipe.mode is mode
    }
    return list(found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_16bit(dtype: torch.dtype) -> None:
    for config in needed(Mode.BITS16, dtype):
        assert isinstance(config, gemm_16bit.Config)
        sass = disassemble(gemm_16bit.code(config, dtype, gated=True))
        # Of a thread's sums half are gates'; parts of K that are gathered have a store of their own.
        own = config.tokens // config.sliced_k // 4
        assert sass.count("MUFU.EX2") in (own, 2 * own), config
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{config}: registers spill to local memory"
        assert sass.count("WARPGROUP.DEPBAR") <= 3, f"{config}: ptxas runs products one at a time"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8(dtype: torch.dtype) -> None:
    for config in needed(Mode.FP8, dtype):
        assert isinstance(config, gemm_fp8.Config)
        sass = disassemble(gemm_fp8.code(config, dtype, gated=True))
        own = config.rows * config.blocks // 4
        # Outputs that wait, beside steps and behind them, and those of the last tile.
        assert sass.count("MUFU.EX2") == own * (3 if config.deferred else 1), config
        assert sass.count("WARPGROUP.DEPBAR") <= 2, f"{config}: ptxas runs products one at a time"
        offsets = [int(at or "0", 16) for at in re.findall(r"STL[.\w]* \[R1(?:\+0x(\w+))?\]", sass)]
        assert max(offsets, default=-4) + 4 <= MOST_SPILLED_BYTES, config
        assert not re.search(r"\b(LDL|STL)\b", step(sass)), f"{config}: products wait for local memory"


def test_plain_products_have_no_gates() -> None:
    for sass in (
        disassemble(gemm_16bit.code(gemm_16bit.Config(64), torch.float16)),
        disassemble(gemm_fp8.code(gemm_fp8.Config(64), torch.float16)),
    ):
        assert "MUFU.EX2" not in sass


def step(sass: str) -> str:
    """From the last product of the loop over K to the wait for the one before."""
    end = sass.index("WARPGROUP.DEPBAR")
    return sass[sass.rindex("QGMMA", 0, end) : end]
