"""Plans: which linear layers run in FP8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestedfp.precision import Precision

AUTO = "auto"

EXAMPLES = {"mlp": ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc")}
"""Plans in between that can be asked for by name. `mlp`: vLLM's names of MLP projections, so that those run
in FP8 and the projections of attention in FP16."""


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


def configured_plans(named: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, Plan]:
    """The plans of an engine by name: `fp16`, `fp8`, then those in `named`: name -> kinds in FP8, or a list
    of names in `EXAMPLES`.

    Raises ValueError for a name that is taken or unknown and for a plan without kinds.
    """
    plans = {plan.name: plan for plan in (FP16, FP8)}
    for name, kinds in _with_kinds(named).items():
        if name in plans or name == AUTO:
            raise ValueError(f"plans: {name!r} is already a mode; choose another name")
        if isinstance(kinds, str) or not kinds or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(
                f"plans: {name!r} has {kinds!r}, expected a list of layer kinds such as "
                f"{list(EXAMPLES['mlp'][:4])}"
            )
        plans[name] = Plan(name, frozenset(kinds))
    return plans


def _with_kinds(named: Mapping[str, Sequence[str]] | Sequence[str]) -> Mapping[str, Sequence[str]]:
    if isinstance(named, Mapping):
        return named
    names = [named] if isinstance(named, str) else named
    if unknown := [name for name in names if name not in EXAMPLES]:
        raise ValueError(
            f"plans: {unknown} ship with no layer kinds, expected some of {list(EXAMPLES)}, or a mapping "
            "from a name to layer kinds"
        )
    return {name: EXAMPLES[name] for name in names}
