"""vLLM's linear method over nested weights."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from nestedfp.kernels import KOrder, preferred_order
from nestedfp.kernels.gated import interleave
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
_MergedLinear: Any = compat.swiglu_classes()[0]


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

    A layer that is `gated` after its load gives silu(gate) * partner, half as many columns, ever after.
    """

    gated = False
    """Whether the layer's rows lie in turn, as `nestedfp.kernels.gated` has them."""

    def __init__(self, name: str, inexact: Inexact, fuse_silu: bool = False) -> None:
        """`fuse_silu` says that a merged layer of two equal parts is likely to become gated."""
        self._name = name
        self._fuse_silu = fuse_silu
        self._kind = layer_kind(name)
        self._inexact = inexact
        self._plain = _UnquantizedLinearMethod()
        self._is_plain: bool | None = None
        self._order = ""
        self._compiled: tuple[torch.device, int, int, torch.dtype, bool] | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def order(self) -> KOrder | None:
        """How the layer's bytes lie; None where it is not nested."""
        return KOrder(self._order) if self._is_plain is False else None

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self._plain.create_weights(layer, *args, **kwargs)
        # Whether the layer will be gated shows only when the whole model is there, long after compiling had
        # better begin.
        gated = self._fuse_silu and type(layer) is _MergedLinear and has_equal_halves(layer)
        weight: Tensor = layer.weight
        self._compiled = weight.device, *weight.shape, weight.dtype, gated
        begin_compiling(*self._compiled)

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
        upper, lower = _in_place_of(layer.weight.data, nested, self.gated)
        row_exponent = torch.empty_like(nested.row_exponent)
        _put(row_exponent, nested.row_exponent, KOrder.NATURAL, self.gated)
        del layer.weight
        for name, tensor in (("upper", upper), ("lower", lower), ("row_exponent", row_exponent)):
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
            self.gated,
        )
        return product

    def gate(self, layer: Any) -> None:
        """Makes a nested layer without bias, whose first half of rows is the gate, a gated one.

        Its rows are put in turn where they lie, through the memory of `STAGING`: compiled code and the record
        of steps know a layer by its addresses.
        """
        planes = layer.weight_upper.data, layer.weight_lower.data
        for plane, copy in zip(planes, STAGING.planes(planes[0]), strict=True):
            copy.copy_(plane)
            _put(plane, copy, KOrder(self._order), gated=True)
        row_exponent = layer.weight_row_exponent.data
        _put(row_exponent, row_exponent.clone(), KOrder.NATURAL, gated=True)
        self.gated = True

    def compile_as_it_is(self) -> None:
        """Begins to compile the kernels of a layer that has become another than it was taken for."""
        if self._compiled is not None and self._compiled[-1] != self.gated and not self._is_plain:
            self._compiled = *self._compiled[:-1], self.gated
            begin_compiling(*self._compiled)

    def _nest(self, weight: Tensor) -> NestedWeight | None:
        """The nested weight, or None where the layer is to stay plain; raises for NaN and infinity.

        All ranks of tensor parallelism nest the layer, or none does: a step would else run in two precisions
        at once. On a reload a nested layer cannot become plain, as compiled code reads its bytes: there
        ValueError is raised for rows that must be exact and are not, before anything of the layer is written.
        """
        if weight.dtype not in DTYPES:
            ACTIVE.note_layer(self._name, f"dtype {weight.dtype}")
            return None
        must_be_exact = self._must_be_exact(weight.dtype)
        nested: NestedWeight | None = None
        try:
            nested = nest(
                weight,
                order=preferred_order(weight.device, *weight.shape),
                require_exact=must_be_exact,
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
            logger.warning("layer %s stays plain 16-bit: %s", self._name, error)
        except NonFiniteWeightError as error:
            raise NonFiniteWeightError(f"layer {self._name}: {error}") from error
        if must_be_exact and self._is_plain is None and compat.on_any_rank(nested is None):
            nested = None
        if nested is None:
            ACTIVE.note_layer(self._name, "rows that would not rebuild bit for bit")
            return None
        ACTIVE.inexact_rows.pop(self._name, None)
        if rows := nested.exactness.inexact_rows:
            ACTIVE.inexact_rows[self._name] = rows
        return nested

    def _must_be_exact(self, dtype: torch.dtype) -> bool:
        return self._inexact is Inexact.PLAIN or (self._inexact is Inexact.AUTO and dtype is torch.float16)


def has_equal_halves(layer: Any) -> bool:
    """Whether a layer of vLLM computes two products of one size, as a gate and its partner are."""
    sizes: list[int] = getattr(layer, "output_partition_sizes", [])
    return len(sizes) == 2 and sizes[0] == sizes[1]


def _in_place_of(weight: Tensor, nested: NestedWeight, gated: bool) -> tuple[Tensor, Tensor]:
    """The bytes of `nested` in the memory of the weight that they replace: exactly as many.

    Memory of their own would leave a hole for each weight. Rows are put in turn if `gated`.
    """
    if weight.is_contiguous():
        upper, lower = weight.view(torch.uint8).view(2, *nested.shape)
    else:
        upper, lower = torch.empty_like(nested.upper), torch.empty_like(nested.lower)
    _put(upper, nested.upper, nested.order, gated)
    _put(lower, nested.lower, nested.order, gated)
    return upper, lower


def _put(to: Tensor, stored: Tensor, order: KOrder, gated: bool) -> None:
    if gated:
        interleave(to, stored, order)
    else:
        to.copy_(stored)


class PlainLinearMethod(_UnquantizedLinearMethod):  # type: ignore[misc]
    """A linear layer that is left as it is, and counted with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__()
        ACTIVE.note_layer(ACTIVE.unique_name(name), reason)


compat.register_stock_weight_loaders(NestedLinearMethod)
compat.register_stock_weight_loaders(PlainLinearMethod)
