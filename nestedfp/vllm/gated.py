"""Finds the SwiGLU MLPs of a loaded model and has each computed by one gated product.

Such an MLP is known by what its `forward` does, which is traced, not by its class: one linear layer of two
equal parts, whose result goes to vLLM's SiluAndMul and nowhere else. The layer's rows are then put in turn
(`nestedfp.kernels.gated`) and the activation, whose work is done by the product, passes its input on.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Container
from functools import cache
from types import CodeType
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


class NotFusableError(ValueError):
    """A layer with a gate and its partner cannot give a gated product; the message is the reason."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fuse_silu(model: nn.Module, orders: Container[KOrder] = (KOrder.HOPPER,)) -> None:
    """Makes gated products of the MLPs of `model` that can be, and notes in `ACTIVE` which are and why others
    are not. Layers with no SiluAndMul beside them belong to no such MLP and are not noted.

    To be called once, after the load and before anything of the model is compiled. `orders` are those of
    weights that have kernels for gated products. What is wrong with an MLP never raises.
    """
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for owner in list(model.modules()):
        in_mlp = bool(_activations(owner))
        for name, layer in list(owner.named_children()):
            method = getattr(layer, "quant_method", None)
            if not isinstance(method, NestedLinearMethod) or len(_parts(layer)) != 2:
                continue
            if in_mlp:
                elsewhere = _named_elsewhere(model, name)
                ACTIVE.mlps[method.name] = _fused(owner, name, orders, places[id(layer)], elsewhere)
            method.compile_as_it_is()


def _fused(owner: nn.Module, name: str, orders: Container[KOrder], places: int, elsewhere: bool) -> str:
    """Fuses what follows the child `name` of `owner`, which stands in so many places, and is perhaps used
    `elsewhere`; `FUSED`, or why not."""
    layer: Any = getattr(owner, name)
    try:
        _check_layer(layer, orders)
        if places > 1:
            raise NotFusableError("layer in several places of the model")
        activation = activation_after(owner, name)
        if elsewhere:
            raise NotFusableError("layer named in the code of another module")
        kind: Any = type(owner)
        if not _names_used(kind, ("__init__", "forward")).isdisjoint((name, activation)):
            raise NotFusableError("layer or activation named in a method beside forward")
    except NotFusableError as reason:
        return str(reason)
    layer.quant_method.gate(layer)
    # Of this owner alone: vLLM may give one activation to all MLPs.
    setattr(owner, activation, nn.Identity())
    return FUSED


def activation_after(owner: nn.Module, linear: str) -> str:
    """The name of the SiluAndMul child of `owner` that alone takes what its child `linear` gives.

    Raises NotFusableError where `owner.forward` is not seen to be so for every tensor that it may get. A
    branch on the type of its argument is not seen: only the side that a stand-in for a tensor takes is.
    """
    called = [node for node in _trace(owner).nodes if node.op == "call_module"]
    products = [node for node in called if node.target == linear]
    if len(products) != 1:
        raise NotFusableError(f"layer called {len(products)} times")
    # vLLM's layers give a product and a bias, which most callers unpack and drop.
    taken = [user for user in products[0].users if user.users or user.target is not operator.getitem]
    if len(taken) != 1 or taken[0].target is not operator.getitem or taken[0].args != (products[0], 0):
        raise NotFusableError("product not taken alone, and once")
    (user, *others) = taken[0].users
    if others or user.op != "call_module" or user.target not in _activations(owner):
        raise NotFusableError("product used by something else than one SiluAndMul")
    if sum(node.target == user.target for node in called) != 1:
        raise NotFusableError("activation called more than once")
    activation = str(user.target)
    # The trace gives the first of several names, whichever `forward` uses.
    replaced = owner.get_submodule(activation)
    if sum(module is replaced for _, module in owner.named_modules(remove_duplicate=False)) != 1:
        raise NotFusableError("activation under two names")
    return activation


def _named_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a module of `model` that has no child `name` speaks of one, as of a child's."""
    kinds: set[Any] = {type(module) for module in model.modules() if name not in module._modules}
    return any(name in _names_used(kind, ("__init__",)) for kind in kinds)


@cache
def _names_used(kind: Any, without: tuple[str, ...]) -> frozenset[str]:
    """Attributes and globals in the methods of a class, those `without` and torch's own aside."""
    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    methods = [value for base in own for name, value in vars(base).items() if name not in without]
    codes = [getattr(inspect.unwrap(_function(method)), "__code__", None) for method in methods]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            found.update(code.co_names)
            codes.extend(code.co_consts)
    return frozenset(found)


def _function(method: Any) -> Any:
    """Of a property the getter, of a class's or a static method what it calls."""
    return getattr(method, "fget", None) or getattr(method, "__func__", method)


def _activations(owner: nn.Module) -> set[str]:
    return {name for name, child in owner._modules.items() if type(child) is _SiluAndMul}


def _check_layer(layer: Any, orders: Container[KOrder]) -> None:
    """Raises NotFusableError for what can be told without the rest of the model."""
    if type(layer) is not _MergedLinear:
        raise NotFusableError(f"layer of class {type(layer).__name__}")
    order = layer.quant_method.order
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
    try:
        graph = _Tracer().trace(owner) if _takes_one_argument(owner.forward) else None
    except Exception as error:
        # A model's own code ran, on a stand-in for a tensor and outside a step: it may raise anything.
        raise NotFusableError(f"forward cannot be traced ({type(error).__name__})") from error
    if graph is None:
        raise NotFusableError("forward of other than one argument")
    return graph


def _takes_one_argument(forward: Callable[..., Any]) -> bool:
    """Whether it takes one and always does. Any other is traced as if it were given, and a branch on None
    would be lost."""
    parameters = list(inspect.signature(forward).parameters.values())
    fixed = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    always_given = [one for one in parameters if one.kind in fixed and one.default is one.empty]
    return len(parameters) == len(always_given) == 1


def _parts(layer: Any) -> list[int]:
    return list(getattr(layer, "output_partition_sizes", ()))
