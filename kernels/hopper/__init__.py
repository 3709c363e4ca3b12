"""Products on Hopper GPUs (compute capability 9.0), in Gluon."""

from nestedfp.kernels.hopper.fp8 import linear_fp8

__all__ = ["linear_fp8"]
