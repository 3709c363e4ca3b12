"""Gated products, the first half of a SwiGLU MLP in one product: y = silu(x gateᵀ) * (x upᵀ).

The weight [N, K] holds the rows of both, eight of the gate and the same eight of the other in turn. A thread
of either Hopper kernel then has the two sums of an element of y in its registers, so that the products
themselves, twice as large as y, are never written.
"""

import torch
from torch import Tensor

from nestedfp.kernels.layout import KOrder
from nestedfp.kernels.layout import rows as rows_of

TURN = 8
"""Rows of the gate before as many of the other."""


def check_gated(name: str, N: int) -> None:
    """Raises ValueError where a weight of N rows cannot hold pairs of rows in turn."""
    if N % (2 * TURN):
        raise ValueError(
            f"{name}: the weight has N = {N}, expected a multiple of {2 * TURN} for gated products"
        )


def output_columns(N: int, gated: bool) -> int:
    """Columns of y for a weight of N rows."""
    return N // 2 if gated else N


def interleave(to: Tensor, stored: Tensor, order: KOrder) -> None:
    """Copies a weight [N, K] stored in `order`, or a vector [N] in natural order, whose first half of rows is
    the gate, to `to`, of the same shape and order, with rows in turn."""
    turns = torch.unflatten(rows_of(stored, order), 0, (2, -1, TURN)).transpose(0, 1)
    torch.unflatten(rows_of(to, order), 0, (-1, 2, TURN)).copy_(turns)


def silu_and_multiply(products: Tensor) -> Tensor:
    """y [..., N / 2] in the dtype of `products` [..., N], which are rounded to it; computed in float32."""
    gate, up = torch.unflatten(products.float(), -1, (-1, 2, TURN)).unbind(-2)
    return (torch.nn.functional.silu(gate) * up).flatten(-2).to(products.dtype)
