"""Products on a CPU."""

from nestedfp.kernels.reference import linear_16bit, linear_fp8

__all__ = ["linear_16bit", "linear_fp8"]
