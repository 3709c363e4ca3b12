"""Products on Hopper GPUs (compute capability 9.0)."""

from nestedfp.kernels.dispatch import Config, Mode
from nestedfp.kernels.hopper import fp8
from nestedfp.kernels.hopper import linear_16bit as sixteen
from nestedfp.kernels.hopper.fp8 import linear_fp8
from nestedfp.kernels.hopper.linear_16bit import linear_16bit

__all__ = ["candidates", "linear_16bit", "linear_fp8"]


def candidates(mode: Mode, M: int, N: int, K: int, dtype: str) -> list[Config]:
    """Configurations worth timing for a product, as `linear_16bit` and `linear_fp8` take them.

    They are what a table stores, the same ones for either `dtype`.
    """
    if mode is Mode.FP8:
        return fp8.candidates(M, N, K)
    return sixteen.candidates(M, N, K)
