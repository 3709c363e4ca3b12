"""The CPU products against float64 arithmetic on weights decoded by hand."""

import math
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestedfp.kernels import cpu
from nestedfp.kernels.layout import KOrder, to_order

DTYPES = [torch.float16, torch.bfloat16]
FINITE_CODES = [code for code in range(256) if code & 0x7F != 0x7F]


def e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 0x80 else magnitude


E4M3 = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64)
E4M3_MAGNITUDES = E4M3[:0x7F].contiguous()


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of float16 `w`, |w| <= 1.8125: `upper` by searching for the nearest E4M3 code to w * 2^8."""
    bits = w.view(torch.int16).int() & 0xFFFF
    code = nearest_code(w.double() * 2**8)
    lower = bits % 2**15 - 256 * ((code + 1) // 2) + 191
    return (code + 128 * (bits >> 15)).to(torch.uint8), lower.to(torch.uint8)


def nearest_code(value: Tensor) -> Tensor:
    """Positive E4M3 codes nearest to |value|, ties to the even code, saturating."""
    magnitude = value.abs().clamp(max=448).contiguous()
    above = torch.searchsorted(E4M3_MAGNITUDES, magnitude).clamp(1, 0x7E)
    below = above - 1
    down = magnitude - E4M3_MAGNITUDES[below]
    up = E4M3_MAGNITUDES[above] - magnitude
    even = torch.where(below % 2 == 0, below, above)
    return torch.where(down < up, below, torch.where(up < down, above, even)).int()


def quantized(x: Tensor) -> Tensor:
    """x rounded to E4M3 with scale amax / 448 a row, in float64.

    The ratio 448 / amax and its product with x are rounded to float32, as the contract of the quantiser has
    it; the rounding to E4M3 is a search.
    """
    amax = x.float().abs().amax(dim=1, keepdim=True).clamp_min(2.0**-100)
    scaled = x.float() * (torch.full_like(amax, 448.0) / amax)
    codes = nearest_code(scaled.double())
    return E4M3[codes.long()].copysign(scaled.double()) * (amax / 448.0).double()


@dataclass(frozen=True)
class Case:
    """A product with its operands; weights are float16 numbers times 2^row_exponent."""

    x: Tensor
    w: Tensor
    row_exponent: Tensor
    bias: Tensor | None

    def check(self, fp8: bool, order: KOrder = KOrder.NATURAL) -> None:
        upper, lower = (to_order(byte, order).contiguous() for byte in split(self.w))
        scale = torch.exp2(self.row_exponent.double())
        if fp8:
            actual = cpu.linear_fp8(self.x, upper, self.row_exponent, self.bias, order=order)
            signed = E4M3[split(self.w)[0].long()]
            tokens, weights = quantized(self.x), signed * 2.0**-8 * scale[:, None]
        else:
            actual = cpu.linear_16bit(self.x, upper, lower, self.row_exponent, self.bias, order=order)
            tokens, weights = self.x.double(), self.w.double() * scale[:, None]
        bias = torch.zeros(1).double() if self.bias is None else self.bias.double()
        assert_rounded_sum(actual, tokens, weights, bias)


def assert_rounded_sum(actual: Tensor, tokens: Tensor, weights: Tensor, bias: Tensor) -> None:
    """`actual` is the exact sum, added up in float32 in some order and rounded once to its dtype.

    At most K + 3 float32 roundings, each of at most half a unit of the sum of magnitudes.
    """
    exact = tokens @ weights.T + bias
    magnitudes = tokens.abs() @ weights.T.abs() + bias.abs()
    accumulation = magnitudes * (tokens.shape[1] + 3) * 2.0**-24
    information = torch.finfo(actual.dtype)
    rounding = (
        exact.abs() + accumulation
    ) * information.eps / 2 + information.smallest_normal * information.eps
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    assert bool((error <= accumulation + rounding).all()), (
        f"off by {(error / (accumulation + rounding)).max()}"
    )


def make(M: int, N: int, K: int, dtype: torch.dtype, seed: int = 0, bias: bool = True) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        x=normal(M, K).to(dtype),
        w=(normal(N, K) * 0.3).clamp(-1.75, 1.75).half(),
        row_exponent=torch.randint(-3, 4, (N,), generator=generator).to(torch.int8),
        bias=normal(N).to(dtype) if bias else None,
    )


shapes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 150))


@pytest.mark.parametrize("fp8", [False, True])
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999), bias=st.booleans())
@example(shape=(1, 16, 16), dtype=torch.float16, seed=0, bias=False)
@example(shape=(4, 17, 15), dtype=torch.float16, seed=0, bias=True)
@example(shape=(5, 16, 17), dtype=torch.bfloat16, seed=0, bias=True)
@settings(max_examples=100, deadline=None)
def test_any_shape(fp8: bool, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, bias: bool) -> None:
    make(*shape, dtype, seed, bias).check(fp8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(8, 96, 576), (64, 40, 1536), (300, 35, 700), (1, 50, 4096)])
def test_shapes_that_span_panels_and_threads(
    shape: tuple[int, int, int], fp8: bool, dtype: torch.dtype
) -> None:
    make(*shape, dtype).check(fp8)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_reads_as_its_e4m3_value(tokens: int, dtype: torch.dtype) -> None:
    """Tokens of one non-zero element each pick out a column, here each finite code in turn."""
    upper = torch.tensor(FINITE_CODES, dtype=torch.uint8).repeat(16, 1)
    K = upper.shape[1]
    columns = torch.arange(K)
    exponents = torch.full((16,), 8, dtype=torch.int8)
    for first in range(0, K, tokens):
        x = torch.zeros(tokens, K, dtype=dtype)
        picked = columns[first : first + tokens]
        x[torch.arange(len(picked)), picked] = 1
        y = cpu.linear_fp8(x, upper, exponents)
        expected = E4M3[upper[0, picked].long()].to(dtype)
        assert torch.equal(y[: len(picked)], expected[:, None].expand(-1, 16))


@pytest.mark.parametrize("tokens", [1, 8])
def test_every_float16_below_the_limit_is_rebuilt(tokens: int) -> None:
    w = torch.arange(0x3F41, dtype=torch.int16).view(torch.float16)
    w = torch.cat([w, -w, w[: -2 * len(w) % 128]]).reshape(-1, 128)
    upper, lower = split(w)
    exponents = torch.zeros(w.shape[0], dtype=torch.int8)
    x = torch.eye(128, dtype=torch.float16)
    for first in range(0, 128, tokens):
        y = cpu.linear_16bit(x[first : first + tokens], upper, lower, exponents)
        assert torch.equal(y, w[:, first : first + tokens].T)


@given(st.lists(st.floats(-448, 448, width=16), min_size=1, max_size=60), st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_tokens_are_rounded_to_the_nearest_e4m3(values: list[float], dtype: torch.dtype) -> None:
    """With amax 448 the scale is one, and an identity weight shows the quantised token itself."""
    x = torch.tensor([[448.0, *values]]).to(dtype)
    K = x.shape[1]
    upper, _ = split(torch.eye(K, dtype=torch.float16))
    y = cpu.linear_fp8(x, upper, torch.zeros(K, dtype=torch.int8))
    expected = E4M3[nearest_code(x.double()).long()].copysign(x.double())
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("fp8", [False, True])
def test_strided_tokens(fp8: bool) -> None:
    case = make(9, 33, 70, torch.float16)
    wide = torch.full((9, 100), math.nan, dtype=torch.float16)
    wide[:, 20:90] = case.x
    transposed = case.x.T.contiguous().T
    for x in (wide[:, 20:90], transposed, case.x.repeat_interleave(2, dim=1)[:, ::2]):
        Case(x, case.w, case.row_exponent, case.bias).check(fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_order(fp8: bool, dtype: torch.dtype) -> None:
    make(6, 20, 128, dtype).check(fp8, KOrder.HOPPER)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("exponent", [-64, -20, 15, 100, 127])
def test_extreme_row_exponents(fp8: bool, exponent: int) -> None:
    case = make(3, 20, 64, torch.bfloat16, bias=False)
    x = (case.x * 2.0 ** (-60 if exponent > 0 else 60)).to(torch.bfloat16)
    Case(x, case.w, torch.full((20,), exponent, dtype=torch.int8), None).check(fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_beyond_the_dtype_overflow_to_infinity(fp8: bool, dtype: torch.dtype) -> None:
    upper, lower = split(torch.ones(16, 16, dtype=torch.float16))
    x = torch.full((1, 16), torch.finfo(dtype).max, dtype=dtype)
    exponents = torch.zeros(16, dtype=torch.int8)
    y = cpu.linear_fp8(x, upper, exponents) if fp8 else cpu.linear_16bit(x, upper, lower, exponents)
    assert bool((y == math.inf).all())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 7])
def test_nan_and_infinity_spoil_their_token_alone(fp8: bool, dtype: torch.dtype, tokens: int) -> None:
    case = make(tokens, 20, 50, dtype)
    upper, lower = split(case.w)
    for bad in (math.nan, math.inf):
        x = case.x.clone()
        x[1, 13] = bad
        if fp8:
            y = cpu.linear_fp8(x, upper, case.row_exponent, case.bias)
        else:
            y = cpu.linear_16bit(x, upper, lower, case.row_exponent, case.bias)
        assert not bool(y[1].isfinite().any())
        assert bool(y[torch.arange(tokens) != 1].isfinite().all())


@pytest.mark.parametrize("fp8", [False, True])
def test_zero_tokens_give_the_bias(fp8: bool) -> None:
    case = make(3, 20, 40, torch.float16)
    zeros = torch.zeros_like(case.x)
    upper, lower = split(case.w)
    if fp8:
        y = cpu.linear_fp8(zeros, upper, case.row_exponent, case.bias)
    else:
        y = cpu.linear_16bit(zeros, upper, lower, case.row_exponent, case.bias)
    assert case.bias is not None
    assert torch.equal(y, case.bias.expand(3, -1))
    assert cpu.linear_fp8(zeros[:0], upper, case.row_exponent).shape == (0, 20)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_token_does_not_depend_on_threads_or_on_its_batch(fp8: bool) -> None:
    """Bit for bit, so that greedy output is the same however requests were batched."""
    case = make(20, 100, 1500, torch.float16)
    upper, lower = split(case.w)

    def product(x: Tensor) -> Tensor:
        if fp8:
            return cpu.linear_fp8(x, upper, case.row_exponent, case.bias)
        return cpu.linear_16bit(x, upper, lower, case.row_exponent, case.bias)

    expected = product(case.x)
    for batch in (1, 2, 3, 4, 5, 7, 11):
        parts = [product(case.x[first : first + batch]) for first in range(0, 20, batch)]
        assert torch.equal(torch.cat(parts), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(product(case.x), expected)
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads_at_once() -> None:
    cases = [make(M, 64, 300, torch.float16, seed=M) for M in (1, 3, 6, 20)]
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            for _ in range(20):
                case.check(fp8=False)
                case.check(fp8=True)
        except AssertionError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(case,)) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_warm_up_compiles_once() -> None:
    cpu.warm_up()
    assert cpu.warm_up() < 0.01


def test_importing_the_products_loads_no_compiler() -> None:
    """vLLM's worker fails to start in a process that has llvmlite loaded."""
    program = "import sys, nestedfp.kernels.cpu; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
