"""Runs the portable products in the interpreter over a grid of shapes; prints relative errors as JSON.

Not a test by itself: `test_portable` starts it with TRITON_INTERPRET=1.
"""

import itertools
import json

import torch
from torch import Tensor

from nestedfp.format import split
from nestedfp.kernels import reference
from nestedfp.kernels.layout import PANEL, KOrder, store, to_order
from nestedfp.kernels.portable.gemm import quantize_kernel
from nestedfp.kernels.portable.linear import linear_16bit, linear_fp8

SHAPES = [(1, 1, 1), (1, 33, 128), (3, 40, 70), (5, 7, 192), (17, 65, 130), (70, 50, 256)]


def strided(M: int, K: int, dtype: torch.dtype, kind: str) -> Tensor:
    if kind == "transposed":
        return torch.randn(K, M, dtype=dtype).T
    if kind == "every other":
        return torch.randn(M, 2 * K + 3, dtype=dtype)[:, 1 : 2 * K + 1 : 2]
    return torch.randn(M, K, dtype=dtype)


def relative(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


def random_weight(N: int, K: int, dtype: torch.dtype) -> Tensor:
    """float16 [N, K], all bit patterns up to 1.8125 alike, rounded to `dtype`."""
    magnitude = torch.randint(0, 0x3F41, (N, K), dtype=torch.int16).view(torch.float16)
    return torch.where(torch.rand(N, K) < 0.5, magnitude, -magnitude).to(dtype).half()


def products() -> dict[str, float]:
    errors = {}
    kinds = itertools.cycle(["contiguous", "transposed", "every other"])
    for (M, N, K), dtype, order in itertools.product(SHAPES, (torch.float16, torch.bfloat16), KOrder):
        if order is KOrder.HOPPER and K % PANEL:
            continue
        for _ in range(2):
            kind = next(kinds)
            x = strided(M, K, dtype, kind)
            upper, lower = split(random_weight(N, K, dtype))
            exponent = torch.randint(-12, 9, (N,), dtype=torch.int8)
            bias = torch.randn(N, dtype=dtype) if kind == "contiguous" else None
            name = f"{M}x{N}x{K} {str(dtype).removeprefix('torch.')} {order} {kind}"
            truth = reference.linear_16bit(
                x, upper, lower, exponent, bias, order=order, accumulate=torch.float64
            )
            errors[f"16-bit:{name}"] = relative(
                linear_16bit(x, upper, lower, exponent, bias, order=order), truth
            )
            truth = reference.linear_fp8(x, upper, exponent, bias, order=order, accumulate=torch.float64)
            errors[f"fp8:{name}"] = relative(linear_fp8(x, upper, exponent, bias, order=order), truth)
    return errors


def identity_product(order: KOrder) -> float:
    """Largest error of x = 1: every product is one weight, so 16-bit mode must return it as it is."""
    K = 128
    w = random_weight(48, K, torch.float16)
    upper, lower = (store(byte, order) for byte in split(w))
    exponent = torch.zeros(48, dtype=torch.int8)
    y = linear_16bit(torch.eye(K, dtype=torch.float16), upper, lower, exponent, order=order)
    return float((y.T.double() - w.double()).abs().max())


def far_columns() -> dict[str, float]:
    """Largest error of tokens whose columns lie 2^30 elements apart, the last beyond 2^31.

    The buffer takes 4 GiB of addresses; of memory only the pages that are written.
    """
    M, K, apart = 2, 3, 1 << 30
    x = torch.empty((K - 1) * apart + M, dtype=torch.float16).as_strided((M, K), (1, apart))
    x.copy_(torch.randn(M, K))
    upper, lower = split(random_weight(4, K, torch.float16))
    exponent = torch.zeros(4, dtype=torch.int8)
    sixteen, fp8 = linear_16bit(x, upper, lower, exponent), linear_fp8(x, upper, exponent)
    near = x.contiguous()
    return {
        "16-bit": float((sixteen - linear_16bit(near, upper, lower, exponent)).abs().max()),
        "fp8": float((fp8 - linear_fp8(near, upper, exponent)).abs().max()),
    }


def quantizer_differences(order: KOrder, dtype: torch.dtype) -> float:
    M, K = 5, 1152
    x = torch.randn(M, K, dtype=dtype) * torch.logspace(-5, 3, M, dtype=torch.float32).to(dtype)[:, None]
    codes, scale = torch.empty(M, K, dtype=torch.float16), torch.empty(M)
    quantize_kernel[(M,)](x, codes, scale, K, *x.stride(), PERMUTED=order is KOrder.HOPPER, BLOCK_K=1024)
    want, want_scale = reference.quantize(x)
    differing = (codes != to_order(want.half(), order)).sum()
    return float(differing) + float((scale != want_scale).sum())


if __name__ == "__main__":
    torch.manual_seed(0)
    quantized = {
        f"{order} {dtype}": quantizer_differences(order, dtype)
        for order in KOrder
        for dtype in (torch.float16, torch.bfloat16)
    }
    rebuilt = {str(order): identity_product(order) for order in KOrder}
    report = {"product": products(), "rebuild": rebuilt, "quantize": quantized, "far": far_columns()}
    print(json.dumps(report))
