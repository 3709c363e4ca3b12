"""Stored orders of K: how the columns of a weight lie in memory.

A product sums over K, so any order serves as long as the activations are read, or written by the
quantiser, in the same one. `HOPPER` lets one thread of a warpgroup fetch its share of a 64-wide step,
sixteen weights of one row, with a single 16-byte load: inside each group of 64, position
t*16 + j*4 + h*2 + b holds k = j*16 + h*8 + t*2 + b (t the thread of a quad, j the 16-wide wgmma step,
h the half of its A fragment, b the element of a register).
"""

from enum import StrEnum

import torch
from torch import Tensor

GROUP = 64


class KOrder(StrEnum):
    """`NATURAL` stores column k at position k; `HOPPER` permutes within groups of 64 (K % 64 == 0)."""

    NATURAL = "natural"
    HOPPER = "hopper64"


def positions_to_k() -> list[int]:
    """For each of the 64 positions of a `HOPPER` group, the k that is stored there."""
    return [
        j * 16 + h * 8 + t * 2 + b for t in range(4) for j in range(4) for h in range(2) for b in range(2)
    ]


def check_order(order: KOrder, K: int) -> None:
    """Raises ValueError where `K` columns cannot be stored in `order`."""
    if order is KOrder.HOPPER and K % GROUP:
        raise ValueError(f"K is {K}, expected a multiple of {GROUP} for order {order}; store it as natural")


def to_order(columns: Tensor, order: KOrder) -> Tensor:
    """`columns` [..., K] in natural order, stored in `order`: a copy, or the same tensor for `NATURAL`."""
    check_order(order, columns.shape[-1])
    if order is KOrder.NATURAL:
        return columns
    index = torch.tensor(positions_to_k(), device=columns.device)
    return _groups(columns).index_select(-1, index).reshape(columns.shape)


def to_natural(columns: Tensor, order: KOrder) -> Tensor:
    """The inverse of `to_order`."""
    check_order(order, columns.shape[-1])
    if order is KOrder.NATURAL:
        return columns
    index = torch.tensor(positions_to_k(), device=columns.device).argsort()
    return _groups(columns).index_select(-1, index).reshape(columns.shape)


def _groups(columns: Tensor) -> Tensor:
    return columns.reshape(*columns.shape[:-1], -1, GROUP)
