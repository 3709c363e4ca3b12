"""vLLM's linear method over nested weights."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from nestedfp.kernels import preferred_order
from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE, NESTED, layer_kind
from nestedfp.vllm.op import planned_linear
from nestedfp.vllm.settings import Inexact
from nestedfp.vllm.warm_up import begin_compiling
from nestedfp.weight import DTYPES, InexactRowsError, NestedWeight, NonFiniteWeightError, nest

# Under vLLM's own logger, which is the only one that its processes configure.
logger = logging.getLogger("vllm.nestedfp")

_LinearMethodBase: Any
_UnquantizedLinearMethod: Any
_, _LinearMethodBase, _UnquantizedLinearMethod = compat.linear_classes()


class Staging:
    """Memory that every layer is nested into, before its bytes take the place of its weight.

    Loading thus needs room for one layer beside the weights, however memory was cut up before.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def planes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two uint8 tensors of the shape of `weight`, on its device, which last until the next call."""
        count = weight.numel()
        if self._bytes.device != weight.device or self._bytes.numel() < 2 * count:
            self.release()
            self._bytes = torch.empty(2 * count, dtype=torch.uint8, device=weight.device)
        upper, lower = self._bytes[:count], self._bytes[count : 2 * count]
        return upper.view(weight.shape), lower.view(weight.shape)

    def release(self) -> int:
        """After the last layer; returns how many bytes were held."""
        held = self._bytes.nbytes
        self._bytes = torch.empty(0, dtype=torch.uint8)
        return held


STAGING = Staging()
"""Of this process: its layers are nested one after another."""


class NestedLinearMethod(_LinearMethodBase):  # type: ignore[misc]
    """Loads a layer's 16-bit weight with vLLM's own loaders, then keeps it as bytes and exponents.

    After the load the layer has the parameters `weight_upper`, `weight_lower` (uint8 [N, K]) and
    `weight_row_exponent` (int8 [N]) in place of `weight`; whether it has them is settled by the first
    load, so that weights can be reloaded into the same storage and compiled code stays valid.
    """

    def __init__(self, name: str, inexact: Inexact) -> None:
        self._name = name
        self._kind = layer_kind(name)
        self._inexact = inexact
        self._plain = _UnquantizedLinearMethod()
        self._is_plain: bool | None = None
        self._order = ""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self._plain.create_weights(layer, *args, **kwargs)
        begin_compiling(layer.weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        first = self._is_plain is None
        if first:
            self._name = ACTIVE.unique_name(self._name)
        nested = None if self._is_plain else self._nest(layer.weight.data)
        self._is_plain = nested is None
        if nested is None:
            self._plain.process_weights_after_loading(layer)
            return
        self._order = nested.order.value
        upper, lower = _in_place_of(layer.weight.data, nested)
        del layer.weight
        for name, tensor in (("upper", upper), ("lower", lower), ("row_exponent", nested.row_exponent)):
            layer.register_parameter(f"weight_{name}", nn.Parameter(tensor, requires_grad=False))
        if first:
            planes = layer.weight_upper, layer.weight_lower
            ACTIVE.note_nested(self._name, self._kind, *planes, layer.weight_row_exponent)
        else:
            ACTIVE.note_layer(self._name, NESTED)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._is_plain:
            y: Tensor = self._plain.apply(layer, x, bias)
            return y
        product: Tensor = planned_linear(
            x,
            layer.weight_upper,
            layer.weight_lower,
            layer.weight_row_exponent,
            bias,
            self._kind,
            self._order,
        )
        return product

    def _nest(self, weight: Tensor) -> NestedWeight | None:
        """The nested weight, or None where the layer is to stay plain; raises for NaN and infinity.

        On a reload a nested layer cannot become plain, as compiled code reads its bytes: there ValueError
        is raised for rows that must be exact and are not, before anything of the layer is written.
        """
        if weight.dtype not in DTYPES:
            ACTIVE.note_layer(self._name, f"dtype {weight.dtype}")
            return None
        try:
            nested = nest(
                weight,
                order=preferred_order(weight.device, *weight.shape),
                require_exact=self._must_be_exact(weight.dtype),
                planes=STAGING.planes(weight),
            )
        except InexactRowsError as error:
            if self._is_plain is not None:
                report = error.report
                raise ValueError(
                    f"layer {self._name}: {report.inexact_rows} of {report.rows} rows of the new weights do "
                    "not rebuild bit for bit, and a running engine keeps a nested layer nested; reload the "
                    "old weights, or start an engine on the new ones, with inexact='nearest' to round them"
                ) from error
            ACTIVE.note_layer(self._name, "rows that would not rebuild bit for bit")
            logger.warning("layer %s stays plain 16-bit: %s", self._name, error)
            return None
        except NonFiniteWeightError as error:
            raise NonFiniteWeightError(f"layer {self._name}: {error}") from error
        ACTIVE.inexact_rows.pop(self._name, None)
        if rows := nested.exactness.inexact_rows:
            ACTIVE.inexact_rows[self._name] = rows
        return nested

    def _must_be_exact(self, dtype: torch.dtype) -> bool:
        return self._inexact is Inexact.PLAIN or (self._inexact is Inexact.AUTO and dtype is torch.float16)


def _in_place_of(weight: Tensor, nested: NestedWeight) -> tuple[Tensor, Tensor]:
    """The bytes of `nested` in the memory of the weight that they replace: exactly as many.

    Memory of their own would leave a hole for each weight.
    """
    if not weight.is_contiguous():
        return nested.upper.clone(), nested.lower.clone()
    planes = weight.view(torch.uint8).view(2, *nested.shape)
    planes[0].copy_(nested.upper)
    planes[1].copy_(nested.lower)
    return planes[0], planes[1]


class PlainLinearMethod(_UnquantizedLinearMethod):  # type: ignore[misc]
    """A linear layer that is left as it is, and counted with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__()
        ACTIVE.note_layer(ACTIVE.unique_name(name), reason)


compat.register_stock_weight_loaders(NestedLinearMethod)
compat.register_stock_weight_loaders(PlainLinearMethod)
