"""What an engine reports about its precision: plain data, importable without vLLM or torch."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class EngineStatus:
    """One engine's state at monotonic time `at` (seconds, the engine process's clock).

    Every counter counts executed steps, as the worker reported them, since the engine started.
    """

    mode: str
    """The target: `fp16`, `fp8`, `auto` or a named plan."""
    epoch: int
    """The epoch that came with the target; 0 before the first."""
    current: str
    """The plan of the last executed step (`fp16` before the first)."""
    steps: dict[str, int]
    """Executed steps by plan."""
    tokens: dict[str, int]
    """Scheduled tokens of executed steps (prompt computed and output) by plan."""
    flips: int
    """Steps that ran under another plan than the step before."""
    last_flip_seconds: float | None
    """Time the worker took for the last flip."""
    last_flip_reason: str | None
    mixed_steps: int | None
    """Steps in which some layer ran a precision other than the plan's, added up over the ranks of tensor
    parallelism; None where steps are not checked."""
    running: int
    waiting: int
    waiting_prompt_tokens: int
    oldest_waiting_s: float
    kv_usage: float
    """Share of the KV-cache blocks in use, 0 to 1."""
    step_time_s: dict[str, float | None]
    """Exponentially weighted mean of the time between the outputs of busy steps, by plan."""
    layers: dict[str, int]
    """Linear layers by state: `nested` and `plain`."""
    plain_reasons: dict[str, int]
    """Why layers stayed plain: reason -> count."""
    strict_running: int
    """Unfinished requests that insist on 16 bits."""
    at: float
    batch_tokens: dict[str, float | None] = field(default_factory=dict)
    """Exponentially weighted mean of a step's tokens, by plan, over the same steps as `step_time_s`."""
    bounded_steps: int = 0
    """Steps that the target's bounds held to fewer tokens than the engine takes at most."""
    step_corrections: dict[str, float] = field(default_factory=dict)
    """Measured step times over those of the target's terms, by plan; of plans that ran under bounds."""
    context_tokens: int | None = None
    """Tokens in the KV cache of the running requests together."""
    inexact_rows: int = 0
    """Rows of nested layers that are rounded, by less than 2^-24 of the row's largest weight, added up over
    the ranks of tensor parallelism."""
    fused_mlps: int = 0
    """MLPs whose activation is computed within a product."""
    unfused_reasons: dict[str, int] = field(default_factory=dict)
    """Why other MLPs with vLLM's SiluAndMul are not such: reason -> count. Empty where `fuse_silu` is off."""
    graphs: dict[str, dict[str, float]] = field(default_factory=dict)
    """CUDA-graph families by plan: `graphs` captured, `bytes` taken, `seconds` to capture. Empty on a CPU."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Raises ValueError naming the fields that are missing or unknown."""
        known = {f.name for f in fields(cls)}
        missing, unknown = known - data.keys(), data.keys() - known
        if missing or unknown:
            raise ValueError(
                f"engine status: missing {sorted(missing)}, unknown {sorted(unknown)}; "
                "the engine and its caller run different versions of nestedfp"
            )
        return cls(**data)
