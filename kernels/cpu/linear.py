"""The two products on a CPU: operands checked and laid out, then one call into compiled code.

The code runs in torch's own OpenMP pool (`torch.get_num_threads`), may be called from several threads at
once, and is compiled once a process, at the first call or by `warm_up`.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestedfp.format import ZERO
from nestedfp.kernels.cpu.operands import BLOCK_ROWS, CHUNK, STREAM_TOKENS, Field, Variant
from nestedfp.kernels.layout import KOrder, unstore

if TYPE_CHECKING:
    from nestedfp.kernels.cpu import emit

_Entry = Callable[[ctypes.Array[ctypes.c_int64]], None]
_compiling = threading.Lock()
_Fields = ctypes.c_int64 * len(Field)


def linear_16bit(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
) -> Tensor:
    """y [M, N] in x's dtype by the exact weights: summed in float32, rounded once.

    x [M, K] float16 or bfloat16, any strides. upper, lower: contiguous uint8 [N, K]. row_exponent int8 [N].
    bias [N] in x's dtype. Any `order` is right; only the natural one is fast. Operands are trusted: the
    public functions of `nestedfp.kernels` check them.
    """
    return _linear(False, x, upper, lower, row_exponent, bias, order)


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
) -> Tensor:
    """y [M, N] in x's dtype by the upper bytes, with x rounded to E4M3 per token; operands as above."""
    return _linear(True, x, upper, upper, row_exponent, bias, order)


def warm_up() -> float:
    """Compiles every product now rather than at the first call; the seconds it took, next to none if done."""
    start = time.perf_counter()
    _program()
    return time.perf_counter() - start


def _linear(
    fp8: bool,
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    order: KOrder,
) -> Tensor:
    M, K = x.shape
    N = upper.shape[0]
    y = torch.empty((M, N), dtype=x.dtype)
    if M == 0 or N == 0:
        return y
    # An order made for a GPU is undone in each call.
    upper, lower = unstore(upper, order), unstore(lower, order)
    if K < CHUNK:
        # Zeros of x meet weights of zero: bytes of zero would rebuild to NaN.
        padding = (0, CHUNK - K)
        x = torch.nn.functional.pad(x, padding)
        planes = zip((upper, lower), ZERO, strict=True)
        upper, lower = (torch.nn.functional.pad(byte, padding, value=value) for byte, value in planes)
        K = CHUNK
    if x.stride(1) != 1:
        x = x.contiguous()
    pitch = -(-K // CHUNK) * CHUNK
    threads = torch.get_num_threads()
    sums = max(M, STREAM_TOKENS) * BLOCK_ROWS
    scratch = torch.empty(M * (pitch + 1) + threads * sums, dtype=torch.float32)
    staged = scratch.data_ptr()
    scale = staged + 4 * M * pitch
    _entry(fp8, x.dtype)(
        _Fields(
            x.data_ptr(),
            x.stride(0),
            upper.data_ptr(),
            lower.data_ptr(),
            row_exponent.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            M,
            N,
            K,
            staged,
            scale,
            scale + 4 * M,
            sums,
            threads,
        )
    )
    return y


@cache
def _entry(fp8: bool, dtype: torch.dtype) -> _Entry:
    variant = Variant(fp8, dtype is torch.bfloat16)
    prototype = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))
    return prototype(_program().address(f"linear_{variant.name}"))


def _program() -> "emit.Program":
    with _compiling:
        return _compiled()


@cache
def _compiled() -> "emit.Program":
    from nestedfp.kernels.cpu import emit, region  # loads llvmlite, see operands.py

    return emit.Program(region.build_module())
