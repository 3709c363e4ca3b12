"""Which products run before an engine is ready."""

import pytest
import torch
from torch import nn

from nestedfp.kernels.dispatch import Backend, Mode, Problem, configuration, table
from nestedfp.kernels.layout import KOrder
from nestedfp.vllm.warm_up import distinct_layers, run_products, token_counts

H100 = (9, 0)


@pytest.mark.parametrize("largest", [512, 2048, 8192])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_tabled_configuration_is_met(mode: Mode, largest: int) -> None:
    tabled = {row.M for row in table(Backend.HOPPER, H100)}
    counts = token_counts(largest, [1, 2, 4, 8], tabled)
    assert max(counts) == largest

    def configurations(tokens: list[int]) -> set[str]:
        problems = [Problem(mode, M, 6144, 4096, "float16", KOrder.HOPPER) for M in tokens]
        return {str(configuration(Backend.HOPPER, problem, H100)) for problem in problems}

    assert configurations(counts) == configurations([*range(1, largest + 1, 7), largest])


def test_captured_sizes_are_met_and_none_is_too_large() -> None:
    counts = token_counts(100, [24, 40, 512], [])
    assert {24, 40, 1, 64, 96, 100} <= set(counts)
    assert max(counts) == 100


class Method:
    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.seen.append((x.shape[0], bias is not None))
        return x


def layer(N: int, K: int, bias: bool = False) -> nn.Module:
    module = nn.Module()
    module.weight_upper = nn.Parameter(torch.zeros(N, K, dtype=torch.uint8), requires_grad=False)
    module.bias = nn.Parameter(torch.zeros(N)) if bias else None
    module.quant_method = Method()
    return module


def test_one_layer_of_each_shape_runs_at_every_count() -> None:
    model = nn.ModuleDict(
        {str(i): nn.ModuleDict({"qkv": layer(6, 4, bias=True), "o": layer(4, 4)}) for i in range(3)}
    )
    model["head"] = nn.Linear(4, 8)
    layers = distinct_layers(model)
    assert [tuple(found.weight_upper.shape) for found in layers] == [(6, 4), (4, 4)]
    run_products(layers, [1, 5], torch.float16)
    assert layers[0].quant_method.seen == [(1, True), (5, True)]
    assert layers[1].quant_method.seen == [(1, False), (5, False)]
