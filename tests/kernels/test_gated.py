"""Gated products on a CPU, and how their weights' rows lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.kernels import linear_16bit, linear_fp8
from nestedfp.kernels.gated import TURN, interleave, silu_and_multiply
from nestedfp.kernels.layout import KOrder, rows
from nestedfp.weight import nest


@pytest.mark.parametrize("order", list(KOrder))
def test_rows_lie_in_turn(order: KOrder) -> None:
    """Row i of the gate and of its partner, one by one."""
    d, K = 24, 256
    stored = torch.arange(2 * d * K).view(2 * d, K)
    to = torch.zeros_like(stored)
    interleave(to, stored, order)
    before, after = rows(stored, order), rows(to, order)
    for i in range(d):
        place = i // TURN * 2 * TURN + i % TURN
        assert torch.equal(after[place], before[i])
        assert torch.equal(after[place + TURN], before[d + i])


def test_vectors_lie_like_rows() -> None:
    exponents = torch.arange(32, dtype=torch.int8)
    to = torch.empty_like(exponents)
    interleave(to, exponents, KOrder.NATURAL)
    assert to.tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]


@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_product_is_silu_of_one_half_times_the_other(seed: int, M: int, dtype: torch.dtype) -> None:
    """Against the two products of the halves, which are known to be right, and float64 from there on."""
    generator = torch.Generator().manual_seed(seed)
    d, K = 16, 64
    w = torch.randn(2 * d, K, generator=generator).to(dtype)
    x = torch.randn(M, K, generator=generator).to(dtype)
    w_turned = torch.empty_like(w)
    interleave(w_turned, w, KOrder.NATURAL)
    nested = nest(w_turned, require_exact=False)
    halves = [nest(half.contiguous(), require_exact=False) for half in w.split(d)]
    for fp8 in (False, True):
        if fp8:
            y = linear_fp8(x, nested.upper, nested.row_exponent, gated=True)
            gate, up = (linear_fp8(x, half.upper, half.row_exponent).double() for half in halves)
        else:
            y = linear_16bit(x, nested.upper, nested.lower, nested.row_exponent, gated=True)
            gate, up = (
                linear_16bit(x, half.upper, half.lower, half.row_exponent).double() for half in halves
            )
        exact = gate / (1 + (-gate).exp()) * up
        assert y.shape == (M, d)
        assert y.dtype == dtype
        # The halves' own sums may round the other way now and then.
        torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


def test_silu_and_multiply_rounds_once() -> None:
    products = torch.randn(7, 48).to(torch.bfloat16)
    gate, up = products.double().unflatten(-1, (-1, 2, TURN)).unbind(-2)
    expected = (gate / (1 + (-gate).exp()) * up).flatten(-2)
    y = silu_and_multiply(products)
    assert y.shape == (7, 24)
    assert ((y.double() - expected).abs() <= expected.abs() * 1.001 * 2.0**-8).all()


def test_no_tokens() -> None:
    nested = nest(torch.randn(32, 64).half(), require_exact=False)
    y = linear_16bit(
        torch.empty(0, 3, 64, dtype=torch.float16),
        nested.upper,
        nested.lower,
        nested.row_exponent,
        gated=True,
    )
    assert y.shape == (0, 3, 16)


def test_rows_that_form_no_pairs_are_refused() -> None:
    nested = nest(torch.randn(24, 64).half(), require_exact=False)
    with pytest.raises(ValueError, match="N = 24, expected a multiple of 16"):
        linear_fp8(torch.zeros(1, 64).half(), nested.upper, nested.row_exponent, gated=True)
