"""The two products over nested weights: validation, flattening of leading dimensions, dispatch.

y = x wᵀ + bias with w[n, k] = rebuilt[n, k] * 2^row_exponent[n] (16-bit mode), or
w[n, k] = e4m3(upper[n, k]) * 2^(row_exponent[n] - 8) and x quantised to E4M3 per token (FP8 mode).
Accumulation is in float32. Nothing is synchronised with the host. The device is that of the operands,
whichever is current.

Products of one Hopper GPU share their scratch: two at once, on two streams or in parallel branches of a CUDA
graph, give wrong results or none. The first on a device allocates it, and the first FP8 product of so many
tokens more of it: a graph that would capture that is refused.

A product may be told of the bytes that the next one reads, `ahead`: at most two planes, equally long. It then
asks for their beginning as it ends, so that memory is not idle while small kernels run between the two. No
result depends on it, and only Hopper's kernels do it.

With `gated`, weight rows and bias are those of a gate and of its partner in turn (`nestedfp.kernels.gated`),
and y [..., N / 2] = silu(gate) * partner of the products, which are rounded to x's dtype first.
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from nestedfp.kernels.dispatch import TMA_ALIGNMENT, Backend, Capability, Mode, Problem, choose
from nestedfp.kernels.gated import check_gated, output_columns, silu_and_multiply
from nestedfp.kernels.layout import KOrder, check_order

log = logging.getLogger(__name__)

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def linear_16bit(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    ahead: tuple[Tensor, ...] = (),
    gated: bool = False,
) -> Tensor:
    """y [..., N], or [..., N / 2] if `gated`, in x's dtype, by the exact 16-bit weights.

    x [..., K] float16 or bfloat16, any strides; it must have the dtype the weight was nested from, which
    the caller knows. upper, lower: contiguous uint8 [N, K], columns in `order`. row_exponent: int8 [N].
    bias: [N] in x's dtype. Raises TypeError or ValueError naming the operand that does not fit.

    On a Hopper GPU not for two streams, or branches of a CUDA graph, at once: products share their scratch.
    """
    _check("linear_16bit", x, upper, row_exponent, bias, order, gated)
    _check_bytes("linear_16bit", "lower", lower, upper)
    _check_ahead("linear_16bit", ahead, upper)
    return multiply(Mode.BITS16, x, (upper, lower), row_exponent, bias, order, ahead, gated)


def linear_fp8(
    x: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None = None,
    *,
    order: KOrder = KOrder.NATURAL,
    ahead: tuple[Tensor, ...] = (),
    gated: bool = False,
) -> Tensor:
    """As `linear_16bit`, by the upper bytes alone.

    Each token of x is quantised to E4M3 with scale amax / 448.
    """
    _check("linear_fp8", x, upper, row_exponent, bias, order, gated)
    _check_ahead("linear_fp8", ahead, upper)
    return multiply(Mode.FP8, x, (upper,), row_exponent, bias, order, ahead, gated)


def multiply(
    mode: Mode,
    x: Tensor,
    weight: tuple[Tensor, ...],
    row_exponent: Tensor,
    bias: Tensor | None,
    order: KOrder,
    ahead: tuple[Tensor, ...],
    gated: bool = False,
) -> Tensor:
    """The product of `mode` of operands that are known to fit, as a layer's are, which meets them in every
    step. weight: the planes that the mode reads, (upper, lower) or (upper,)."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        # Modules are loaded and kernels launched on the current device, wherever the operands lie. Asked
        # first, since entering the context costs the host more than the question.
        with torch.cuda.device(x.device):
            return multiply(mode, x, weight, row_exponent, bias, order, ahead, gated)
    N, K = weight[0].shape
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], output_columns(N, gated)))
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    problem = Problem(mode, tokens.shape[0], N, K, _DTYPES[x.dtype], order, fits_bulk_copies(tokens, weight))
    backend, product = _product(problem, *_device(x.device))
    if backend is Backend.HOPPER:
        y = product(tokens, *weight, row_exponent, bias, ahead=ahead, gated=gated)
    else:
        y = product(tokens, *weight, row_exponent, bias)
        y = silu_and_multiply(y) if gated else y
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], -1)


