"""The quantization configuration that `quantization="nestedfp"` selects."""

from collections.abc import Mapping
from typing import Any, Self

import torch

from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.linear import NestedLinearMethod, PlainLinearMethod
from nestedfp.vllm.settings import METHOD, Settings

_QuantizationConfig: Any = compat.quantization_base()
_LinearBase = compat.linear_classes()[0]

_PLAIN_KINDS = {
    "gate": "router gate",
    "shared_expert_gate": "router gate",
    "kv_b_proj": "attention reads its weight directly (kv_b_proj)",
}


class NestedFPConfig(_QuantizationConfig):  # type: ignore[misc]
    """Nests every linear layer; embeddings, the language-model head and MoE experts stay as they are."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(Settings.from_dict(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, _LinearBase):
            if "experts" in type(layer).__name__.lower() or "moe" in type(layer).__name__.lower():
                ACTIVE.note_layer(prefix, "mixture-of-experts weights")
            return None
        vllm_config = compat.current_config()
        _require_plugin_classes(vllm_config)
        reason = _PLAIN_KINDS.get(prefix.rpartition(".")[2])
        if reason is not None:
            return PlainLinearMethod(prefix, reason)
        gated = self.settings.fuse_silu and compat.says_silu(vllm_config)
        return NestedLinearMethod(prefix, self.settings.inexact, gated)


def _require_plugin_classes(vllm_config: Any) -> None:
    """Raises ValueError where vLLM's own scheduler or worker would keep the engine in 16 bits for good."""
    chosen = {
        "scheduler_cls": vllm_config.scheduler_config.scheduler_cls,
        "worker_cls": vllm_config.parallel_config.worker_cls,
    }
    for name, value in chosen.items():
        if value is None or (isinstance(value, str) and (value == "auto" or value.startswith("vllm."))):
            raise ValueError(
                f"quantization={METHOD!r} changes precision through a scheduler and a worker of its own, but "
                f"{name} is {value!r}; take all settings from nestedfp.vllm.engine_arguments(), or pass "
                "--scheduler-cls and --worker-cls as documented"
            )


def settings_of(vllm_config: Any) -> Settings:
    """The settings of an engine; raises ValueError where it was started without `quantization="nestedfp"`."""
    quantization = vllm_config.quant_config
    if not isinstance(quantization, NestedFPConfig):
        raise ValueError(
            f"the nestedfp scheduler and worker need quantization={METHOD!r}, but the engine has "
            f"{vllm_config.model_config.quantization!r}; start it with nestedfp.vllm.engine_arguments()"
        )
    settings: Settings = quantization.settings
    return settings
