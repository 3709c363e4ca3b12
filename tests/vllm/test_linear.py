"""The linear method on a layer, without an engine."""

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from programs import findings
from torch import nn

from nestedfp.precision import Precision
from nestedfp.vllm import compat, op
from nestedfp.vllm.active import ACTIVE, LayerRecord
from nestedfp.vllm.linear import NestedLinearMethod, PlainLinearMethod, Staging
from nestedfp.vllm.plan import FP8, FP16, Plan
from nestedfp.vllm.settings import Inexact
from nestedfp.weight import NonFiniteWeightError, nest

N, K = 48, 96


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ACTIVE, "plan", FP16)
    monkeypatch.setattr(ACTIVE, "record", None)
    monkeypatch.setattr(ACTIVE, "layers", {})
    monkeypatch.setattr(ACTIVE, "inexact_rows", {})
    for name in ("_kinds", "_after"):
        monkeypatch.setattr(ACTIVE, name, {})


def loaded(
    weight: torch.Tensor, name: str = "model.layers.0.mlp.down_proj", inexact: Inexact = Inexact.AUTO
) -> tuple[nn.Module, Any]:
    layer = nn.Module()
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    method = NestedLinearMethod(name, inexact)
    method.process_weights_after_loading(layer)
    return layer, method


def weights(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(N, K, generator=generator) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_both_precisions_are_the_product(dtype: torch.dtype, biased: bool) -> None:
    w = weights(dtype)
    x = torch.randn(2, 3, K).to(dtype)
    bias = torch.randn(N).to(dtype) if biased else None
    layer, method = loaded(w)
    exact = x.double() @ w.double().T + (bias.double() if biased else 0)
    assert not hasattr(layer, "weight")
    torch.testing.assert_close(method.apply(layer, x, bias).double(), exact, rtol=1e-2, atol=1e-2)
    ACTIVE.plan = FP8
    fp8 = method.apply(layer, x, bias)
    assert fp8.shape == (2, 3, N)
    relative = (fp8.double() - exact).norm() / exact.norm()
    assert 1e-3 < relative < 0.06


def test_a_plan_decides_by_the_kind_of_the_layer() -> None:
    x = torch.randn(4, K).half()
    mlp, mlp_method = loaded(weights(), "model.layers.0.mlp.down_proj")
    attention, attention_method = loaded(weights(), "model.layers.0.self_attn.o_proj")
    exact = mlp_method.apply(mlp, x)
    ACTIVE.plan = Plan("mlp", frozenset({"down_proj"}))
    assert not torch.equal(mlp_method.apply(mlp, x), exact)
    assert torch.equal(attention_method.apply(attention, x), exact)


def test_each_layer_knows_what_the_one_loaded_after_it_reads() -> None:
    names = ("0.self_attn.qkv_proj", "0.mlp.down_proj", "1.self_attn.qkv_proj")
    first, second, last = (loaded(weights(), f"model.layers.{name}")[0] for name in names)

    def read_after(layer: nn.Module) -> tuple[int, ...]:
        return tuple(plane.data_ptr() for plane in ACTIVE.read_after(layer.weight_row_exponent))

    both = (second.weight_upper.data_ptr(), second.weight_lower.data_ptr())
    assert read_after(first) == both
    ACTIVE.plan = Plan("mlp", frozenset({"down_proj"}))
    assert read_after(first) == both[:1]
    assert read_after(second) == (last.weight_upper.data_ptr(), last.weight_lower.data_ptr())
    assert read_after(last) == ()


def test_layers_without_a_name_are_told_apart() -> None:
    (first, first_method), (second, second_method) = loaded(weights(), ""), loaded(weights(), "")
    PlainLinearMethod("", "router gate")
    ACTIVE.start_recording(torch.device("cpu"))
    assert ACTIVE.record is not None
    x = torch.randn(4, K).half()
    assert torch.equal(first_method.apply(first, x), second_method.apply(second, x))
    assert ACTIVE.record.mismatches(ACTIVE.record.take(), FP16) == 0
    assert ACTIVE.layer_counts() == ({"nested": 2, "plain": 1}, {"router gate": 1})
    reload(second, second_method, weights())
    assert ACTIVE.layer_counts()[0] == {"nested": 2, "plain": 1}, "a reload is no other layer"


def test_layers_that_are_gone_leave_their_memory() -> None:
    first, _ = loaded(weights(), "model.layers.0.mlp.down_proj")
    second, _ = loaded(weights(), "model.layers.1.mlp.down_proj")
    freed = ref(second.weight_upper)
    del second
    gc.collect()
    assert freed() is None
    assert ACTIVE.read_after(first.weight_row_exponent) == ()


def reload(layer: nn.Module, method: Any, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    method.process_weights_after_loading(layer)


def test_reloading_keeps_the_layout_whatever_the_new_weights_are() -> None:
    layer, method = loaded(weights(), inexact=Inexact.NEAREST)
    upper = layer.weight_upper
    replaced = weights()
    replaced[0, 0], replaced[0, 1] = 1000.0, 6e-8
    reload(layer, method, replaced)
    assert layer.weight_upper.shape == upper.shape
    assert ACTIVE.layer_counts()[0] == {"nested": 1, "plain": 0}
    assert sum(ACTIVE.inexact_rows.values()) == 1


@pytest.mark.parametrize(
    ("inexact", "dtype"), [(Inexact.AUTO, torch.float16), (Inexact.PLAIN, torch.bfloat16)]
)
def test_reloading_rounds_nothing_that_must_be_exact(inexact: Inexact, dtype: torch.dtype) -> None:
    layer, method = loaded(weights(dtype), inexact=inexact)
    x = torch.randn(4, K).to(dtype)
    before = method.apply(layer, x)
    replaced = -weights(dtype)
    replaced[0, 0], replaced[0, 1] = 1000.0, 6e-8
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.down_proj: 1 of 48 rows of the new"):
        reload(layer, method, replaced)
    assert torch.equal(method.apply(layer, x), before), "nothing was written"
    reload(layer, method, -weights(dtype))
    assert torch.equal(method.apply(layer, x), -before)


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_bytes_take_the_place_of_the_weight(contiguous: bool) -> None:
    """So that loading needs no memory beside it but for one layer's temporaries, and leaves no holes."""
    w = weights() if contiguous else weights().T.contiguous().T
    expected, address = nest(w.clone()), w.data_ptr()
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(w, requires_grad=False)
    NestedLinearMethod("model.layers.0.mlp.down_proj", Inexact.AUTO).process_weights_after_loading(layer)
    assert torch.equal(layer.weight_upper, expected.upper)
    assert torch.equal(layer.weight_lower, expected.lower)
    assert layer.weight_upper.is_contiguous()
    if contiguous:
        assert (layer.weight_upper.data_ptr(), layer.weight_lower.data_ptr()) == (address, address + N * K)


def test_a_layer_that_would_lose_bits_stays_plain_and_is_counted() -> None:
    w = weights()
    w[0, 0], w[0, 1] = 1000.0, 6e-8
    layer, method = loaded(w)
    x = torch.randn(4, K).half()
    torch.testing.assert_close(method.apply(layer, x), x @ w.T)
    assert ACTIVE.layer_counts() == (
        {"nested": 0, "plain": 1},
        {"rows that would not rebuild bit for bit": 1},
    )
    loaded(w, inexact=Inexact.NEAREST)
    assert ACTIVE.layer_counts()[0] == {"nested": 1, "plain": 1}


def test_ranks_of_tensor_parallelism_agree_on_what_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def on_any_rank(here: bool) -> bool:
        asked.append(here)
        return True

    monkeypatch.setattr(compat, "on_any_rank", on_any_rank)
    layer, method = loaded(weights())
    assert hasattr(layer, "weight")
    assert method.order is None
    assert ACTIVE.layers == {"model.layers.0.mlp.down_proj": "rows that would not rebuild bit for bit"}
    loaded(weights(), "1.down_proj", Inexact.NEAREST)
    loaded(weights().float(), "2.down_proj")
    reload(layer, method, weights())
    assert asked == [False], "once for each layer that another rank may want plain"


@pytest.mark.timeout(120)
def test_two_ranks_nest_the_same_layers() -> None:
    found = findings("two_ranks.py")
    layers = {"0.down_proj": "nested", "1.down_proj": "rows that would not rebuild bit for bit"}
    assert {rank: entry["layers"] for rank, entry in found.items()} == {"0": layers, "1": layers}


def test_bfloat16_rows_below_the_grid_are_rounded_and_counted() -> None:
    w = weights(torch.bfloat16)
    w[3, 0], w[3, 1] = 1.5, 2.0**-30
    loaded(w)
    assert ACTIVE.layer_counts()[0] == {"nested": 1, "plain": 0}
    assert ACTIVE.inexact_rows == {"model.layers.0.mlp.down_proj": 1}
    loaded(w, "model.layers.1.mlp.down_proj", Inexact.PLAIN)
    assert ACTIVE.layer_counts()[0] == {"nested": 1, "plain": 1}


def test_a_float32_layer_stays_plain_and_is_counted() -> None:
    w = weights().float()
    layer, method = loaded(w)
    x = torch.randn(4, K)
    torch.testing.assert_close(method.apply(layer, x), x @ w.T)
    assert ACTIVE.layer_counts()[1] == {"dtype torch.float32": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_checkpoint_names_the_layer(value: float) -> None:
    w = weights()
    w[3, 5] = value
    with pytest.raises(
        NonFiniteWeightError, match=rf"layer model\.layers\.0\.mlp\.down_proj: .*w\[3, 5\] is {value}"
    ):
        loaded(w)


def test_the_record_tells_what_ran_and_a_wrong_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, K).half()
    layers = [loaded(weights(), f"model.layers.{i}.mlp.down_proj") for i in range(3)]
    ACTIVE.start_recording(torch.device("cpu"))
    record = ACTIVE.record
    assert isinstance(record, LayerRecord)

    def run() -> None:
        for layer, method in layers:
            method.apply(layer, x)

    run()
    assert record.mismatches(record.take(), FP16) == 0
    assert record.mismatches(record.take(), FP16) == 3, "a layer that did not run at all is a mismatch"
    ACTIVE.plan = FP8
    run()
    assert record.mismatches(record.take(), FP8) == 0
    run()
    ACTIVE.plan = FP16
    layers[1][1].apply(layers[1][0], x)
    assert record.mismatches(record.take(), FP8) == 1


def test_the_operator_stays_one_call_in_a_compiled_graph() -> None:
    layer, method = loaded(weights())
    x = torch.randn(4, K).half()
    compiled = torch.compile(lambda y: method.apply(layer, y) * 2, backend="aot_eager", fullgraph=True)
    exact = compiled(x)
    ACTIVE.plan = FP8
    assert not torch.equal(compiled(x), exact), "the flip must reach compiled code"
    ACTIVE.plan = FP16
    assert torch.equal(compiled(x), exact)


@pytest.mark.parametrize("gated", [False, True])
def test_the_shape_rule_matches_the_operator(gated: bool) -> None:
    layer, _ = loaded(weights())
    arguments = (
        layer.weight_upper,
        layer.weight_lower,
        layer.weight_row_exponent,
        None,
        "down_proj",
        "natural",
        gated,
    )
    for shape in [(1, K), (2, 5, K), (0, K)]:
        x = torch.randn(shape).half()
        y, fake = op.planned_linear(x, *arguments), op._linear_shape(x, *arguments)
        assert (y.shape, y.dtype) == (fake.shape, fake.dtype)
    assert Precision.FP16 is FP16.precision("down_proj")


def test_layers_are_nested_through_one_memory_and_keep_their_own() -> None:
    first, second = weights(), -2 * weights()
    layers = [loaded(w, f"model.layers.{i}.mlp.down_proj")[0] for i, w in enumerate((first, second))]
    pointers = {layer.weight_upper.untyped_storage().data_ptr() for layer in layers}
    assert len(pointers) == 2
    for layer, w in zip(layers, (first, second), strict=True):
        assert (
            layer.weight_lower.untyped_storage().data_ptr() == layer.weight_upper.untyped_storage().data_ptr()
        )
        assert layer.weight_upper.untyped_storage().nbytes() == w.nbytes, "no second copy is kept"
        expected = nest(w)
        assert torch.equal(layer.weight_upper, expected.upper)
        assert torch.equal(layer.weight_lower, expected.lower)


def test_staging_grows_and_lets_go() -> None:
    staging = Staging()
    small, large = torch.zeros(4, 8).half(), torch.zeros(16, 8).half()
    upper, lower = staging.planes(small)
    upper.fill_(1)
    lower.fill_(2)
    assert (upper == 1).all(), "planes do not overlap"
    assert [plane.shape for plane in staging.planes(large)] == [(16, 8), (16, 8)]
    assert staging.planes(small)[0].data_ptr() == staging.planes(large)[0].data_ptr()
    staging.release()
    assert staging.planes(small)[0].untyped_storage().nbytes() == 2 * small.numel()
