"""The FP8 product on Hopper: quantiser, then GEMM, and the configurations worth trying for a shape."""

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Config as Settings
from nestedfp.kernels.hopper.gemm_fp8 import Config, gemm_fp8
from nestedfp.kernels.hopper.quantize import quantize
from nestedfp.kernels.layout import KOrder

_TOKEN_TILES = (8, 16, 32, 64)


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
    codes = torch.empty((M, K), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
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


def candidates(M: int, N: int, K: int) -> list[Config]:
    """What the tuner times for a shape."""
    if M <= 64:
        tokens = _token_tile(M)
        return [Config(tokens, rows, warps=4, ctas=ctas) for rows in (16, 32, 64, 128) for ctas in (1, 2)]
    small = [Config(64, rows, warps=4, ctas=ctas) for rows in (64, 128) for ctas in (1, 2)]
    middle = [Config(128, 32, ctas=2), Config(128, 64), Config(128, 64, ctas=2), Config(128, 128)]
    large = [Config(128, 256), Config(256, 128)]
    groups = [Config(128, 256, group=group) for group in (4, 16)]
    if M <= 128:
        return small + middle
    if M <= 512:
        return small + middle + large
    return [Config(128, 128), *large, *groups]


def _token_tile(M: int) -> int:
    return next(tokens for tokens in _TOKEN_TILES if tokens >= M)
