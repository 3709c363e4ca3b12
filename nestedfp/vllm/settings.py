"""The plugin's settings, as they ride in a model's `quantization_config`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from nestedfp.vllm.choice import Limits
from nestedfp.vllm.plan import AUTO, Plan, configured_plans

METHOD = "nestedfp"

LORA = "LoRA"
SPECULATION = "speculative decoding"
PIPELINE = "pipeline parallelism"
DATA = "data parallelism"
BATCH_INVARIANCE = "batch-invariant results"
ENCODER_GRAPHS = "CUDA graphs of encoders"

_REMEDIES = {
    LORA: "merge the adapter into the checkpoint",
    SPECULATION: "drop speculative_config",
    PIPELINE: "use tensor_parallel_size instead",
    DATA: "start one engine per rank",
    ENCODER_GRAPHS: "drop cudagraph_mm_encoder from compilation_config",
    BATCH_INVARIANCE: "unset VLLM_BATCH_INVARIANT, or serve the model without this quantization",
}


def refusal(feature: str) -> str:
    """What to say to whoever wants one of the features above, which this plugin does not have."""
    return f"quantization {METHOD} does not support {feature} yet; {_REMEDIES[feature]}"


class Inexact(StrEnum):
    """What becomes of a layer with rows that would not rebuild bit for bit.

    `AUTO` is `PLAIN` for float16 checkpoints and `NEAREST` for bfloat16 ones, whose smallest weights lie
    below the stored grid in almost every layer; what is rounded is counted and shown.
    """

    AUTO = "auto"
    PLAIN = "plain"
    NEAREST = "nearest"


@dataclass(frozen=True)
class Settings:
    """Parsed settings; the defaults hold for `--quantization nestedfp` without more."""

    inexact: Inexact = Inexact.AUTO
    plans: Mapping[str, Plan] = field(default_factory=lambda: configured_plans({}))
    target: str = "fp16"
    """The target at start."""
    limits: Limits = field(default_factory=Limits)
    """Thresholds of `auto`."""
    check_steps: bool = False
    """Record on the device what every layer ran and compare after each step (always on for a CPU)."""
    fuse_silu: bool = True
    """Compute SiLU and the product after it within the product before, where kernels for that serve it."""
    graph_reserve_gib: float | None = None
    """GPU memory kept out of the KV cache for each plan's CUDA graphs where vLLM estimates none; None: by
    their number (`graphs.estimated_bytes`)."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Settings from the keys of `quantization_config`; raises ValueError naming a bad key or value."""
        known = {"quant_method", *(field.name for field in fields(cls))}
        if unknown := data.keys() - known:
            raise ValueError(f"quantization_config: unknown keys {sorted(unknown)}, expected {sorted(known)}")
        if data.get("quant_method", METHOD) != METHOD:
            raise ValueError(
                f"quantization_config: quant_method is {data['quant_method']!r}, expected {METHOD!r}"
            )
        settings = cls(
            inexact=_inexact(data.get("inexact", Inexact.AUTO)),
            plans=_plans(data.get("plans", {})),
            target=data.get("target", "fp16"),
            limits=_limits(data.get("limits", {})),
            check_steps=_flag("check_steps", data.get("check_steps", False)),
            fuse_silu=_flag("fuse_silu", data.get("fuse_silu", True)),
            graph_reserve_gib=_gib(data.get("graph_reserve_gib")),
        )
        settings.check_mode(settings.target)
        return settings

    def check_mode(self, mode: str) -> None:
        """Raises ValueError unless `mode` is `auto` or a configured plan."""
        if mode != AUTO and (not isinstance(mode, str) or mode not in self.plans):
            raise ValueError(f"mode is {mode!r}, expected one of {[*self.plans, AUTO]}")


def _inexact(value: str) -> Inexact:
    try:
        return Inexact(value)
    except ValueError as error:
        raise ValueError(
            f"quantization_config: inexact is {value!r}, expected one of {[known.value for known in Inexact]}"
        ) from error


def _plans(value: Any) -> dict[str, Plan]:
    if not isinstance(value, Mapping | list | tuple | str):
        raise ValueError(
            f"quantization_config: plans is {value!r}, expected names of plans or a mapping to layer kinds"
        )
    return configured_plans(value)


def _limits(value: Any) -> Limits:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"quantization_config: limits is {value!r}, expected a mapping from names to numbers"
        )
    return Limits.from_dict(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"quantization_config: {name} is {value!r}, expected true or false")
    return value


def _gib(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"quantization_config: graph_reserve_gib is {value!r}, expected a number of GiB")
    return float(value)
