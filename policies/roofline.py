"""Step costs of Llama-3.1-8B on one H100 80GB HBM3, from the roofline and a handful of measured rates.

Used wherever no measured engine profile is at hand; every figure that rests on it is labelled "simulated".

- Linear layers: 32 x (6144 x 4096 + 4096 x 4096 + 28672 x 4096 + 4096 x 14336) = 6.98e9 weights; the
  vocabulary head (128256 x 4096) stays in 16 bits in either mode.
- Memory: 2.84 TB/s, the rate of cuBLAS FP16 at M = 16 on the (28672, 4096) layer (85 % of the datasheet's
  3.35).
- Compute: 600 TFLOP/s in the 16-bit mode (cuBLAS reaches 648 there), 1,100 in FP8 with the activation
  quantiser.
- KV cache: 32 layers x 8 heads x 128 x 2 (K and V) x 2 bytes = 128 KiB a token; attention at 400 TFLOP/s.
- Overheads: 1.7 ms a step and 14 us a sequence, chosen to meet the first measured engine (vLLM 0.26.0,
  tokens/s):

  | batch, tokens in/out | 16 bits measured | model | FP8 measured | model |
  |---|---|---|---|---|
  | 1, 128/64 | 143 | 143 | 217 | 220 |
  | 32, 128/128 | 3,900 | 3,769 | 5,451 | 5,619 |
  | 256, 128/128 | 12,091 | 12,992 | 18,401 | 17,915 |
"""

from __future__ import annotations

from typing import Final

from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16

NAME: Final = "H100 roofline, Llama-3.1-8B"
LABEL: Final = f"simulated: {NAME}"

LINEAR_WEIGHTS: Final = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
HEAD_WEIGHTS: Final = 128256 * 4096
MEMORY_BYTES_PER_S: Final = 2.84e12
FP16_FLOP_PER_S: Final = 600e12
FP8_FLOP_PER_S: Final = 1100e12
ATTENTION_FLOP_PER_S: Final = 400e12
KV_BYTES_PER_TOKEN: Final = 32 * 8 * 128 * 2 * 2
KV_CAPACITY_TOKENS: Final = 400_000
"""90 % of 80 GB, less 16 GB of weights and 3 GB of graphs and workspaces, at 128 KiB a token."""
STEP_OVERHEAD_S: Final = 1.7e-3
SEQUENCE_OVERHEAD_S: Final = 14e-6
FLIP_S: Final = 89e-6
"""Swap of the graph families, measured on one H100."""


def _costs(bytes_per_weight: int, flop_per_s: float) -> StepCosts:
    weight_bytes = LINEAR_WEIGHTS * bytes_per_weight + HEAD_WEIGHTS * 2
    return StepCosts(
        overhead_s=STEP_OVERHEAD_S,
        weights_s=weight_bytes / MEMORY_BYTES_PER_S,
        token_s=2 * LINEAR_WEIGHTS / flop_per_s,
        sequence_s=SEQUENCE_OVERHEAD_S,
        context_token_s=KV_BYTES_PER_TOKEN / MEMORY_BYTES_PER_S,
        pair_s=4 * 4096 * 32 / ATTENTION_FLOP_PER_S,
    )


def latency_model(chunk_tokens: int = 2048) -> LatencyModel:
    """The roofline as a latency model for ``fp16`` and ``fp8``."""
    costs = {FP16: _costs(2, FP16_FLOP_PER_S), FP8: _costs(1, FP8_FLOP_PER_S)}
    return LatencyModel(costs=costs, chunk_tokens=chunk_tokens)


def described(model: LatencyModel | None) -> str:
    """Where the step costs come from that a policy begins with: the settings, or this file without them."""
    return NAME if model is None or model.costs == latency_model().costs else "policy.latency"
