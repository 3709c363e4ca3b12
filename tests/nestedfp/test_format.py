"""The byte format against references that share none of its code: IEEE arithmetic and brute force."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.format import ZERO, rebuild, row_exponents, split
from nestedfp.kernels.reference import rebuild_16bit

ALL_FP16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
EXACT = ALL_FP16[ALL_FP16.abs().nan_to_num(nan=torch.inf) <= 1.8125]


def e4m3_value(code: int) -> float:
    """OCP 8-bit floating point, E4M3: bias 7, no infinities, S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3_value(code) for code in range(256)])


def test_covers_every_promised_pattern() -> None:
    # |w| <= 1.8125 is 0x0000..0x3F40 of either sign
    assert len(EXACT) == 2 * 0x3F41


def test_rebuild_is_the_inverse_of_split_bit_for_bit() -> None:
    rebuilt = rebuild(*split(EXACT))
    assert torch.equal(rebuilt.view(torch.int16), EXACT.view(torch.int16))


def test_the_reference_of_the_kernels_rebuilds_the_same() -> None:
    rebuilt = rebuild_16bit(*(byte[None] for byte in split(EXACT)))[0]
    assert torch.equal(rebuilt.view(torch.int16), EXACT.view(torch.int16))


def test_rebuild_matches_arithmetic_on_struct_packed_halves() -> None:
    # The value of every rebuilt pattern, read by Python's own half-precision decoder.
    upper, lower = split(EXACT)
    patterns = rebuild(upper, lower).view(torch.int16).tolist()
    values = [struct.unpack("<e", struct.pack("<h", bits))[0] for bits in patterns]
    assert values == EXACT.double().tolist()


def test_upper_is_the_nearest_e4m3_by_brute_force() -> None:
    upper = split(EXACT)[0].numpy()
    scaled = EXACT.double().numpy() * 256
    candidates = np.where(np.isnan(E4M3), np.inf, E4M3)
    for code, value in zip(upper.tolist(), scaled.tolist(), strict=True):
        distance = np.abs(candidates - value)
        nearest = np.flatnonzero(distance == distance.min())
        same_sign = [c for c in nearest.tolist() if bool(c & 0x80) == (math.copysign(1, value) < 0)]
        # A tie goes to the code with an even mantissa.
        expected = same_sign[0] if len(same_sign) == 1 else next(c for c in same_sign if c % 2 == 0)
        assert code == expected, f"{value / 256!r}: upper {code:#04x}, nearest {expected:#04x}"


def test_upper_agrees_with_torch_conversion() -> None:
    upper = split(EXACT)[0]
    reference = (EXACT.float() * 256).to(torch.float8_e4m3fn)
    assert torch.equal(upper, reference.view(torch.uint8))


def magnitude_bits(w: torch.Tensor) -> np.ndarray:
    return np.abs(w.numpy()).view(np.uint16).astype(np.int64)


def test_lower_is_the_distance_from_an_even_code_plus_191() -> None:
    upper, lower = (byte.numpy().astype(np.int64) for byte in split(EXACT))
    code = upper % 128
    # An even code, read eight binades lower, is itself a float16 number: the one that the distance is from.
    even = torch.from_numpy(np.abs(E4M3)[code + code % 2] / 256).half()
    distance = magnitude_bits(EXACT) - magnitude_bits(even)
    assert (lower == distance + 191).all()
    odd = code % 2 == 1
    assert distance[odd].min() == -191
    assert distance[odd].max() == -65
    assert distance[~odd].min() == -64
    assert distance[~odd].max() == 64


@pytest.mark.parametrize("half", [0, 1])
def test_one_subtraction_rebuilds_two_weights(half: int) -> None:
    """Every weight in one half of a word beside extremes in the other: a borrow would change either."""
    upper, lower = (byte.numpy().astype(np.int64) for byte in split(EXACT))
    patterns = EXACT.view(torch.int16).numpy().astype(np.int64) % 65536
    joined = (upper & 0x80) << 8 | (upper % 128 + 1) // 2 << 8 | lower
    extremes = np.flatnonzero(np.isin(patterns % 0x8000, [0, 1, 64, 65, 191, 192, 193, 0x3EFF, 0x3F40]))
    assert len(extremes) == 18
    for other in extremes:
        pair = [joined, joined[other]] if half == 0 else [joined[other], joined]
        expected = [patterns, patterns[other]] if half == 0 else [patterns[other], patterns]
        words = (pair[1] << 16 | pair[0]) - 0x00BF00BF
        assert (words == (expected[1] << 16 | expected[0])).all()


@pytest.mark.parametrize("other", [code for code in range(256) if code % 128 != 127])
def test_two_instructions_join_the_codes_of_four_weights(other: int) -> None:
    """Every code beside another in a word, signs among them: less 63, the high bytes that `rebuild` joins."""
    codes = np.array([code for code in range(256) if code % 128 != 127])
    for place in range(4):
        bytes_of = np.full((len(codes), 4), other)
        bytes_of[:, place] = codes
        word = (bytes_of << np.arange(4) * 8).sum(axis=1)
        made = word + ((~word & 0x7E7E7E7E) >> 1) - 0x3F3F3F3F
        high = bytes_of // 128 * 128 + (bytes_of % 128 + 1) // 2
        assert (made == (high << np.arange(4) * 8).sum(axis=1)).all()


def test_the_bytes_of_zero() -> None:
    assert tuple(int(byte) for byte in split(torch.zeros(1, dtype=torch.float16))) == ZERO


@pytest.mark.parametrize("value", [1.8135, -1.8135, 2.0, 65504.0, math.inf, -math.inf, math.nan])
def test_split_refuses_what_cannot_be_rebuilt(value: float) -> None:
    with pytest.raises(ValueError, match=r"1\.8125"):
        split(torch.tensor([0.5, value], dtype=torch.float16))


def test_wrong_operands_are_named() -> None:
    with pytest.raises(TypeError, match="float32"):
        split(torch.zeros(3))
    byte = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="lower"):
        rebuild(byte, torch.zeros(3, dtype=torch.int8))
    with pytest.raises(ValueError, match="shape"):
        rebuild(byte, byte[:2])


def smallest_exponent(largest: float) -> int:
    """By search, not by formula."""
    if largest == 0:
        return 0
    return next(s for s in range(-64, 128) if math.ldexp(largest, -s) <= 1.75)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_row_exponent_is_the_smallest_that_fits(values: list[float], dtype: torch.dtype) -> None:
    row = torch.tensor([values], dtype=dtype)
    assert row_exponents(row).tolist() == [smallest_exponent(float(row.double().abs().max()))]


def test_row_exponent_range_ends() -> None:
    tiny = torch.tensor([[2.0**-130]], dtype=torch.bfloat16)
    assert row_exponents(tiny).tolist() == [-64]
    largest = torch.tensor([[1.75 * 2.0**127]], dtype=torch.bfloat16)
    assert row_exponents(largest).tolist() == [127]
    with pytest.raises(ValueError, match="row 1"):
        row_exponents(torch.tensor([[1.0], [1.9 * 2.0**127]], dtype=torch.bfloat16))
