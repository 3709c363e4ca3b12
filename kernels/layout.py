"""How the bytes of a weight [N, K] lie in memory: the order of K, and of the rows.

A product sums over K, so any order serves as long as the activations are read, or written by the quantiser,
in the same one. `NATURAL` is row-major. `HOPPER` stores panels, one after another, each of all N rows by 128
columns: what a tile of weights takes from a panel is one stretch of memory, which DRAM delivers faster than
short pieces of many rows. Inside a panel, position t*32 + s*16 + j*4 + h*2 + b of a row holds column
k = s*64 + j*16 + h*8 + t*2 + b (t the thread of a quad, s the 64-wide step, j the 16-wide wgmma step, h the
half of its A fragment, b the element of a register): a thread's share of a step is one 16-byte load.

Tensors keep the shape [N, K] in either order; `rows` is the view that indexes rows.
"""

from enum import StrEnum

import torch
from torch import Tensor

PANEL = 128
"""Columns of a panel."""


class KOrder(StrEnum):
    """`NATURAL`, or `HOPPER`, which takes K in multiples of 128."""

    NATURAL = "natural"
    HOPPER = "hopper128"


def positions_to_k() -> list[int]:
    """For each of the 128 positions of a row of a `HOPPER` panel, the column that is stored there."""
    return [
        s * 64 + j * 16 + h * 8 + t * 2 + b
        for t in range(4) for s in range(2) for j in range(4) for h in range(2) for b in range(2)
    ]  # fmt: skip


def check_order(order: KOrder, K: int) -> None:
    """Raises ValueError where `K` columns cannot be stored in `order`."""
    if order is KOrder.HOPPER and K % PANEL:
        raise ValueError(f"K is {K}, expected a multiple of {PANEL} for order {order}; store it as natural")


def to_order(columns: Tensor, order: KOrder) -> Tensor:
    """`columns` [..., K] in natural order, with K in the order of `order`: a copy, or the same for `NATURAL`.

    For activations, and for blocks of rows of a weight: where the rows lie is not its concern.
    """
    return _permuted(columns, order, torch.tensor(positions_to_k()))


def to_natural(columns: Tensor, order: KOrder) -> Tensor:
    """The inverse of `to_order`."""
    return _permuted(columns, order, torch.tensor(positions_to_k()).argsort())


def rows(stored: Tensor, order: KOrder) -> Tensor:
    """A view of a stored weight [N, K] that rows index: [N, K / 128, 128] for `HOPPER`, else `stored`."""
    if order is KOrder.NATURAL:
        return stored
    N, K = stored.shape
    check_order(order, K)
    return stored.view(K // PANEL, N, PANEL).transpose(0, 1)


def store(weight: Tensor, order: KOrder) -> Tensor:
    """`weight` [N, K] in natural order as `order` stores it: a copy, or the same tensor for `NATURAL`."""
    if order is KOrder.NATURAL:
        return weight
    stored = torch.empty_like(weight, memory_format=torch.contiguous_format)
    view = rows(stored, order)
    view.copy_(to_order(weight, order).view(view.shape))
    return stored


def unstore(stored: Tensor, order: KOrder) -> Tensor:
    """The inverse of `store`."""
    return to_natural(rows(stored, order).reshape(stored.shape), order)


def _permuted(columns: Tensor, order: KOrder, index: Tensor) -> Tensor:
    check_order(order, columns.shape[-1])
    if order is KOrder.NATURAL:
        return columns
    panels = columns.reshape(*columns.shape[:-1], -1, PANEL)
    return panels.index_select(-1, index.to(columns.device)).reshape(columns.shape)
