"""The bit-level contract of the NestedFP format. Every kernel refers to this page.

A float16 number is a sign S, five exponent bits E4..E0 (bias 15) and ten mantissa bits M9..M0. Where
|w| < 2 the bit E4 is zero, and two bytes keep the sign and the magnitude m = E3..E0 M9..M0:

    code  = m / 128 rounded to nearest, ties to even
    upper = S << 7 | code
    lower = (m + 191) & 0xFF

`upper`, read as E4M3 (bias 7), is the FP8 number nearest to w * 2^8: both formats keep the same four
exponent bits once the biases differ by eight, subnormals included. The largest code is 0x7E, which is 448
or 1.75 * 2^8, as 0x7F is NaN in E4M3. What rounds to it or below, |w| <= 1.8125 (m <= 0x3F40), can be split.

An even code has m from 64 below code << 7 to 64 above it; an odd one, to which no tie rounds, from 63 below
to 63 above, which is 191 to 65 below the next even one's. So m + 191 is 0 to 255 more than a multiple of 256:
half of the code, rounded up, is its high byte, `lower` is its low byte, and

    w = S << 15 | ((code + 1 & 0x7E) << 7 | lower) - 191

Whichever way the code was rounded, rebuilding is a concatenation and one subtraction. The difference is m, so
nothing is borrowed from the sign, nor from a neighbour: two weights in a 32-bit word take one subtraction of
0x00BF00BF. Rounding up is cheaper than down: upper + ((~upper & 0x7E) >> 1), two instructions for the four
codes of a word, is the high byte with its sign, and 63 more, which the subtraction takes back as well. The
low eight bits of m itself would hold as much, but rounding would then have to be found and undone byte by
byte. Not every pair of bytes is a weight: two bytes of zero rebuild to NaN, so a kernel that pads K with
zeros of x must not multiply them with zero bytes.

The splitting follows NestedFP (arXiv 2506.02024), which keeps the low eight bits and leaves a layer with one
larger weight in FP16; here each row carries a power of two that brings its largest magnitude into
(0.875, 1.75], so every row nests, and small rows use E4M3's whole range.

Functions here work on any device and on whole tensors; `nestedfp.weight` walks a layer in row blocks.
"""

import torch
from torch import Tensor

MAX_MAGNITUDE = 1.75
"""The largest |w| that a row exponent leaves: that of E4M3's largest number."""

ROW_EXPONENT_RANGE = (-64, 127)
"""Row exponents fit a signed byte, and 2^s and 2^(s-8) are normal float32 numbers over this range."""

FP8_EXPONENT_OFFSET = 8
"""`upper` read as E4M3 is w * 2^8."""

_LARGEST_BITS = 0x3F40
_OFFSET = 191

ZERO = 0, _OFFSET
"""The two bytes of a weight of zero."""


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float16 `w` (any shape, every |w| <= 1.8125) into its upper and lower bytes.

    Returns two uint8 tensors of w's shape. Raises TypeError for another dtype and ValueError for a
    larger magnitude (NaN and infinities included), which no pair of bytes could rebuild.
    """
    if w.dtype != torch.float16:
        raise TypeError(f"split: w has dtype {w.dtype}, expected torch.float16; convert or nest() it first")
    if bool(((w.view(torch.int16) & 0x7FFF) > _LARGEST_BITS).any()):
        raise ValueError(
            "split: w holds a magnitude above 1.8125, NaN or infinity, expected |w| <= 1.8125; "
            "scale the row by a power of two first, as nest() does"
        )
    return split_unchecked(w)


def split_unchecked(w: Tensor) -> tuple[Tensor, Tensor]:
    """`split` of a float16 `w` that the caller knows to be at most 1.8125: waits for no device."""
    bits = w.view(torch.int16).to(torch.int32) & 0xFFFF
    magnitude = bits & 0x7FFF
    code = (magnitude + 63 + ((magnitude >> 7) & 1)) >> 7
    upper = (bits >> 15) << 7 | code
    lower = magnitude.add_(_OFFSET).bitwise_and_(0xFF)
    return upper.to(torch.uint8), lower.to(torch.uint8)


def rebuild(upper: Tensor, lower: Tensor) -> Tensor:
    """The float16 tensor whose `split` gave `upper` and `lower` (uint8, equal shapes), bit for bit.

    Bytes that no `split` gives are not refused; they rebuild to anything.
    """
    for name, byte in (("upper", upper), ("lower", lower)):
        if byte.dtype != torch.uint8:
            raise TypeError(f"rebuild: {name} has dtype {byte.dtype}, expected torch.uint8")
    if upper.shape != lower.shape:
        raise ValueError(f"rebuild: upper has shape {tuple(upper.shape)}, lower {tuple(lower.shape)}")
    high, low = upper.to(torch.int32), lower.to(torch.int32)
    bits = (high & 0x80) << 8 | ((high + 1 & 0x7E) << 7 | low) - _OFFSET
    return bits.to(torch.int16).view(torch.float16)


def row_exponents(w: Tensor) -> Tensor:
    """For each row of `w` [N, K] the smallest integer s with max|w| * 2^-s <= 1.75, as int8 [N].

    `w` is finite float16 or bfloat16. A row of zeros gets 0, and s is never below -64. Raises ValueError
    for a row beyond 1.75 * 2^127.
    """
    return exponents_of(row_maxima(w))


def row_maxima(w: Tensor) -> Tensor:
    """max|w| of each row of `w` [N, K], float32 [N]; NaN for a row that holds one."""
    return w.abs().amax(dim=1).to(torch.float32)


def exponents_of(largest: Tensor) -> Tensor:
    """`row_exponents` of rows whose largest magnitudes are `largest` [N], finite float32."""
    lowest, highest = ROW_EXPONENT_RANGE
    mantissa, exponent = torch.frexp(largest)
    # largest = (2 * mantissa) * 2^(exponent - 1) with 1 <= 2 * mantissa < 2
    s = exponent - (2 * mantissa <= MAX_MAGNITUDE).to(exponent.dtype)
    s = torch.where(largest == 0, 0, s).clamp_(min=lowest)
    if bool((s > highest).any()):
        raise ValueError(
            f"row {int(s.argmax())} holds a magnitude of {float(largest.max()):.4g}, expected at most "
            f"1.75 * 2^{highest}; such a row cannot be scaled in float32: check the checkpoint"
        )
    return s.to(torch.int8)
