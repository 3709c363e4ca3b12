"""The operator behind every nested layer.

It is opaque to torch.compile: the graph holds one call, and the plan is read inside it, at run time or
at CUDA-graph capture. A branch in `apply` would be compiled in, and a flip silently ignored.
"""

from typing import Any

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.gated import output_columns
from nestedfp.kernels.layout import KOrder
from nestedfp.kernels.product import multiply
from nestedfp.precision import Precision
from nestedfp.vllm.active import ACTIVE

# A lookup: calling the enumeration takes longer.
_ORDERS = {order.value: order for order in KOrder}
_LIBRARY: Any = torch.library.Library("nestedfp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear(Tensor x, Tensor upper, Tensor lower, Tensor row_exponent, Tensor? bias, str kind, str order,"
    " bool gated) -> Tensor"
)


def _linear(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    kind: str,
    order: str,
    gated: bool,
) -> Tensor:
    precision = ACTIVE.plan.precision(kind)
    if ACTIVE.record is not None:
        # Captured with the product below, so that a graph replays both or neither.
        ACTIVE.record.write(row_exponent, precision)
    # The layer's own were checked when it was nested, and x is what its model gives it.
    ahead = ACTIVE.read_after(row_exponent)
    if precision is Precision.FP8:
        return multiply(Mode.FP8, x, (upper,), row_exponent, bias, _ORDERS[order], ahead, gated)
    return multiply(Mode.BITS16, x, (upper, lower), row_exponent, bias, _ORDERS[order], ahead, gated)


def _linear_shape(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    kind: str,
    order: str,
    gated: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], output_columns(upper.shape[0], gated)))


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", _linear, _key)
_LIBRARY._register_fake("linear", _linear_shape)

planned_linear = torch.ops.nestedfp.linear
"""y [..., N] = x [..., K] times a nested weight, in the precision that the active plan gives its kind; gated,
y [..., N / 2] = silu(gate) * partner of its products (`nestedfp.kernels.gated`)."""
