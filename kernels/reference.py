"""Both products in plain torch: the definition the kernels are tested against.

Independent of the kernels and of `nestedfp.format`: the bit contract is spelled out once more here, in
float and integer arithmetic that a reader can check by hand. Slow, any device, any stored order.
"""

import torch
from torch import Tensor

from nestedfp.kernels.layout import KOrder, unstore

E4M3_MAX = 448.0
WEIGHT_EXPONENT_OFFSET = 8
# Keeps both amax / 448 and 448 / amax finite and normal in float32; below it a token counts as zero.
SMALLEST_AMAX = 2.0**-100


def rebuild_16bit(upper: Tensor, lower: Tensor, order: KOrder = KOrder.NATURAL) -> Tensor:
    """The float16 numbers [N, K], natural order, whose bytes are `upper` and `lower`; no row exponent."""
    high, low = unstore(upper, order).int(), unstore(lower, order).int()
    code = high % 128
    magnitude = (code + code % 2) * 128 + low - 191
    return torch.where(high < 128, magnitude, magnitude - (1 << 15)).short().view(torch.float16)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] and float32 scales [M]: x ~ code * scale, scale = amax / 448 of each row.

    A row with NaN or infinity has NaN codes; a row of zeros has zero codes.
    """
    amax = x.float().abs().amax(dim=1).clamp_min(SMALLEST_AMAX)
    largest = torch.full_like(amax, E4M3_MAX)
    codes = (x.float() * (largest / amax)[:, None]).to(torch.float8_e4m3fn)
    return codes, amax / largest


def linear_16bit(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """y [M, N] = x [M, K] times the rebuilt weights, in x's dtype, or float64 where `accumulate` is."""
    w = rebuild_16bit(upper, lower, order).to(accumulate)
    return _finish(x.to(accumulate) @ w.T, torch.exp2(row_exponent.to(accumulate)), bias, x.dtype)


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """y [M, N] = quantised x [M, K] times the E4M3 weights; the dtype as for `linear_16bit`."""
    codes, scale = quantize(x)
    w = unstore(upper, order).view(torch.float8_e4m3fn).to(accumulate)
    y = (codes.to(accumulate) @ w.T) * scale.to(accumulate)[:, None]
    return _finish(y, torch.exp2(row_exponent.to(accumulate) - WEIGHT_EXPONENT_OFFSET), bias, x.dtype)


def _finish(y: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y * column_scale
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if y.dtype is torch.float64 else y.to(dtype)
