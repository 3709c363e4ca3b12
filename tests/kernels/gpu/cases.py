"""Operands and checks shared by the tests of products on a GPU."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from nestedfp import kernels
from nestedfp.kernels import reference
from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.layout import PANEL, KOrder
from nestedfp.weight import NestedWeight, nest

DTYPES = (torch.float16, torch.bfloat16)
GUARD = 4096
"""Elements before and after a guarded output: more than a row of the largest tile."""

Linear = Callable[..., Tensor]


def order_for(K: int) -> KOrder:
    """What a Hopper GPU stores such a weight in."""
    return KOrder.HOPPER if K % PANEL == 0 else KOrder.NATURAL


def weight(N: int, K: int, dtype: torch.dtype, order: KOrder | None = None) -> tuple[Tensor, NestedWeight]:
    """A random normal weight [N, K] whose rows lie octaves apart, and the same nested."""
    octaves = torch.randint(-4, 3, (N, 1), device="cuda")
    w = torch.ldexp(torch.randn(N, K, device="cuda"), octaves).to(dtype)
    nested = nest(w, order=order_for(K) if order is None else order, require_exact=False)
    return nested.merge(), nested


def products(backend: str, mode: Mode) -> Linear:
    """(x, nested weight, bias, options) -> y by the public products or by those of one backend."""
    home = kernels if backend == "public" else import_module(f"nestedfp.kernels.{backend}")

    def linear(x: Tensor, w: NestedWeight, bias: Tensor | None = None, **options: object) -> Tensor:
        bytes_read = (w.upper,) if mode is Mode.FP8 else (w.upper, w.lower)
        product: Linear = home.linear_fp8 if mode is Mode.FP8 else home.linear_16bit
        return product(x, *bytes_read, w.row_exponent, bias, order=w.order, **options)

    return linear


def truth(mode: Mode, x: Tensor, w: NestedWeight, bias: Tensor | None = None) -> Tensor:
    """The product in float64, on the quantised tokens in FP8 mode."""
    if mode is Mode.FP8:
        return reference.linear_fp8(x, w.upper, w.row_exponent, bias, order=w.order, accumulate=torch.float64)
    return reference.linear_16bit(
        x, w.upper, w.lower, w.row_exponent, bias, order=w.order, accumulate=torch.float64
    )


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def poison_freed_memory(elements: int, dtype: torch.dtype) -> None:
    """Leaves a freed block of NaN where the next output of so many elements is likely to lie."""
    torch.full((elements,), float("nan"), dtype=dtype, device="cuda")


class GuardedEmpty:
    """Stands for `torch.empty`: two-dimensional 16-bit outputs come full of NaN, between guards of NaN."""

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self._plain = plain
        self.made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *size: object, **options: object) -> Tensor:
        tensor = self._plain(*size, **options)
        if tensor.dim() != 2 or tensor.dtype not in DTYPES or tensor.device.type != "cuda":
            return tensor
        whole = torch.full((GUARD + tensor.numel() + GUARD,), float("nan"), dtype=tensor.dtype, device="cuda")
        inner = whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        self.made.append((whole, inner))
        return inner

    def intact(self) -> bool:
        """True where an output was made and no guard was written."""
        return bool(self.made) and all(
            bool(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all()) for whole, _ in self.made
        )
