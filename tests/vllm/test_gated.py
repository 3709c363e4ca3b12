"""Which MLPs of a model are fused."""

from collections.abc import Callable, Iterator
from importlib import import_module
from types import MethodType
from typing import Any

import pytest
import torch
from swiglu import MLP, K, MergedLinear, N, SiluAndMul, merged, weights
from torch import nn

from nestedfp.kernels import KOrder
from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE, FUSED
from nestedfp.vllm.gated import NotFusableError, activation_after, fuse_silu
from nestedfp.vllm.linear import NestedLinearMethod
from nestedfp.vllm.plan import FP8, FP16, Plan

pytestmark = pytest.mark.usefixtures("fresh_layers")

ANY = tuple(KOrder)


@pytest.fixture(autouse=True, scope="module")
def vllm_config() -> Iterator[None]:
    """vLLM's activations ask for one when they are made."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def mlp(forward: Callable[..., Any], **children: Any) -> MLP:
    made = type("Other", (MLP,), {"forward": forward})(**children)
    assert isinstance(made, MLP)
    return made


def reasons(model: nn.Module) -> dict[str, int]:
    """Of a model in which nothing is to be fused, and nothing is changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    fuse_silu(model, ANY)
    fused, found = ACTIVE.mlp_counts()
    assert fused == 0
    assert [id(module) for module in model.modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found


def helped(act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return act(x)  # type: ignore[no-any-return]


def through_a_helper(self: Any, x: torch.Tensor) -> torch.Tensor:
    y, _ = self.gate_up(x)
    return helped(self.act, y)


def by_index(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.act(self.gate_up(2 * x)[0]) + 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [MLP.forward, through_a_helper, by_index])
@pytest.mark.parametrize("plan", [FP16, FP8], ids=lambda plan: plan.name)
def test_an_mlp_is_fused_and_computes_the_same(forward: Any, plan: Plan) -> None:
    model = nn.ModuleDict({"mlp": mlp(forward), "head": nn.Linear(4, 4)})
    ACTIVE.plan = plan
    x = torch.randn(5, K).half()
    before = model["mlp"](x)
    fuse_silu(model, ANY)
    assert ACTIVE.mlp_counts() == (1, {})
    assert ACTIVE.mlps == {"model.layers.0.mlp.gate_up_proj": FUSED}
    assert type(model["mlp"].act) is nn.Identity
    assert model["mlp"].gate_up.quant_method.gated
    # vLLM's own rounds the SiLU to 16 bits before it is multiplied.
    torch.testing.assert_close(model["mlp"](x), before, rtol=2**-9, atol=2**-20)


def test_only_an_order_with_gated_kernels_is_fused() -> None:
    model = MLP()
    fuse_silu(model)
    assert ACTIVE.mlp_counts() == (0, {"no gated kernels for order natural": 1})
    fuse_silu(model, [KOrder.NATURAL])
    assert ACTIVE.mlp_counts() == (1, {})


def test_a_layer_that_is_left_alone_has_plain_kernels_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(NestedLinearMethod, "compile_as_it_is", lambda method: asked.append(method.gated))
    left = [mlp(never_called), MLP(merged(parts=(8, 88))), MLP(act=nn.SiLU())]
    fuse_silu(nn.ModuleList([*left, MLP()]), ANY)
    assert asked == [False, False, False, True], "a layer that was not taken for a gated one needs it, too"


# What a `forward` does otherwise, and why its MLP is then left as it is.


def product_used_twice(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y) + y.sum()


def product_returned_too(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y), y


def result_used_whole(self: Any, x: torch.Tensor) -> Any:
    both = self.gate_up(x)
    return self.act(both[0]), both


def bias_used(self: Any, x: torch.Tensor) -> Any:
    y, bias = self.gate_up(x)
    return self.act(y), bias


def bias_activated(self: Any, x: torch.Tensor) -> Any:
    return self.act(self.gate_up(x)[1])


def taken_twice(self: Any, x: torch.Tensor) -> Any:
    both = self.gate_up(x)
    return self.act(both[0]) + both[0].sum()


def not_taken(self: Any, x: torch.Tensor) -> Any:
    return self.act(self.gate_up(x))


def activation_twice(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y), self.act(y)


def activation_again(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(self.act(y))


def activation_elsewhere(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y), self.act(x)


def activation_of_something_else(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(x) + y.sum()


def product_between(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y * 2)


def in_place_between(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    y.clamp_(max=7)
    return self.act(y)


def layer_twice(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    self.gate_up(x)
    return self.act(y)


def never_called(self: Any, x: torch.Tensor) -> Any:
    return x


def silu_by_hand(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    gate, up = y.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def branches_on_a_value(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y) if x.sum() > 0 else y


def branches_on_a_shape(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y) if x.shape[0] > 3 else y


def counts_tokens(self: Any, x: torch.Tensor) -> Any:
    y, _ = self.gate_up(x)
    return self.act(y)[: len(x)]


def loops(self: Any, x: torch.Tensor) -> Any:
    return [self.act(self.gate_up(row)[0]) for row in x]


def asks_for_what_is_not_there(self: Any, x: torch.Tensor) -> Any:
    return self.act(nn.functional.linear(x, self.gate_up.weight))


def needs_a_step(self: Any, x: torch.Tensor) -> Any:
    assert torch.is_inference_mode_enabled(), "no forward context"
    return self.act(self.gate_up(x)[0])


def optional_input(self: Any, x: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
    y, _ = self.gate_up(x)
    # Traced, `scale` is never None.
    return self.act(y * 2 if scale is None else y)


def any_input(self: Any, *x: torch.Tensor) -> Any:
    return self.act(self.gate_up(x[0])[0])


def defaulted_input(self: Any, x: torch.Tensor | None = None) -> Any:
    return self.act(self.gate_up(x)[0])


def second_input(self: Any, x: torch.Tensor, scale: torch.Tensor | None) -> Any:
    y, _ = self.gate_up(x)
    # Traced, `scale` is never None.
    return self.act(y * 2 if scale is None else y)


def named_input(self: Any, *, x: torch.Tensor) -> Any:
    return self.act(self.gate_up(x)[0])


def no_input(self: Any) -> Any:
    return self.act(self.gate_up(self.x)[0])


def divides_by_zero(self: Any, x: torch.Tensor) -> Any:
    return self.act(self.gate_up(x)[0]) * (1 // 0)


def imports_what_is_not_there(self: Any, x: torch.Tensor) -> Any:
    import_module("no.such_module")
    return self.act(self.gate_up(x)[0])


class OwnError(Exception):
    pass


def raises_its_own(self: Any, x: torch.Tensor) -> Any:
    raise OwnError


class WithoutSignature:
    """Of which `inspect.signature` raises TypeError."""

    __signature__ = "none"

    def __get__(self, *_: Any) -> Any:
        return self

    def __call__(self, x: torch.Tensor) -> Any:
        return x


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (product_used_twice, "product used by something else than one SiluAndMul"),
        (product_returned_too, "product used by something else than one SiluAndMul"),
        (activation_twice, "product used by something else than one SiluAndMul"),
        (product_between, "product used by something else than one SiluAndMul"),
        (in_place_between, "product used by something else than one SiluAndMul"),
        (silu_by_hand, "product used by something else than one SiluAndMul"),
        (activation_of_something_else, "product used by something else than one SiluAndMul"),
        (result_used_whole, "product not taken alone, and once"),
        (bias_used, "product not taken alone, and once"),
        (bias_activated, "product not taken alone, and once"),
        (taken_twice, "product not taken alone, and once"),
        (not_taken, "product not taken alone, and once"),
        (activation_again, "activation called more than once"),
        (activation_elsewhere, "activation called more than once"),
        (layer_twice, "layer called 2 times"),
        (never_called, "layer called 0 times"),
        (branches_on_a_value, "forward cannot be traced (TraceError)"),
        (branches_on_a_shape, "forward cannot be traced (TraceError)"),
        (loops, "forward cannot be traced (TraceError)"),
        (counts_tokens, "forward cannot be traced (RuntimeError)"),
        (asks_for_what_is_not_there, "forward cannot be traced (AttributeError)"),
        (needs_a_step, "forward cannot be traced (AssertionError)"),
        (divides_by_zero, "forward cannot be traced (ZeroDivisionError)"),
        (imports_what_is_not_there, "forward cannot be traced (ModuleNotFoundError)"),
        (raises_its_own, "forward cannot be traced (OwnError)"),
        (WithoutSignature(), "forward cannot be traced (TypeError)"),
        (optional_input, "forward of other than one argument"),
        (defaulted_input, "forward of other than one argument"),
        (second_input, "forward of other than one argument"),
        (named_input, "forward of other than one argument"),
        (any_input, "forward of other than one argument"),
        (no_input, "forward of other than one argument"),
    ],
)
def test_another_flow_is_left_alone(forward: Any, reason: str) -> None:
    assert reasons(mlp(forward)) == {reason: 1}


def test_another_activation_is_left_alone_and_no_mlp_to_count() -> None:
    from vllm.model_executor.layers.activation import GeluAndMul

    class Louder(SiluAndMul):  # type: ignore[misc]
        pass

    assert reasons(nn.ModuleList([MLP(act=act) for act in (GeluAndMul(), Louder(), nn.SiLU())])) == {}


class MergedKind(MergedLinear):  # type: ignore[misc]
    """A layer of a model's own, which may do anything."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parts": (N // 2 + 8, N // 2 - 8)}, "parts of [56, 40] rows, expected equal multiples of 8"),
        ({"parts": (20, 20), "weight": weights(40)}, "parts of [20, 20] rows, expected equal multiples of 8"),
        ({"bias": nn.Parameter(torch.zeros(N).half(), requires_grad=False)}, "layer with a bias"),
        ({"gather_output": True}, "layer that gathers its output, or gives it alone"),
        ({"return_bias": False}, "layer that gathers its output, or gives it alone"),
        ({"weight": weights().float()}, "layer stays plain"),
        ({"__class__": MergedKind}, "layer of class MergedKind"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_that_cannot_be_gated_is_left_alone(change: dict[str, Any], reason: str) -> None:
    assert reasons(MLP(merged(**change))) == {reason: 1}


def test_layers_of_other_than_two_parts_are_no_mlps() -> None:
    three = merged(parts=(N // 2, N // 4, N // 4))
    plain = merged()
    plain.quant_method = compat.linear_classes()[2]()
    assert reasons(nn.ModuleList([MLP(three), MLP(plain), nn.ModuleDict({"act": SiluAndMul()})])) == {}


def test_a_forward_put_on_the_module_is_left_alone() -> None:
    model: Any = MLP()
    model.forward = MethodType(product_used_twice, model)
    assert reasons(model) == {"forward replaced on the module": 1}


def test_a_layer_in_several_places_is_left_alone() -> None:
    layer = merged()
    assert reasons(nn.ModuleList([MLP(layer), MLP(layer)])) == {"layer in several places of the model": 1}


class WithAnotherWay(MLP):
    def products(self, x: torch.Tensor) -> Any:
        return self.gate_up(x)[0]


class WithAProperty(MLP):
    @property
    def activations(self) -> list[nn.Module]:
        return [self.act]


class WithAClosure(MLP):
    def later(self) -> Callable[[torch.Tensor], Any]:
        return lambda x: self.gate_up(x)


class Inherited(WithAnotherWay):
    pass


@pytest.mark.parametrize("kind", [WithAnotherWay, WithAProperty, WithAClosure, Inherited])
def test_a_layer_that_another_method_may_call_is_left_alone(kind: type[MLP]) -> None:
    assert reasons(kind()) == {"layer or activation named in a method beside forward": 1}


class Block(nn.Module):
    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.mlp = mlp
        self.mlp.gate_up.return_bias = True


class Reaching(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return self.mlp.gate_up(x)[0]


def test_a_layer_that_another_module_may_call_is_left_alone() -> None:
    assert reasons(Reaching(MLP())) == {"layer named in the code of another module": 1}
    ACTIVE.mlps.clear()
    fuse_silu(Block(MLP()), ANY)
    assert ACTIVE.mlp_counts() == (1, {}), "a constructor may speak of it"


@pytest.mark.parametrize("place", ["again", "deeper"])
def test_an_activation_under_two_names_is_left_alone(place: str) -> None:
    twice: Any = MLP()
    setattr(twice, place, twice.act if place == "again" else nn.ModuleList([twice.act]))
    assert reasons(twice) == {"activation under two names": 1}


def test_mlps_that_share_an_activation_are_fused_and_others_keep_it() -> None:
    """vLLM's `get_act_and_mul_fn` gives one to a whole process."""
    act = SiluAndMul()
    made = [MLP(act=act), MLP(act=act), mlp(product_between, act=act)]
    x = torch.randn(3, K).half()
    before = [one(x) for one in made]
    fuse_silu(nn.ModuleDict({"mlps": nn.ModuleList(made), "act": act}), ANY)
    reason = "product used by something else than one SiluAndMul"
    assert ACTIVE.mlp_counts() == (2, {reason: 1})
    for one, y in zip(made, before, strict=True):
        torch.testing.assert_close(one(x), y, rtol=2**-9, atol=2**-20)
    assert made[2].act is act


def test_a_module_in_two_places_is_fused_once() -> None:
    shared = MLP()
    x = torch.randn(3, K).half()
    before = shared(x)
    fuse_silu(nn.ModuleList([shared, nn.ModuleList([shared])]), ANY)
    assert ACTIVE.mlp_counts() == (1, {})
    torch.testing.assert_close(shared(x), before, rtol=2**-9, atol=2**-20)


def test_the_activation_that_takes_the_product_is_the_one_replaced() -> None:
    class Two(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.act
            self.act = SiluAndMul()
            self.other = merged()

        def forward(self, x: torch.Tensor) -> Any:
            y, _ = self.gate_up(x)
            return self.first(y) + self.act(self.other(x)[0])

    model = Two()
    assert (activation_after(model, "gate_up"), activation_after(model, "other")) == ("first", "act")
    with pytest.raises(NotFusableError, match="layer called 0 times"):
        activation_after(model, "nothing")
