"""A SwiGLU MLP of vLLM's own layers, nested on a CPU, without an engine."""

from typing import Any

import torch
from torch import nn

from nestedfp.kernels.gated import TURN
from nestedfp.vllm import compat
from nestedfp.vllm.linear import NestedLinearMethod
from nestedfp.vllm.settings import Inexact

MergedLinear, SiluAndMul = compat.swiglu_classes()
N, K = 96, 128


def weights(
    rows: int = N, columns: int = K, seed: int = 0, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of unlike magnitude, so that their exponents are unlike, too.
    scale = torch.logspace(-2, 1, rows, 2)[torch.randperm(rows, generator=generator), None]
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def in_turn(products: torch.Tensor) -> torch.Tensor:
    """Columns of the gate and its partner in turn."""
    return products.unflatten(-1, (2, -1, TURN)).transpose(-3, -2).flatten(-3)


def merged(
    weight: torch.Tensor | None = None, parts: tuple[int, ...] = (N // 2, N // 2), **changes: Any
) -> Any:
    """vLLM's layer with a loaded weight, without the process groups that its constructor asks for."""
    layer: Any = MergedLinear.__new__(MergedLinear)
    nn.Module.__init__(layer)
    facts = {"gather_output": False, "return_bias": True, "skip_bias_add": False, "tp_size": 1, "bias": None}
    for name, value in {**facts, **changes, "output_partition_sizes": list(parts)}.items():
        setattr(layer, name, value)
    layer.quant_method = NestedLinearMethod("model.layers.0.mlp.gate_up_proj", Inexact.NEAREST)
    load(layer, weights() if weight is None else weight)
    return layer


def load(layer: Any, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)


class MLP(nn.Module):
    """As vLLM's models have them, with a `forward` that the tests replace."""

    def __init__(self, gate_up: Any = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_up = merged() if gate_up is None else gate_up
        self.act = SiluAndMul() if act is None else act

    def forward(self, x: torch.Tensor) -> Any:
        x, _ = self.gate_up(x)
        return self.act(x)
