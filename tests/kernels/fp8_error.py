"""How far an FP8 product may be from float64 on the same quantised operands, in norm and element by element.

wgmma aligns an instruction's 32 products and the sum so far to the largest of them and cuts off what lies
more than 13 bits below (a unit). Its 33 terms lose half a unit each on average; where signs are random so
are the losses, and an instruction loses sqrt(33) / 2 units. Sums, and units with them, grow with the square
root of the number of instructions, so that K / 32 of them lose

    sqrt(33) / 2 * 2^-13 * sqrt(K / 64)

of the norm of the products that an element adds up: 0.28 % at K = 4096, 0.79 % at 32768. Measured on an H100
with normal data: 0.12 % and 0.47 %. A promoted product adds up one stage in wgmma and the stages in float32,
so K is the stage's, whatever the matrix has. On operands of one sign losses add up, and nothing here holds.

Outputs are rounded once to their dtype. Single elements may lie ten times as far off as the norm: normally
distributed errors of a million elements reach five times, of operands with few large values more (one of 25
million was seen at 8.2). And the
larger an element's own sum, the larger are the units that it loses: 1.7 times as much on average where it
is four times the norm of its products or more (what wgmma does, emulated for the operands of the tests), as
some hundreds of ten million elements are. So two and a half times the sum is allowed beside that.
"""

import torch
from torch import Tensor

from nestedfp.kernels import reference
from nestedfp.kernels.layout import KOrder, unstore

_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SMALLEST = 2.0**-24
_SINGLE_ELEMENTS = 10
_LARGE_SUMS = 2.5


def accumulation_error(summed: int) -> float:
    """Of `summed` products added up by wgmma alone, relative to their norm."""
    return 33**0.5 / 2 * 2.0**-13 * max(1.0, summed / 64) ** 0.5


def assert_product(
    y: Tensor,
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    order: KOrder,
    *,
    summed: int | None = None,
    note: object = "",
) -> None:
    """That y is the product of the operands; `summed` is K unless wgmma's sums were promoted earlier."""
    operands = (x, upper, row_exponent)
    truth = reference.linear_fp8(*operands, bias, order=order, accumulate=torch.float64)
    allowed = accumulation_error(summed or x.shape[1])
    rounding = _ROUNDING[y.dtype]
    difference = (y.double() - truth).abs()
    relative, most = float(difference.norm() / truth.norm()), allowed + rounding
    assert relative < most, f"{relative:.2g} off in norm, {most:.2g} allowed {note}"

    spread = torch.hypot(_SINGLE_ELEMENTS * products_norm(*operands, order), _LARGE_SUMS * truth)
    limit = allowed * spread + 2 * rounding * truth.abs() + _SMALLEST
    wrong = ~(difference <= limit)
    worst = float((difference / limit).max())
    where = wrong.nonzero()
    assert not len(where), f"{len(where)} wrong, first at {where[0].tolist()}, {worst:.3g} limits {note}"


def products_norm(x: Tensor, upper: Tensor, row_exponent: Tensor, order: KOrder) -> Tensor:
    """float64 [M, N]: of the products that each element adds up, the square root of the sum of squares."""
    codes, scale = reference.quantize(x)
    w = unstore(upper, order).view(torch.float8_e4m3fn).double()
    squares = codes.double().square() @ w.square().T
    factors = torch.exp2(row_exponent.double() - reference.WEIGHT_EXPONENT_OFFSET)
    return squares.sqrt() * scale.double()[:, None] * factors
