"""Products in plain Triton, for any GPU it supports and, interpreted, for tests on a CPU."""

from nestedfp.kernels.portable.linear import candidates, linear_16bit, linear_fp8

__all__ = ["candidates", "linear_16bit", "linear_fp8"]
