"""The linear product over a nested weight, at either precision."""

from torch import Tensor

from nestedfp.kernels import linear_16bit, linear_fp8
from nestedfp.precision import Precision
from nestedfp.weight import NestedWeight


def nested_linear(
    x: Tensor, weight: NestedWeight, bias: Tensor | None = None, precision: Precision = Precision.FP16
) -> Tensor:
    """y = x wᵀ + bias for x [..., K], giving [..., N] in x's dtype, which must be the weight's source dtype.

    `Precision.FP16` multiplies by the exact 16-bit weights; `Precision.FP8` quantises each token of x to
    E4M3 and multiplies by the upper bytes. Raises TypeError or ValueError for operands that do not fit.
    """
    if x.dtype != weight.dtype:
        raise TypeError(
            f"nested_linear: x has dtype {x.dtype}, the weight was nested from {weight.dtype}; convert x, or "
            "nest the weight in the dtype the model runs in"
        )
    if precision is Precision.FP8:
        return linear_fp8(x, weight.upper, weight.row_exponent, bias, order=weight.order)
    return linear_16bit(x, weight.upper, weight.lower, weight.row_exponent, bias, order=weight.order)
