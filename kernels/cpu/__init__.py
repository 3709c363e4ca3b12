"""Products on a CPU: vector code emitted through LLVM, so that the real engine runs anywhere."""

from nestedfp.kernels.cpu.linear import linear_16bit, linear_fp8, warm_up

__all__ = ["linear_16bit", "linear_fp8", "warm_up"]