@lru_cache(maxsize=4096)
def _product(
    problem: Problem, capability: Capability | None, device: str
) -> tuple[Backend, Callable[..., Tensor]]:
    """The kernel for a problem: every layer meets the same few, and on a GPU the host's time counts."""
    backend, config = choose(problem, capability, device)
    if backend is Backend.PORTABLE:
        _log_portable(problem.mode, problem.K, problem.order, problem.tma, capability)
    module = _module(backend)
    linear = module.linear_fp8 if problem.mode is Mode.FP8 else module.linear_16bit
    return backend, partial(linear, order=problem.order, **({} if config is None else {"config": config}))


def fits_bulk_copies(x: Tensor, weight: tuple[Tensor, ...]) -> bool:
    """Aligned bases, and rows of x that are dense, aligned and do not overlap."""
    M, K = x.shape
    pitch, unit = x.stride()
    if (unit != 1 and K > 1) or (M > 1 and (pitch < K or pitch * x.element_size() % TMA_ALIGNMENT)):
        return False
    starts = x.data_ptr()
    for plane in weight:
        starts |= plane.data_ptr()
    return starts % TMA_ALIGNMENT == 0


@cache
def _device(device: torch.device) -> tuple[Capability | None, str]:
    """Capability and name of a GPU."""
    if device.type == "cpu":
        return None, ""
    if device.type != "cuda":
        raise ValueError(f"no kernels for device {device}; use a CPU or a CUDA GPU")
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)


@cache
def _module(backend: Backend) -> ModuleType:
    return import_module(f"nestedfp.kernels.{backend}")


@cache
def _log_portable(mode: Mode, K: int, order: KOrder, tma: bool, capability: Capability | None) -> None:
    log.warning(
        "%s products with K=%d, order %s, bulk copies %s on compute capability %s use the portable kernels",
        mode,
        K,
        order,
        "possible" if tma else "impossible",
        capability,
    )


def _check(
    name: str, x: Tensor, upper: Tensor, row_exponent: Tensor, bias: Tensor | None, order: KOrder, gated: bool
) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: x has dtype {x.dtype}, expected torch.float16 or torch.bfloat16")
    if upper.dim() != 2 or upper.dtype != torch.uint8 or not upper.is_contiguous():
        raise ValueError(f"{name}: upper is {_describe(upper)}, expected contiguous torch.uint8 [N, K]")
    N, K = upper.shape
    if N == 0 or K == 0:
        raise ValueError(f"{name}: upper has shape [{N}, {K}], expected a non-empty weight")
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, the weight has K = {K}; x must be [..., {K}]"
        )
    check_order(order, K)
    if gated:
        check_gated(name, N)
    _check_vector(name, "row_exponent", row_exponent, torch.int8, N)
    if bias is not None:
        _check_vector(name, "bias", bias, x.dtype, N)
    for label, operand in (("upper", upper), ("row_exponent", row_exponent), ("bias", bias)):
        if operand is not None and operand.device != x.device:
            raise ValueError(
                f"{name}: x is on {x.device}, {label} on {operand.device}; move one to the other"
            )


def _check_bytes(name: str, label: str, tensor: Tensor, upper: Tensor) -> None:
    if tensor.dtype != torch.uint8 or tensor.shape != upper.shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {label} is {_describe(tensor)}, expected it like upper, {_describe(upper)}"
        )
    if tensor.device != upper.device:
        raise ValueError(f"{name}: upper is on {upper.device}, {label} on {tensor.device}")


def _check_ahead(name: str, ahead: tuple[Tensor, ...], upper: Tensor) -> None:
    for tensor in ahead:
        if (
            len(ahead) > 2
            or tensor.dtype != torch.uint8
            or not tensor.is_contiguous()
            or tensor.device != upper.device
            or tensor.numel() != ahead[0].numel()
        ):
            found = ", ".join(f"{_describe(entry)} on {entry.device}" for entry in ahead)
            raise ValueError(
                f"{name}: ahead is {found}; expected at most two contiguous torch.uint8 planes of one size "
                f"on {upper.device}"
            )


def _check_vector(name: str, label: str, tensor: Tensor, dtype: torch.dtype, N: int) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: {label} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.shape != (N,) or not tensor.is_contiguous():
        raise ValueError(f"{name}: {label} is {_describe(tensor)}, expected contiguous [{N}]")


def _describe(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tuple(tensor.stride())}"
    return f"{tensor.dtype} {list(tensor.shape)} {layout}"
