"""The matrices and numbers of tokens that benchmarks and tuning go through."""

import argparse
from typing import NamedTuple

from nestedfp.kernels.dispatch import Mode


class Shape(NamedTuple):
    """A linear layer's weight [N, K], named by the model and layer it comes from."""

    model: str
    layer: str
    N: int
    K: int


GATE_UP, DOWN = "gate_up", "down"
_LAYERS = (GATE_UP, "o", "qkv", DOWN)
_SIZES = {
    "Llama-3.1-8B": ((28672, 4096), (4096, 4096), (6144, 4096), (4096, 14336)),
    "Mistral-Small-24B": ((65536, 5120), (5120, 4096), (6144, 5120), (5120, 32768)),
    "Phi-4": ((35840, 5120), (5120, 5120), (7680, 5120), (5120, 17920)),
    "Mistral-Nemo-12B": ((28672, 5120), (5120, 4096), (6144, 5120), (5120, 14336)),
}
SHAPES = tuple(
    Shape(model, layer, *size)
    for model, sizes in _SIZES.items()
    for layer, size in zip(_LAYERS, sizes, strict=True)
)
"""Sixteen layers of four dense models, fused as vLLM fuses them; ordered so that a cut run is of use."""

TOKEN_GROUPS = {
    "M = 1 … 64": (1, 2, 4, 8, 16, 32, 64),
    "128 … 512": (128, 256, 512),
    "1024 … 8192": (1024, 2048, 4096, 8192),
}
"""Decode, mixed batches, prefill: the columns over which ratios are averaged."""

TOKENS = tuple(M for group in TOKEN_GROUPS.values() for M in group)


def traffic(mode: Mode, M: int, N: int, K: int) -> int:
    """The fewest bytes a product must move: its weight's, and 16-bit tokens in and out."""
    return (1 if mode is Mode.FP8 else 2) * N * K + 2 * M * (K + N)


def by_size(shapes: list[Shape]) -> dict[tuple[int, int], list[Shape]]:
    """The layers of each distinct (N, K), in order of first appearance."""
    groups: dict[tuple[int, int], list[Shape]] = {}
    for shape in shapes:
        groups.setdefault((shape.N, shape.K), []).append(shape)
    return groups


def parse_shapes(text: str) -> list[Shape]:
    """Comma-separated models, layers (`Phi-4/qkv` or `qkv`) and sizes (`4096x14336`, N by K)."""
    found: list[Shape] = []
    for part in text.split(","):
        sizes = part.split("x")
        if len(sizes) == 2 and all(size.isdigit() and int(size) for size in sizes):
            found.append(Shape("any", part, int(sizes[0]), int(sizes[1])))
            continue
        named = [s for s in SHAPES if part in (s.model, s.layer, f"{s.model}/{s.layer}")]
        if not named:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no shape; expected one of {', '.join(_SIZES)}, one of {', '.join(_LAYERS)}, "
                "MODEL/LAYER, or NxK such as 4096x14336"
            )
        found += named
    return list(dict.fromkeys(found))


def parse_tokens(text: str) -> list[int]:
    """Comma-separated numbers of tokens, each positive."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers of tokens such as 1,16,256")
    return list(dict.fromkeys(int(part) for part in parts))
