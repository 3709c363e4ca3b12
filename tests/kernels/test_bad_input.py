"""Operands that do not fit are refused by name, with both sides and the remedy, before any kernel runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nestedfp.format import ZERO
from nestedfp.kernels import linear_16bit, linear_fp8
from nestedfp.kernels.layout import KOrder
from nestedfp.kernels.product import fits_bulk_copies

N, K = 32, 128


def operands() -> dict[str, Any]:
    return {
        "x": torch.randn(4, K, dtype=torch.float16),
        "upper": torch.randint(0, 127, (N, K), dtype=torch.uint8),
        "lower": torch.full((N, K), ZERO[1], dtype=torch.uint8),
        "row_exponent": torch.zeros(N, dtype=torch.int8),
        "bias": torch.zeros(N, dtype=torch.float16),
        "order": KOrder.NATURAL,
    }


CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(4, K)}, TypeError, r"x has dtype torch.float32, expected torch.float16"),
    ({"x": torch.randn(4, K + 1).half()}, ValueError, rf"x has shape \(4, {K + 1}\), the weight has K = {K}"),
    ({"x": torch.tensor(1.0).half()}, ValueError, rf"x has shape \(\), the weight has K = {K}"),
    ({"upper": torch.zeros(N, K)}, ValueError, r"upper is torch.float32 .* expected contiguous torch.uint8"),
    (
        {"upper": torch.zeros(K, N, dtype=torch.uint8).T},
        ValueError,
        r"upper is torch.uint8 .* strides \(1, 32\), expected contiguous",
    ),
    ({"upper": torch.zeros(N, 0, dtype=torch.uint8)}, ValueError, r"upper has shape \[32, 0\]"),
    ({"row_exponent": torch.zeros(N)}, TypeError, r"row_exponent has dtype torch.float32, expected"),
    ({"row_exponent": torch.zeros(N + 1).char()}, ValueError, r"row_exponent .* expected .*\[32\]"),
    ({"bias": torch.zeros(N)}, TypeError, r"bias has dtype torch.float32, expected torch.float16"),
    ({"bias": torch.zeros(N, 1).half()}, ValueError, r"bias is .*\[32, 1\].* expected contiguous \[32\]"),
    ({"upper": torch.zeros(N, K, device="meta").byte()}, ValueError, r"x is on cpu, upper on meta"),
    ({"bias": torch.zeros(N, device="meta").half()}, ValueError, r"x is on cpu, bias on meta"),
]  # fmt: skip


def call_16bit(values: dict[str, Any]) -> Tensor:
    return linear_16bit(**values)


def call_fp8(values: dict[str, Any]) -> Tensor:
    return linear_fp8(**{name: value for name, value in values.items() if name != "lower"})


@pytest.mark.parametrize("call", [call_16bit, call_fp8])
@pytest.mark.parametrize(("change", "kind", "message"), CASES, ids=[case[2][:24] for case in CASES])
def test_both_products_name_what_does_not_fit(
    call: Any, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(operands() | change)


@pytest.mark.parametrize(
    ("lower", "message"),
    [
        (torch.zeros(N, K), "lower is torch.float32"),
        (torch.zeros(N, K + 1, dtype=torch.uint8), r"lower is .*\[32, 129\].* like upper"),
        (torch.zeros(K, N, dtype=torch.uint8).T, r"lower is .* strides"),
        (torch.zeros(N, K, dtype=torch.uint8, device="meta"), "upper is on cpu, lower on meta"),
    ],
)
def test_the_lower_bytes_must_match_the_upper(lower: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_16bit(operands() | {"lower": lower})


@pytest.mark.parametrize("call", [call_16bit, call_fp8])
@pytest.mark.parametrize(
    ("ahead", "message"),
    [
        ((torch.zeros(64),), r"ahead is torch.float32 \[64\].* expected at most two contiguous torch.uint8"),
        ((torch.zeros(64, dtype=torch.uint8),) * 3, "expected at most two"),
        ((torch.zeros(64, dtype=torch.uint8), torch.zeros(80, dtype=torch.uint8)), "planes of one size"),
        ((torch.zeros(8, 8, dtype=torch.uint8).T,), "strides .* expected at most two contiguous"),
        ((torch.zeros(64, dtype=torch.uint8, device="meta"),), "on meta; expected .* on cpu"),
    ],
)
def test_what_the_next_product_reads_is_bytes(call: Any, ahead: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(operands() | {"ahead": ahead})


def test_a_stored_order_that_k_does_not_allow() -> None:
    narrow = {"x": torch.randn(4, 70).half(), "upper": torch.zeros(N, 70, dtype=torch.uint8)}
    values = operands() | narrow | {"lower": narrow["upper"], "order": KOrder.HOPPER}
    with pytest.raises(ValueError, match=r"K is 70, expected a multiple of 128"):
        call_16bit(values)


def test_a_device_without_kernels() -> None:
    values = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in operands().items()
    }
    with pytest.raises(ValueError, match="no kernels for device meta"):
        call_16bit(values)


@pytest.mark.parametrize("call", [call_16bit, call_fp8])
def test_no_tokens_give_an_empty_output(call: Any) -> None:
    y = call(operands() | {"x": torch.empty(2, 0, K, dtype=torch.float16)})
    assert y.shape == (2, 0, N)
    assert y.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("call", [call_16bit, call_fp8])
def test_a_weight_on_the_gpu_and_tokens_on_the_cpu(call: Any) -> None:
    values = operands()
    for name in ("upper", "lower", "row_exponent"):
        values[name] = values[name].cuda()
    with pytest.raises(ValueError, match=r"x is on cpu, upper on cuda:0; move one to the other"):
        call(values)


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (torch.zeros(4, K), True),
        (torch.zeros(4, 2 * K)[:, :K], True),
        (torch.zeros(4, K + 1)[:, :K], False),
        (torch.zeros(4, 2 * K)[:, 1 : K + 1], False),
        (torch.zeros(4, 2 * K)[:, ::2], False),
        (torch.zeros(K, 4).T, False),
        (torch.zeros(1, K).expand(4, K), False),
        (torch.zeros(1, K + 1)[:, :K], True),
    ],
)
def test_tokens_that_bulk_copies_can_read(x: Tensor, fits: bool) -> None:
    bytes_ = torch.zeros(N, K, dtype=torch.uint8)
    assert fits_bulk_copies(_half_like(x), (bytes_,)) is fits


def _half_like(x: Tensor) -> Tensor:
    """float16 storage with the strides and the offset of `x`."""
    storage = torch.zeros(8 * K * K, dtype=torch.float16)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def test_misaligned_bytes_cannot_be_bulk_copied() -> None:
    bytes_ = torch.zeros(N, K, dtype=torch.uint8)
    shifted = torch.zeros(N * K + 1, dtype=torch.uint8)[1:].view(N, K)
    x = torch.zeros(4, K).half()
    assert fits_bulk_copies(x, (bytes_, bytes_))
    assert not fits_bulk_copies(x, (bytes_, shifted))


@pytest.mark.gpu
def test_misaligned_storage_still_has_a_product() -> None:
    values = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in operands().items()}
    shifted = torch.empty(N * K + 1, dtype=torch.uint8, device="cuda")[1:].view(N, K)
    shifted.copy_(values["upper"])
    for call in (call_fp8, call_16bit):
        expected, y = call(values).float(), call(values | {"upper": shifted}).float()
        assert (y - expected).norm() <= 2e-3 * expected.norm()
