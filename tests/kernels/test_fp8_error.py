"""What the check of FP8 products lets through, and what it finds."""

import pytest
import torch
from torch import Tensor

from nestedfp.kernels import reference
from nestedfp.kernels.layout import KOrder, store

from .fp8_error import accumulation_error, assert_product, products_norm

M, N, K = 40, 96, 4096
orders = pytest.mark.parametrize("order", list(KOrder), ids=str)


@pytest.fixture(scope="module")
def operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(M, K, generator=generator).half()
    upper = torch.randint(0, 256, (N, K), generator=generator).to(torch.uint8)
    upper[(upper & 0x7F) == 0x7F] = 0x40
    # Rows that are not alike, small ones too: a check that mixes them up would let errors of these through.
    upper[N // 2 :] &= 0x87
    row_exponent = torch.randint(-9, 5, (N,), generator=generator).to(torch.int8)
    return x, upper, row_exponent, torch.randn(N, generator=generator).half()


def exact(operands: tuple[Tensor, ...]) -> Tensor:
    return reference.linear_fp8(*operands, accumulate=torch.float64)


def test_the_error_follows_from_what_wgmma_sums() -> None:
    assert accumulation_error(32) == accumulation_error(64) == pytest.approx(3.5e-4, rel=0.01)
    assert accumulation_error(4096) == pytest.approx(2.8e-3, rel=0.01)
    assert accumulation_error(32768) == pytest.approx(7.9e-3, rel=0.01)


def stored(operands: tuple[Tensor, ...], order: KOrder) -> tuple[Tensor, ...]:
    x, upper, row_exponent, bias = operands
    return x, store(upper, order), row_exponent, bias


@orders
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_and_accumulation_pass(
    operands: tuple[Tensor, ...], dtype: torch.dtype, order: KOrder
) -> None:
    x, upper, row_exponent, bias = operands
    operands = (x.to(dtype), upper, row_exponent, bias.to(dtype))
    noise = torch.randn(M, N, generator=torch.Generator().manual_seed(4)).double()
    lost = 0.9 * accumulation_error(K) * noise * products_norm(*operands[:3], KOrder.NATURAL)
    assert_product((exact(operands) + lost).to(dtype), *stored(operands, order), order)


def _other_scale(y: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    y[7] *= 1.125
    return y


def _lost_step(y: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    x, upper, row_exponent, bias = operands
    short = upper.clone()
    short[:, 1024:1152] = 0
    return exact((x, short, row_exponent, bias))


def _wrong_element(y: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    y[11, 5] += 0.1 * products_norm(*operands[:3], KOrder.NATURAL)[11, 5]
    return y


def _missing_bias(y: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    return y - operands[3].double()


def _not_a_number(y: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    y[0, 0] = float("nan")
    return y


def _small_column(y: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    y[:, N // 2] = 0
    return y


@orders
@pytest.mark.parametrize(
    "spoil", [_other_scale, _lost_step, _wrong_element, _missing_bias, _not_a_number, _small_column]
)
def test_wrong_products_are_found(operands: tuple[Tensor, ...], spoil, order: KOrder) -> None:
    y = spoil(exact(operands), operands).half()
    for summed in (128, K):
        with pytest.raises(AssertionError):
            assert_product(y, *stored(operands, order), order, summed=summed)
