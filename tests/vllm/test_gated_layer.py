"""What gated layers compute, how they come to it, and what reloading does to them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swiglu import K, MergedLinear, N, in_turn, load, merged, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestedfp.kernels import KOrder
from nestedfp.kernels.gated import TURN, silu_and_multiply
from nestedfp.vllm import linear
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.linear import STAGING, NestedLinearMethod
from nestedfp.vllm.plan import FP8, FP16, Plan
from nestedfp.vllm.settings import Inexact

pytestmark = pytest.mark.usefixtures("fresh_layers")


@settings(deadline=None)
@given(
    turns=st.integers(1, 9),
    columns=st.sampled_from([16, 80, 128, 256]),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    order=st.sampled_from(list(KOrder)),
    plan=st.sampled_from([FP16, FP8]),
)
def test_a_gated_layer_gives_the_activation_of_its_products(
    turns: int, columns: int, tokens: int, seed: int, dtype: torch.dtype, order: KOrder, plan: Plan
) -> None:
    """Bit for bit, whether it was gated where its bytes lay or loaded in turn, as a reload is."""
    if order is KOrder.HOPPER and columns % 128:
        order = KOrder.NATURAL
    rows = 2 * TURN * turns
    ACTIVE.clear()
    ACTIVE.plan = plan
    w = weights(rows, columns, seed, dtype)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "preferred_order", lambda *_: order)
        layer = merged(w, (rows // 2, rows // 2))
        method = layer.quant_method
        products = method.apply(layer, x)
        kept = parameters(layer)
        addresses = [kept[name].data_ptr() for name in sorted(kept)]
        method.gate(layer)
        assert parameters(layer) == kept, "the parameters stay"
        assert [kept[name].data_ptr() for name in sorted(kept)] == addresses
        assert method.order is order
        y = method.apply(layer, x)
        assert (y.shape, y.dtype) == ((tokens, rows // 2), dtype)
        assert torch.equal(y, silu_and_multiply(in_turn(products)))
        gate, up = products.double().chunk(2, -1)
        exact = nn.functional.silu(gate) * up
        torch.testing.assert_close(y.double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=2**-24)
        bytes_in_place = {name: tensor.clone() for name, tensor in kept.items()}
        load(layer, w)
        assert all(torch.equal(tensor, bytes_in_place[name]) for name, tensor in parameters(layer).items())
        load(layer, -w)
        assert torch.equal(method.apply(layer, -x), y)


def parameters(layer: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(layer, f"weight_{name}") for name in ("upper", "lower", "row_exponent")}


class Storages(TorchDispatchMode):
    """Address and bytes of what tensors lie in that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storage = result.untyped_storage()
        self.seen[storage.data_ptr()] = storage.nbytes()
        return result


def test_gating_takes_no_memory_but_that_of_staging() -> None:
    layer = merged()
    held = [STAGING.planes(layer.weight_upper)[0], *parameters(layer).values()]
    with Storages() as storages:
        layer.quant_method.gate(layer)
    for tensor in held:
        storages.seen.pop(tensor.untyped_storage().data_ptr(), None)
    assert max(storages.seen.values()) <= N, "row exponents"


def test_compiled_code_knows_what_a_gated_layer_gives() -> None:
    layer = merged()
    method, x = layer.quant_method, torch.randn(4, K).half()
    method.gate(layer)
    compiled = torch.compile(lambda x: method.apply(layer, x) * 2, backend="aot_eager", fullgraph=True)
    for plan in (FP16, FP8, FP16):
        ACTIVE.plan = plan
        assert torch.equal(compiled(x), method.apply(layer, x) * 2)


def test_a_refused_reload_leaves_a_gated_layer_as_it_was() -> None:
    layer = merged(weights())
    layer.quant_method._inexact = Inexact.PLAIN
    layer.quant_method.gate(layer)
    x = torch.randn(4, K).half()
    before = layer.quant_method.apply(layer, x)
    inexact = weights()
    inexact[0, 0], inexact[0, 1] = 1000.0, 6e-8
    with pytest.raises(ValueError, match="1 of 96 rows of the new"):
        load(layer, inexact)
    assert torch.equal(layer.quant_method.apply(layer, x), before)


def test_kernels_are_compiled_for_what_a_layer_is_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are likely while weights load, and the others where it came otherwise."""
    begun: list[tuple[int, int, torch.dtype, bool]] = []
    monkeypatch.setattr(linear, "begin_compiling", lambda device, *weight: begun.append(weight))

    def created(parts: list[int], fuse: bool, kind: type[nn.Module] = MergedLinear) -> Any:
        layer: Any = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer.output_partition_sizes = parts
        layer.quant_method = method = NestedLinearMethod("gate_up_proj", Inexact.NEAREST, fuse)
        weight = nn.Parameter(weights(sum(parts)), requires_grad=False)
        method._plain = SimpleNamespace(create_weights=lambda layer: setattr(layer, "weight", weight))
        method.create_weights(layer)
        method.process_weights_after_loading(layer)
        return layer

    class Other(MergedLinear):  # type: ignore[misc]
        pass

    gated, refused = created([48, 48], True), created([32, 32], True)
    unequal, off, other = created([32, 64], True), created([24, 24], False), created([16, 16], True, Other)
    half = torch.float16
    likely = [(96, True), (64, True), (96, False), (48, False), (32, False)]
    assert begun == [(rows, K, half, gated) for rows, gated in likely]
    begun.clear()
    for layer in (gated, off):
        layer.quant_method.gate(layer)
    for layer in (gated, refused, refused, unequal, off, other):
        layer.quant_method.compile_as_it_is()
    assert begun == [(64, K, half, False), (48, K, half, True)]
