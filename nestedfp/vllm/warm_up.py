"""Kernels compiled while weights load, and products run once before an engine is ready, so that nothing is
compiled in service."""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nestedfp.kernels import KOrder, preferred_order
from nestedfp.kernels.dispatch import Backend, table, token_grid
from nestedfp.weight import DTYPES


def begin_compiling(device: torch.device, N: int, K: int, dtype: torch.dtype, gated: bool) -> None:
    """Compiles in the background what products of a weight [N, K] of `dtype` need, gated or plain ones, if
    `device` has such kernels."""
    if device.type == "cuda" and dtype in DTYPES and preferred_order(device, N, K) is KOrder.HOPPER:
        _precompiler().add(N, K, dtype, gated)


def finish_compiling() -> None:
    """Waits for what was begun. What failed is raised by the first product that needs it."""
    if _precompiler.cache_info().currsize:
        _precompiler().wait()


@cache
def _precompiler() -> Any:
    precompile = import_module("nestedfp.kernels.precompile")
    return precompile.Precompiler(precompile.threads_beside_other_work(), torch.cuda.get_device_name())


def token_counts(largest: int, tabled: Iterable[int]) -> list[int]:
    """Token counts, ascending and at most `largest`, that meet every configuration of the kernels.

    Hopper's rules find theirs for the counts of `token_grid`, where a table may have one of its own, but not
    for a token less; the portable kernels' change at powers of two or between them.
    """
    powers = [1 << exponent for exponent in range(largest.bit_length())]
    between = [3 * power // 2 for power in powers if power > 1]
    grid = token_grid(largest)
    counts = {*tabled, *powers, *between, *grid, *(count - 1 for count in grid), largest}
    return sorted(count for count in counts if 0 < count <= largest)


def tabled_counts(device: torch.device) -> set[int]:
    """Token counts for which this device's tables hold a configuration."""
    if device.type != "cuda":
        return set()
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    return {row.M for backend in Backend for row in table(backend, capability, name)}


def distinct_layers(model: torch.nn.Module) -> list[Any]:
    """One nested layer of `model` for each shape, bias or not, gated or not, and plan kind."""
    found: dict[tuple[Any, ...], Any] = {}
    for name, layer in model.named_modules():
        upper: Tensor | None = getattr(layer, "weight_upper", None)
        if upper is not None:
            without_bias = getattr(layer, "bias", None) is None
            key = (*upper.shape, without_bias, layer.quant_method.gated, name.rpartition(".")[2])
            found.setdefault(key, layer)
    return list(found.values())


def run_products(layers: Iterable[Any], counts: Iterable[int], dtype: torch.dtype) -> None:
    """Runs each layer's product at each token count, under the plan in force."""
    sizes = list(counts)
    for layer in layers:
        upper: Tensor = layer.weight_upper
        x = torch.zeros(max(sizes), upper.shape[1], dtype=dtype, device=upper.device)
        for size in sizes:
            layer.quant_method.apply(layer, x[:size], getattr(layer, "bias", None))
