"""Contenders of the kernel benchmark: the products and what they are compared with, on the same operands.

All of them multiply the same random normal weights and tokens. FP8 contenders quantise the tokens each time.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nestedfp.kernels import linear_16bit, linear_fp8, preferred_order
from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.portable.gemm import quantize_kernel
from nestedfp.kernels.timing import Contender, copies_past_cache
from nestedfp.weight import NestedWeight, nest

CUBLAS = "cublas-16bit"
SCALED_MM = "torch-scaled-mm"
CUTLASS = "vllm-cutlass"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_WEIGHT_DEVIATION = 0.02
# Row-wise FP8 baselines take N and K in multiples of this.
_FP8_GRANULE = 16
# Relative errors in norm beyond which a product is wrong: rounding of the output, and of E4M3 tokens and
# weights (each 2.6 % on normal data).
_TOLERANCE = {(Mode.BITS16, "float16"): 2e-3, (Mode.BITS16, "bfloat16"): 1e-2}
_FP8_TOLERANCE = 8e-2
_CHECKED_TOKENS = 64


class Operands:
    """Input sets for one [N, K] and dtype, past the cache in sum even where one byte a weight is read.

    Sets are copies: distinct memory, the same values.
    """

    def __init__(self, N: int, K: int, dtype: str, most_tokens: int) -> None:
        self.N, self.K, self.dtype = N, K, dtype
        self.sets = copies_past_cache(N * K)
        device = torch.device("cuda")
        plain = (torch.randn(N, K, device=device) * _WEIGHT_DEVIATION).to(DTYPES[dtype])
        nested = nest(plain, order=preferred_order(device, N, K), require_exact=False)
        codes, scale = nested.fp8()
        self._tokens = torch.randn(self.sets, most_tokens, K, device=device, dtype=DTYPES[dtype])
        self._plain = _copies(plain, self.sets)
        self._nested = _nested_copies(nested, self.sets)
        self._codes = [c.view(torch.float8_e4m3fn) for c in _copies(codes.view(torch.uint8), self.sets)]
        self._scales = _copies(scale, self.sets)

    def x(self, i: int, M: int) -> Tensor:
        """The tokens [M, K] of set i, contiguous."""
        return self._tokens[i, :M]

    def plain(self, i: int) -> Tensor:
        """The 16-bit weight [N, K] of set i."""
        return self._plain[i]

    def nested(self, i: int) -> NestedWeight:
        """The same, nested."""
        return self._nested[i]

    def fp8(self, i: int) -> tuple[Tensor, Tensor]:
        """The same as E4M3 [N, K] in natural order, and float32 row scales [N]."""
        return self._codes[i], self._scales[i]


def _copies(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(1, count))]


def _nested_copies(nested: NestedWeight, count: int) -> list[NestedWeight]:
    parts = (_copies(part, count) for part in (nested.upper, nested.lower, nested.row_exponent))
    return [
        NestedWeight(upper, lower, exponent, nested.dtype, nested.order, nested.exactness)
        for upper, lower, exponent in zip(*parts, strict=True)
    ]


def product(mode: Mode, operands: Operands, M: int, gated: bool = False) -> Contender:
    """The public product of `mode`; `gated` takes its rows for those of pairs, whatever they hold."""

    def bits16(i: int) -> Tensor:
        w = operands.nested(i)
        return linear_16bit(operands.x(i, M), w.upper, w.lower, w.row_exponent, order=w.order, gated=gated)

    def fp8(i: int) -> Tensor:
        w = operands.nested(i)
        return linear_fp8(operands.x(i, M), w.upper, w.row_exponent, order=w.order, gated=gated)

    return fp8 if mode is Mode.FP8 else bits16


def cublas(operands: Operands, M: int) -> Contender:
    """`torch.mm` in the weights' own dtype."""
    return lambda i: torch.mm(operands.x(i, M), operands.plain(i).T)


def fp8_baselines(operands: Operands, M: int) -> dict[str, Contender]:
    """The row-wise FP8 products that take these sizes, quantiser included; vLLM's where it is installed."""
    if operands.N % _FP8_GRANULE or operands.K % _FP8_GRANULE:
        return {}
    quantise = vllm_quantiser() or own_quantiser
    matrix_product = _vllm_product()
    dtype = DTYPES[operands.dtype]

    def scaled_mm(i: int) -> Tensor:
        codes, scale = quantise(operands.x(i, M))
        w, w_scale = operands.fp8(i)
        # With row-wise scales it offers this output dtype alone.
        return torch._scaled_mm(
            codes, w.T, scale, w_scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def cutlass(i: int) -> Tensor:
        assert matrix_product is not None
        codes, scale = quantise(operands.x(i, M))
        w, w_scale = operands.fp8(i)
        return matrix_product(codes, w.T, scale, w_scale[:, None], dtype)

    return {SCALED_MM: scaled_mm} | ({CUTLASS: cutlass} if matrix_product else {})


Quantiser = Callable[[Tensor], tuple[Tensor, Tensor]]


def own_quantiser(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, K] in natural order and scales [M, 1]."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    M, K = x.shape
    quantize_kernel[(M,)](x, codes, scale, K, *x.stride(), PERMUTED=False, BLOCK_K=1024)
    return codes, scale


@cache
def vllm_quantiser() -> Quantiser | None:
    """vLLM's `scaled_fp8_quant` with a scale a token, None where vLLM is not installed."""
    try:
        from vllm._custom_ops import scaled_fp8_quant
    except ImportError:
        return None
    return lambda x: scaled_fp8_quant(x, use_per_token_if_dynamic=True)


@cache
def _vllm_product() -> Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor] | None:
    try:
        from vllm._custom_ops import cutlass_scaled_mm
    except ImportError:
        return None
    return lambda a, b, scale_a, scale_b, dtype: cutlass_scaled_mm(a, b, scale_a, scale_b, dtype)


def error(contender: Contender, operands: Operands, M: int) -> float:
    """Relative error in norm of set 0's product on up to 64 of its tokens, against `torch.mm` in float32."""
    step = -(-M // _CHECKED_TOKENS)
    y = contender(0)
    assert isinstance(y, Tensor)
    truth = operands.x(0, M)[::step].float() @ operands.plain(0).float().T
    return float((y[::step].float() - truth).norm() / truth.norm())


def tolerance(mode: Mode, dtype: str) -> float:
    """What `error` may be for a right product."""
    return _FP8_TOLERANCE if mode is Mode.FP8 else _TOLERANCE[mode, dtype]
