"""CUDA C++ kernels for Hopper: sources, and how they are compiled at first use and launched."""
