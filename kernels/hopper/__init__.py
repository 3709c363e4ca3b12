"""Products on Hopper GPUs (compute capability 9.0), in Gluon."""

from nestedfp.kernels.hopper.fp8 import linear_fp8
from nestedfp.kernels.hopper.gemm_16bit import linear_16bit

__all__ = ["linear_16bit", "linear_fp8"]
