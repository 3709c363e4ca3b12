"""Gated products compiled for sm_90a without a GPU: that the gates' functions fit beside the sums."""

import re

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
pytest.importorskip("triton")

from nestedfp.kernels.dispatch import Backend, Mode, rows_of
from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8

from .machine_code import disassemble

# Of the loop invariants of a tile of 256 weight rows with outputs that wait; none inside the loop over K.
MOST_SPILLED_BYTES = 32

N, K = 28672, 4096
"""Of a layer that is gated: Llama-3.1-8B's."""


def configs(mode: Mode, kind: type) -> list:  # type: ignore[type-arg]
    found = {}
    for row in rows_of(Backend.HOPPER, (9, 0), mode, "bfloat16", N, K):
        config = kind(**row.config)
        found.setdefault(tuple(config.defines(torch.bfloat16).items()), config)
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", configs(Mode.BITS16, gemm_16bit.Config), ids=repr)
def test_16bit(config: gemm_16bit.Config, dtype: torch.dtype) -> None:
    plain, gated = (disassemble(gemm_16bit.code(config, dtype, gated)) for gated in (False, True))
    assert "MUFU.EX2" not in plain
    # Of a thread's sums every second one is a gate; parts of K that are gathered have a store of their own.
    own = config.tokens // config.sliced_k // 4
    assert gated.count("MUFU.EX2") in (own, 2 * own)
    assert not re.search(r"\b(LDL|STL)\b", gated), "registers spill to local memory"
    assert gated.count("HGMMA") == plain.count("HGMMA")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", configs(Mode.FP8, gemm_fp8.Config), ids=repr)
def test_fp8(config: gemm_fp8.Config, dtype: torch.dtype) -> None:
    plain, gated = (disassemble(gemm_fp8.code(config, dtype, gated)) for gated in (False, True))
    assert "MUFU.EX2" not in plain
    own = config.rows * config.blocks // 4
    # Outputs that wait, beside steps and behind them, and those of the last tile.
    assert gated.count("MUFU.EX2") == own * (3 if config.deferred else 1)
    assert gated.count("QGMMA") == plain.count("QGMMA")
    offsets = [int(at or "0", 16) for at in re.findall(r"STL[.\w]* \[R1(?:\+0x(\w+))?\]", gated)]
    assert max(offsets, default=-4) + 4 <= MOST_SPILLED_BYTES
    assert not re.search(r"\b(LDL|STL)\b", step(gated)), "the loop over K spills"


def step(sass: str) -> str:
    """From the last product of the loop over K to the wait for the one before."""
    end = sass.index("WARPGROUP.DEPBAR")
    return sass[sass.rindex("QGMMA", 0, end) : end]
