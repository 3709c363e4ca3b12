"""What becomes of each kind of layer, and what the configuration asks of the engine around it."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from nestedfp.vllm import compat, engine_arguments
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.config import NestedFPConfig
from nestedfp.vllm.linear import NestedLinearMethod
from nestedfp.vllm.settings import Settings

PLUGIN = engine_arguments("cuda")


def vllm_config(text_config: dict[str, Any] | None = None, **changes: Any) -> SimpleNamespace:
    chosen = {**PLUGIN, **changes}
    of_model = {}
    if text_config is not None:
        of_model["model_config"] = SimpleNamespace(hf_text_config=SimpleNamespace(**text_config))
    return SimpleNamespace(
        **of_model,
        scheduler_config=SimpleNamespace(scheduler_cls=chosen["scheduler_cls"]),
        parallel_config=SimpleNamespace(worker_cls=chosen["worker_cls"]),
    )


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "current_config", vllm_config)
    monkeypatch.setattr(ACTIVE, "layers", {})


def linear() -> nn.Module:
    return object.__new__(compat.linear_classes()[0])  # type: ignore[no-any-return]


def test_a_linear_layer_is_nested() -> None:
    method = NestedFPConfig().get_quant_method(linear(), "model.layers.0.mlp.down_proj")
    assert isinstance(method, NestedLinearMethod)


@pytest.mark.parametrize(
    ("fuse_silu", "text_config", "expected"),
    [
        (True, {"hidden_act": "silu"}, True),
        (True, {"hidden_act": "Swish"}, True),
        (True, {"hidden_activation": "silu"}, True),
        (False, {"hidden_act": "silu"}, False),
        (True, {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, False),
        (True, {"hidden_act": "relu2", "hidden_activation": None}, False),
        (True, {}, False),
        (True, None, False),
    ],
)
def test_a_layer_expects_to_be_gated_where_that_is_wanted_and_likely(
    monkeypatch: pytest.MonkeyPatch, fuse_silu: bool, text_config: dict[str, Any] | None, expected: bool
) -> None:
    """It compiles the kernels for it while weights load."""
    monkeypatch.setattr(compat, "current_config", lambda: vllm_config(text_config))
    config = NestedFPConfig(Settings(fuse_silu=fuse_silu))
    assert config.get_quant_method(linear(), "model.layers.0.mlp.gate_up_proj")._fuse_silu is expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.mlp.gate", "router gate"),
        ("model.layers.0.self_attn.kv_b_proj", "attention reads its weight directly (kv_b_proj)"),
    ],
)
def test_a_layer_that_cannot_be_nested_stays_plain_with_the_reason(name: str, reason: str) -> None:
    method = NestedFPConfig().get_quant_method(linear(), name)
    assert isinstance(method, compat.linear_classes()[2])
    assert ACTIVE.layer_counts() == ({"nested": 0, "plain": 1}, {reason: 1})


def test_experts_stay_plain_and_are_counted() -> None:
    class RoutedExperts(nn.Module):
        pass

    assert NestedFPConfig().get_quant_method(RoutedExperts(), "model.layers.0.mlp.experts") is None
    assert ACTIVE.layer_counts()[1] == {"mixture-of-experts weights": 1}


def test_embeddings_and_the_head_are_left_alone() -> None:
    assert NestedFPConfig().get_quant_method(nn.Embedding(4, 4), "lm_head") is None
    assert ACTIVE.layers == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduler_cls", None),
        ("worker_cls", "auto"),
        ("worker_cls", "vllm.v1.worker.gpu_worker.Worker"),
    ],
)
def test_vllms_own_scheduler_or_worker_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    monkeypatch.setattr(compat, "current_config", lambda: vllm_config(**{name: value}))
    with pytest.raises(ValueError, match=rf"but {name} is {value!r}; take all settings"):
        NestedFPConfig().get_quant_method(linear(), "model.layers.0.mlp.down_proj")
