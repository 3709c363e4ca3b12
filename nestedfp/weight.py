"""Nested weights: a layer's matrix as two bytes a weight and one exponent a row.

Row n is stored as the bytes of the float16 numbers w[n] * 2^-s with s = row_exponent[n], its largest
magnitude in (0.875, 1.75] (see `nestedfp.format`); less where s is -64, its least, as in bfloat16 rows of
magnitudes below 2^-64. What rebuilds bit for bit:

* float16, s <= 0: everything, since scaling up loses nothing.
* float16, s > 0: every |w| >= 2^(s-14); below that, multiples of 2^(s-24).
* bfloat16: every |w| >= 2^(s-17), since eight significant bits fit the subnormal grid 2^-24 from 2^-17
  up; below that, multiples of 2^(s-24).

What does not is rounded to that grid, an error of at most 2^(s-25), under 2^-24 of the row's largest weight
where that is above 0.875 * 2^s. Every row is checked when it is nested; nothing is assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nestedfp.format import FP8_EXPONENT_OFFSET, exponents_of, rebuild, row_maxima, split_unchecked
from nestedfp.kernels.layout import KOrder, check_order, to_natural, to_order, unstore
from nestedfp.kernels.layout import rows as rows_of

DTYPES = (torch.float16, torch.bfloat16)

# Temporaries of one block are at most some forty bytes a weight. On a CPU a block is 1/512 of the layer, or
# 64 Ki weights for small layers, which keeps them to a few per cent of the layer. A GPU takes some forty
# launches a block, so there a block is what fills it: 80 MB of temporaries, whatever the layer.
_BLOCKS_PER_LAYER = 512
_SMALLEST_BLOCK = 1 << 16
_GPU_BLOCK = 1 << 21


class NonFiniteWeightError(ValueError):
    """The weight holds NaN or infinity."""


class InexactRowsError(ValueError):
    """Some rows would not rebuild bit for bit; `report` counts them."""

    def __init__(self, report: "Exactness") -> None:
        super().__init__(
            f"{report.inexact_rows} of {report.rows} rows do not rebuild bit for bit (first: row "
            f"{report.first_inexact_row}, largest error {report.max_error:.3g}); keep the layer in 16 bits, "
            "or nest it with require_exact=False to round to nearest"
        )
        self.report = report


@dataclass(frozen=True)
class Exactness:
    """What nesting did to a layer: row counts and the largest |rebuilt - w|.

    `rows_over_limit` are those beyond 1.75, which only a positive row exponent lets in.
    """

    rows: int
    rows_over_limit: int
    largest_exponent: int
    inexact_rows: int
    first_inexact_row: int | None
    max_error: float


@dataclass(frozen=True)
class NestedWeight:
    """The nested form of w [N, K].

    upper, lower: uint8 [N, K], stored in `order`. row_exponent: int8 [N]. dtype: the dtype of w, which
    `merge` restores and which activations must have. exactness: the report of nesting.
    """

    upper: Tensor
    lower: Tensor
    row_exponent: Tensor
    dtype: torch.dtype
    order: KOrder
    exactness: Exactness

    @property
    def shape(self) -> torch.Size:
        return self.upper.shape

    @property
    def nbytes(self) -> int:
        return self.upper.nbytes + self.lower.nbytes + self.row_exponent.nbytes

    def merge(self) -> Tensor:
        """w [N, K], contiguous, natural order: bit for bit what was nested wherever `exactness` says so."""
        w = torch.empty(self.shape, dtype=self.dtype, device=self.upper.device)
        upper, lower = rows_of(self.upper, self.order), rows_of(self.lower, self.order)
        for rows in _row_blocks(w):
            high, low = (byte[rows].reshape(w[rows].shape) for byte in (upper, lower))
            w[rows] = to_natural(_merge_rows(high, low, self.row_exponent[rows], self.dtype), self.order)
        return w

    def fp8(self) -> tuple[Tensor, Tensor]:
        """The FP8 reading: E4M3 [N, K] in natural order and float32 row scales [N], w ~ e4m3 * scale.

        The E4M3 tensor shares memory with `upper` where the stored order is natural.
        """
        codes = unstore(self.upper, self.order).view(torch.float8_e4m3fn)
        return codes, torch.exp2(self.row_exponent.float() - FP8_EXPONENT_OFFSET)


def nest(
    w: Tensor,
    *,
    order: KOrder = KOrder.NATURAL,
    require_exact: bool = True,
    planes: tuple[Tensor, Tensor] | None = None,
) -> NestedWeight:
    """Nests `w` [N, K], float16 or bfloat16, any strides, on any device.

    `planes`: contiguous uint8 [N, K] on that device, beside w's memory, that take the upper and lower bytes;
    by default they are made.

    Raises TypeError for another dtype, ValueError for another rank, an `order` that K does not allow or
    planes that do not fit, NonFiniteWeightError for NaN or infinity, and InexactRowsError where a row would
    not rebuild bit for bit; with `require_exact=False` such weights are rounded to the nearest that can be
    stored.
    """
    if w.dtype not in DTYPES:
        raise TypeError(f"nest: w has dtype {w.dtype}, expected torch.float16 or torch.bfloat16")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"nest: w has shape {tuple(w.shape)}, expected a non-empty [N, K]")
    N, K = w.shape
    check_order(order, K)
    if planes is None:
        upper = torch.empty((N, K), dtype=torch.uint8, device=w.device)
        planes = upper, torch.empty_like(upper)
    _check_planes(planes, w)
    upper, lower = planes
    largest = torch.empty(N, dtype=torch.float32, device=w.device)
    errors = torch.empty(N, dtype=torch.float32, device=w.device)
    inexact = torch.empty(N, dtype=torch.bool, device=w.device)
    for rows in _row_blocks(w):
        largest[rows] = row_maxima(w[rows])
    _check_finite(w, largest)
    exponents = exponents_of(largest)
    for rows in _row_blocks(w):
        block = w[rows]
        scaled = torch.ldexp(block.float(), -exponents[rows, None].int()).half()
        high, low = split_unchecked(scaled)
        rebuilt = _merge_rows(high, low, exponents[rows], w.dtype)
        inexact[rows] = (rebuilt.view(torch.int16) != block.contiguous().view(torch.int16)).any(dim=1)
        errors[rows] = (rebuilt.float() - block.float()).abs().amax(dim=1)
        for stored, byte in ((upper, high), (lower, low)):
            view = rows_of(stored, order)[rows]
            view.copy_(to_order(byte, order).view(view.shape))
    report = _report(exponents, inexact, errors)
    if require_exact and report.inexact_rows:
        raise InexactRowsError(report)
    return NestedWeight(upper, lower, exponents, w.dtype, order, report)


def _row_blocks(w: Tensor) -> Iterator[slice]:
    N, K = w.shape
    weights = max(_SMALLEST_BLOCK, N * K // _BLOCKS_PER_LAYER) if w.device.type == "cpu" else _GPU_BLOCK
    step = max(1, weights // K)
    for start in range(0, N, step):
        yield slice(start, min(start + step, N))


def _check_planes(planes: tuple[Tensor, Tensor], w: Tensor) -> None:
    for name, plane in zip(("upper", "lower"), planes, strict=True):
        found = (plane.dtype, plane.shape, plane.device)
        if found != (torch.uint8, w.shape, w.device) or not plane.is_contiguous():
            raise ValueError(
                f"nest: the {name} plane is {plane.dtype} {tuple(plane.shape)} on {plane.device}, strides "
                f"{plane.stride()}, expected contiguous torch.uint8 {tuple(w.shape)} on {w.device}"
            )
    upper, lower = planes
    if upper.data_ptr() == lower.data_ptr():
        raise ValueError("nest: upper and lower plane are the same memory, expected one for each")


def _check_finite(w: Tensor, largest: Tensor) -> None:
    """Raises NonFiniteWeightError where a row's largest magnitude is not finite; one wait for the device."""
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        row = int((~finite).int().argmax())
        column = int((~torch.isfinite(w[row])).int().argmax())
        raise NonFiniteWeightError(
            f"nest: w[{row}, {column}] is {float(w[row, column])}, expected finite weights; "
            "the checkpoint is damaged or overflowed when it was converted"
        )


def _merge_rows(upper: Tensor, lower: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ldexp(rebuild(upper, lower).float(), exponents[:, None].int()).to(dtype)


def _report(exponents: Tensor, inexact: Tensor, errors: Tensor) -> Exactness:
    found = (inexact.sum(), inexact.int().argmax(), (exponents > 0).sum(), exponents.max(), errors.max())
    count, first, over_limit, largest, error = torch.stack([value.double() for value in found]).tolist()
    return Exactness(
        rows=exponents.numel(),
        rows_over_limit=int(over_limit),
        largest_exponent=int(largest),
        inexact_rows=int(count),
        first_inexact_row=int(first) if count else None,
        max_error=error,
    )
