"""What Python and the compiled code agree on: the operands of a product and the sizes they are padded to.

Free of llvmlite, so that importing the products does not load it: vLLM's CPU worker walks all loaded
modules when it starts, and stumbles over llvmlite's.
"""

from dataclasses import dataclass
from enum import IntEnum

CHUNK = 16
"""Columns handled at a time; staged tokens are padded to a multiple."""

BLOCK_ROWS = 16
"""Rows of the weight whose sums are finished together."""

STREAM_TOKENS = 4
"""Up to so many tokens, weights are rebuilt in registers and never stored."""


@dataclass(frozen=True)
class Variant:
    """One product: whether it is the FP8 one, and whether tokens are bfloat16 rather than float16."""

    fp8: bool
    bfloat16: bool

    @property
    def name(self) -> str:
        return f"{'fp8' if self.fp8 else '16bit'}_{'bfloat16' if self.bfloat16 else 'float16'}"


class Field(IntEnum):
    """The operands of a product: positions in an array of 64-bit integers, addresses among them."""

    X = 0
    X_STRIDE = 1
    UPPER = 2
    LOWER = 3
    EXPONENTS = 4
    BIAS = 5
    Y = 6
    M = 7
    N = 8
    K = 9
    STAGED = 10
    SCALE = 11
    SUMS = 12
    SUMS_PITCH = 13
    THREADS = 14
