"""Nesting whole layers: exactness, its stated bounds, reports, and the errors of bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nestedfp import InexactRowsError, NestedWeight, NonFiniteWeightError, nest
from nestedfp.kernels.layout import KOrder

finite_fp16 = hnp.arrays(
    np.float16,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(width=16, allow_nan=False, allow_infinity=False, allow_subnormal=True),
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def gaussian(N: int, K: int, dtype: torch.dtype, deviation: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * 1000 + K)
    return (torch.randn(N, K, generator=generator) * deviation).to(dtype)


def exactly_storable(row: np.ndarray) -> bool:
    """In integers: every weight over 2^s is a float16 number."""
    largest = float(np.abs(row).max())
    if largest == 0:
        return True
    s = next(s for s in range(-64, 128) if math.ldexp(largest, -s) <= 1.75)
    with np.errstate(under="ignore"):
        return all(float(np.float16(math.ldexp(float(v), -s))) == math.ldexp(float(v), -s) for v in row)


@settings(max_examples=200, deadline=None)
@given(finite_fp16)
def test_merge_is_exact_or_the_row_is_reported(values: np.ndarray) -> None:
    w = torch.from_numpy(values)
    nested = nest(w, require_exact=False)
    storable = [exactly_storable(row) for row in values]
    assert nested.exactness.inexact_rows == storable.count(False)
    merged = nested.merge()
    for row, exact in enumerate(storable):
        assert same_bits(merged[row], w[row]) == exact
    if all(storable):
        assert nest(w).exactness == nested.exactness
    else:
        with pytest.raises(InexactRowsError, match=f"row {storable.index(False)}"):
            nest(w)


@settings(max_examples=200, deadline=None)
@given(finite_fp16)
def test_inexact_weights_stay_within_the_stated_bound(values: np.ndarray) -> None:
    nested = nest(torch.from_numpy(values), require_exact=False)
    error = np.abs(nested.merge().double().numpy() - values.astype(np.float64)).max(axis=1)
    bound = np.ldexp(1.0, nested.row_exponent.int().numpy() - 25)
    assert (error <= bound).all()
    largest = np.abs(values.astype(np.float64)).max(axis=1)
    assert (error <= np.ldexp(largest, -24)).all()


@pytest.mark.parametrize("outlier", [1.75, 1.875, 2.0, 3.5, 240.0, 65504.0])
def test_rows_with_outliers_nest_and_are_counted(outlier: float) -> None:
    w = torch.full((3, 64), 0.5, dtype=torch.float16)
    w[1, 7] = -outlier
    nested = nest(w)
    assert same_bits(nested.merge(), w)
    assert nested.exactness.rows_over_limit == (1 if outlier > 1.75 else 0)


def test_zeros_negative_zeros_and_subnormals_keep_their_bits() -> None:
    w = torch.tensor(
        [[0.0, -0.0, 0.0, -0.0], [2.0**-24, -(2.0**-24), 0.0, -0.0], [1.75, 2.0**-24, -(2.0**-15), -0.0]],
        dtype=torch.float16,
    )
    nested = nest(w)
    assert same_bits(nested.merge(), w)
    assert nested.row_exponent.tolist() == [0, -24, 0]


def test_bfloat16_is_exact_from_the_stated_magnitude_up() -> None:
    # One row with largest weight 1.75 (s = 0) and every bfloat16 number of the promised range.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    magnitude = patterns.float().abs()
    promised = patterns[(magnitude <= 1.75) & (magnitude >= 2.0**-17)]
    nested = nest(promised[None])
    assert nested.row_exponent.tolist() == [0]
    assert same_bits(nested.merge(), promised[None])
    just_below = torch.tensor([[1.75, 2.0**-17 - 2.0**-25]], dtype=torch.bfloat16)
    with pytest.raises(InexactRowsError):
        nest(just_below)


def test_bfloat16_beyond_float16_range_nests() -> None:
    w = torch.tensor([[1e30, -3e29, 2.5e27], [1e-30, 3e-31, 0.0]], dtype=torch.bfloat16)
    nested = nest(w[:1])
    assert same_bits(nested.merge(), w[:1])
    with pytest.raises(InexactRowsError):
        nest(w)


def test_shifted_rows_lose_only_below_the_stated_magnitude() -> None:
    # s = 3: exact from 2^(3-14) up, and below that for multiples of 2^(3-24).
    kept = torch.tensor([[14.0, 2.0**-11 + 2.0**-21, 2.0**-20, 2.0**-21]], dtype=torch.float16)
    assert same_bits(nest(kept).merge(), kept)
    lost = torch.tensor([[14.0, 2.0**-12 + 2.0**-22]], dtype=torch.float16)
    report = nest(lost, require_exact=False).exactness
    assert (report.inexact_rows, report.max_error) == (1, 2.0**-22)


def test_fp8_reading_is_the_nearest_e4m3_of_the_scaled_row() -> None:
    w = gaussian(9, 130, torch.float16)
    codes, scale = nest(w).fp8()
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    expected = (w.double() / scale.double()[:, None]).float().to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert float(codes.float().abs().amax(dim=1).min()) >= 224  # every row reaches 0.875 * 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_order_changes_neither_reading(dtype: torch.dtype) -> None:
    w = gaussian(5, 256, dtype)
    natural = nest(w, require_exact=False)
    hopper = nest(w, order=KOrder.HOPPER, require_exact=False)
    assert not torch.equal(natural.upper, hopper.upper)
    assert same_bits(natural.merge(), hopper.merge())
    assert torch.equal(natural.fp8()[0].view(torch.uint8), hopper.fp8()[0].view(torch.uint8))
    # Panels of five rows: position 2 of a row (t, s, j, b = 0, h = 1) holds column 8, position 16 column 64.
    panels = hopper.upper.view(2, 5, 128)
    assert torch.equal(panels[1, :, 2], natural.upper[:, 128 + 8])
    assert torch.equal(panels[0, :, 16], natural.upper[:, 64])


def test_hopper_order_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        nest(gaussian(4, 100, torch.float16), order=KOrder.HOPPER)


def test_non_contiguous_input_gives_the_same_bytes() -> None:
    w = gaussian(48, 80, torch.float16)
    strided = nest(w.t()[::2, 3:])
    assert same_bits(strided.merge(), w.t()[::2, 3:].contiguous())


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_weights_are_located(value: float, shown: str) -> None:
    w = gaussian(600, 300, torch.float16)
    w[431, 17] = value
    with pytest.raises(NonFiniteWeightError, match=rf"w\[431, 17\] is {shown}"):
        nest(w)


@pytest.mark.parametrize(
    ("w", "error", "match"),
    [
        (torch.zeros(4, 4), TypeError, "float32"),
        (torch.zeros(4, 4, dtype=torch.int8), TypeError, "int8"),
        (torch.zeros(4, dtype=torch.float16), ValueError, r"shape \(4,\)"),
        (torch.zeros(2, 3, 4, dtype=torch.float16), ValueError, r"shape \(2, 3, 4\)"),
        (torch.zeros(0, 4, dtype=torch.float16), ValueError, "non-empty"),
    ],
)
def test_bad_input_is_named(w: torch.Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        nest(w)


def test_rows_too_small_for_an_exponent_are_rounded_and_reported() -> None:
    w = torch.full((2, 64), 1.0, dtype=torch.bfloat16)
    w[1] = 2.0**-100
    with pytest.raises(InexactRowsError, match="row 1"):
        nest(w)
    nested = nest(w, require_exact=False)
    assert nested.row_exponent.tolist() == [0, -64]
    assert nested.exactness.inexact_rows == 1
    assert same_bits(nested.merge()[0], w[0])
    assert not nested.merge()[1].any()


PLANE = torch.zeros(4, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("planes", "match"),
    [
        ((PLANE.float(), PLANE.clone()), r"upper plane is torch.float32 \(4, 8\)"),
        ((PLANE.clone(), torch.zeros(8, 8, dtype=torch.uint8)), r"lower plane is torch.uint8 \(8, 8\)"),
        ((PLANE.clone(), torch.zeros(8, 4, dtype=torch.uint8).T), r"strides \(1, 4\), expected contiguous"),
        ((PLANE.to("meta"), PLANE.clone()), "upper plane is .* on meta.* expected .* on cpu"),
        ((PLANE, PLANE), "same memory"),
    ],
)
def test_planes_that_do_not_fit_are_named(planes: tuple[torch.Tensor, torch.Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nest(gaussian(4, 8, torch.float16), planes=planes)


def test_memory_is_two_bytes_a_weight_and_one_a_row() -> None:
    w = gaussian(1000, 576, torch.float16)
    nested = nest(w)
    assert nested.nbytes == w.nbytes + 1000


def largest_torch_allocation(w: torch.Tensor) -> tuple[NestedWeight, int]:
    """Peak bytes torch held at once while nesting `w`, by its profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        nested = nest(w, require_exact=False)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return nested, peak


def test_temporaries_are_a_few_per_cent_of_the_layer() -> None:
    w = gaussian(6144, 4096, torch.float16)
    nested, peak = largest_torch_allocation(w)
    assert peak >= nested.nbytes  # the profile saw the result itself
    assert peak - nested.nbytes < 0.06 * w.nbytes
