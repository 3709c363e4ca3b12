"""Plans: which linear layers run in FP8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestedfp.precision import Precision

AUTO = "auto"

MLP_KINDS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc")
"""vLLM's names of MLP projections: the example of a plan in between (`mlp`)."""


@dataclass(frozen=True)
class Plan:
    """Maps a layer's kind, the last part of its name in vLLM (`qkv_proj`, `down_proj`), to a precision.

    `fp8_kinds` are the kinds that run in FP8; None means all of them.
    """

    name: str
    fp8_kinds: frozenset[str] | None

    def precision(self, kind: str) -> Precision:
        in_fp8 = self.fp8_kinds is None or kind in self.fp8_kinds
        return Precision.FP8 if in_fp8 else Precision.FP16


FP16 = Plan(Precision.FP16.value, frozenset())
FP8 = Plan(Precision.FP8.value, None)


def configured_plans(named: Mapping[str, Sequence[str]]) -> dict[str, Plan]:
    """The plans of an engine by name: `fp16`, `fp8`, then those in `named` (name -> kinds in FP8).

    Raises ValueError for a name that is taken or a plan without kinds.
    """
    plans = {plan.name: plan for plan in (FP16, FP8)}
    for name, kinds in named.items():
        if name in plans or name == AUTO:
            raise ValueError(f"plans: {name!r} is already a mode; choose another name")
        if isinstance(kinds, str) or not kinds or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(
                f"plans: {name!r} has {kinds!r}, expected a list of layer kinds such as {list(MLP_KINDS[:4])}"
            )
        plans[name] = Plan(name, frozenset(kinds))
    return plans
