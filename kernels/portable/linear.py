"""The two products on a GPU without kernels of its own: tile sizes, output, launch."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from nestedfp.kernels.dispatch import Capability, Config, Mode
from nestedfp.kernels.layout import KOrder
from nestedfp.kernels.portable.gemm import gemm_kernel, quantize_kernel

_QUANTIZE_COLUMNS = 1024
# Compute capabilities from which tensor cores take these types.
_BFLOAT16_TENSOR_CORES = (8, 0)
_E4M3_TENSOR_CORES = (8, 9)


def linear_16bit(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    config: Config | None = None,
) -> Tensor:
    """y [M, N] for x [M, K], as `nestedfp.kernels.linear_16bit`, which checks the operands."""
    y = torch.empty((x.shape[0], upper.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, upper, lower, row_exponent, None, bias, y, order, config or default_config(x.shape[0]))
    return y


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    config: Config | None = None,
) -> Tensor:
    """y [M, N] for x [M, K], as `nestedfp.kernels.linear_fp8`, which checks the operands."""
    M, K = x.shape
    native = _has_capability(x.device, _E4M3_TENSOR_CORES)
    codes = torch.empty((M, K), dtype=torch.float8_e4m3fn if native else torch.float16, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    y = torch.empty((M, upper.shape[0]), dtype=x.dtype, device=x.device)
    quantize_kernel[(M,)](
        x, codes, scale, K, *x.stride(), PERMUTED=order is KOrder.HOPPER, BLOCK_K=_QUANTIZE_COLUMNS
    )
    _launch(codes, upper, None, row_exponent, scale, bias, y, order, config or default_config(M))
    return y


@cache
def _has_capability(device: torch.device, least: Capability) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= least


def default_config(M: int) -> Config:
    """Tiles for M tokens: the names of `gemm_kernel`'s constants, and of Triton's launch options."""
    if M <= 16:
        return _tile(16, 32, 128, warps=4, stages=4)
    if M <= 64:
        return _tile(64, 64, 64, warps=4, stages=4)
    return _tile(128, 128, 64, warps=8, stages=3)


def candidates(mode: Mode, M: int, N: int, K: int, dtype: str) -> list[Config]:
    """Configurations worth timing for a product, `default_config`'s own first; either mode takes any."""
    if M <= 16:
        tiles = [_tile(16, rows, k, warps=4, stages=4) for rows in (32, 64, 128) for k in (64, 128)]
    elif M <= 64:
        tokens = 32 if M <= 32 else 64
        tiles = [_tile(tokens, rows, k, warps=4, stages=4) for rows in (32, 64, 128) for k in (64, 128)]
    else:
        tiles = [_tile(64, 64, 64, warps=4, stages=4), _tile(64, 128, 64, warps=4, stages=4)]
        tiles += [_tile(128, 64, 64, warps=4, stages=4), _tile(128, 256, 64, warps=8, stages=3)]
    first = default_config(M)
    return [first, *(tile for tile in tiles if tile != first)]


def _tile(tokens: int, rows: int, k: int, *, warps: int, stages: int) -> Config:
    return {
        "BLOCK_M": tokens,
        "BLOCK_N": rows,
        "BLOCK_K": k,
        "GROUP": 8,
        "num_warps": warps,
        "num_stages": stages,
    }


def _launch(
    a: Tensor,
    upper: Tensor,
    lower: Tensor | None,
    row_exponent: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    order: KOrder,
    config: Config,
) -> None:
    (M, K), N = a.shape, upper.shape[0]
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    kernel: Any = gemm_kernel[(tiles,)]
    kernel(
        a,
        upper,
        lower,
        y,
        row_exponent,
        row_scale,
        bias,
        M,
        N,
        K,
        *a.stride(),
        FP8=lower is None,
        NATIVE=a.dtype is torch.float8_e4m3fn,
        WIDE=a.dtype is torch.bfloat16 and not _has_capability(a.device, _BFLOAT16_TENSOR_CORES),
        PERMUTED=order is KOrder.HOPPER and lower is not None,
        PANELS=order is KOrder.HOPPER,
        **config,
    )
