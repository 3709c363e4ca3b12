"""Finds the SwiGLU MLPs of a loaded model and has each computed by one gated product.

Such an MLP is known by what its `forward` does, which is traced, not by its class: one linear layer of two
equal parts, whose result goes to vLLM's SiluAndMul and nowhere else. The layer's rows are then put in turn
(`nestedfp.kernels.gated`) and the activation, whose work is done by the product, passes its input on.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Container
from typing import Any

from torch import fx, nn

from nestedfp.kernels import KOrder
from nestedfp.kernels.gated import TURN
from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE, FUSED
from nestedfp.vllm.linear import NestedLinearMethod, has_equal_halves

_MergedLinear: Any
_SiluAndMul: Any
_MergedLinear, _SiluAndMul = compat.swiglu_classes()

# What tracing raises for a forward that is not a fixed graph, and what one raises that meets a stand-in for a
# tensor, or runs outside a step. TraceError is a ValueError, NotImplementedError a RuntimeError.
_UNTRACEABLE = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


class NotFusableError(ValueError):
    """A layer with a gate and its partner cannot give a gated product; the message is the reason."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fuse_silu(model: nn.Module, orders: Container[KOrder] = (KOrder.HOPPER,)) -> None:
    """Makes gated products of the MLPs of `model` that can be, and notes in `ACTIVE` which are and why others
    are not.

    To be called once, after the load and before anything of the model is compiled. `orders` are those of
    weights that have kernels for gated products. What is wrong with an MLP never raises.
    """
    owners = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            method = getattr(layer, "quant_method", None)
            if not isinstance(method, NestedLinearMethod) or len(_parts(layer)) != 2:
                continue
            try:
                _check_layer(layer, method, orders)
                activation = activation_after(owner, name)
                if owners[id(layer)] > 1 or owners[id(getattr(owner, activation))] > 1:
                    raise NotFusableError("layer or activation in several places of the model")
            except NotFusableError as reason:
                ACTIVE.mlps[method.name] = str(reason)
                method.compile_as_it_is()
                continue
            method.gate(layer)
            setattr(owner, activation, nn.Identity())
            ACTIVE.mlps[method.name] = FUSED


def activation_after(owner: nn.Module, linear: str) -> str:
    """The name of the SiluAndMul child of `owner` that alone takes what its child `linear` gives.

    Raises NotFusableError where `owner.forward` is not seen to be so, for every input that it may get.
    """
    activations = {name for name, child in owner.named_children() if type(child) is _SiluAndMul}
    if not activations:
        raise NotFusableError("no SiluAndMul beside the layer")
    called = [node for node in _trace(owner).nodes if node.op == "call_module"]
    products = [node for node in called if node.target == linear]
    if len(products) != 1:
        raise NotFusableError(f"layer called {len(products)} times")
    # vLLM's layers give a product and a bias, which most callers unpack and drop.
    taken = [user for user in products[0].users if user.users or user.target is not operator.getitem]
    if len(taken) != 1 or taken[0].target is not operator.getitem or taken[0].args != (products[0], 0):
        raise NotFusableError("product not taken alone, and once")
    (user, *others) = taken[0].users
    if others or user.op != "call_module" or user.target not in activations:
        raise NotFusableError("product used by something else than one SiluAndMul")
    if sum(node.target == user.target for node in called) != 1:
        raise NotFusableError("activation called more than once")
    return str(user.target)


def _check_layer(layer: Any, method: NestedLinearMethod, orders: Container[KOrder]) -> None:
    """Raises NotFusableError for what can be told without the rest of the model."""
    if type(layer) is not _MergedLinear:
        raise NotFusableError(f"layer of class {type(layer).__name__}")
    order = method.order
    if order is None:
        raise NotFusableError("layer stays plain")
    if order not in orders:
        raise NotFusableError(f"no gated kernels for order {order}")
    if not has_equal_halves(layer) or _parts(layer)[0] % TURN:
        raise NotFusableError(f"parts of {_parts(layer)} rows, expected equal multiples of {TURN}")
    if getattr(layer, "bias", None) is not None:
        raise NotFusableError("layer with a bias")
    if layer.gather_output or not layer.return_bias:
        raise NotFusableError("layer that gathers its output, or gives it alone")


def _trace(owner: nn.Module) -> fx.Graph:
    """The graph of `owner.forward`, with calls of its submodules as nodes."""
    if "forward" in vars(owner):
        raise NotFusableError("forward replaced on the module")
    # A default is traced as if it were always given, and a branch on None lost.
    fixed = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    for parameter in inspect.signature(owner.forward).parameters.values():
        if parameter.kind not in fixed or parameter.default is not inspect.Parameter.empty:
            raise NotFusableError("forward with optional arguments")
    try:
        return _Tracer().trace(owner)
    except _UNTRACEABLE as error:
        raise NotFusableError(f"forward cannot be traced ({type(error).__name__})") from error


def _parts(layer: Any) -> list[int]:
    return list(getattr(layer, "output_partition_sizes", ()))
