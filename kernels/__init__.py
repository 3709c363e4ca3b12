"""Products over nested weights, and the choice of a kernel for each device and shape.

`linear_16bit` and `linear_fp8` validate and dispatch; one folder per kind of device holds the kernels.
Names load on first use, so that importing this package costs neither torch nor Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestedfp.kernels.dispatch import preferred_order
    from nestedfp.kernels.layout import KOrder
    from nestedfp.kernels.product import linear_16bit, linear_fp8

__all__ = ["KOrder", "linear_16bit", "linear_fp8", "preferred_order"]

_HOMES = {
    "KOrder": "layout",
    "linear_16bit": "product",
    "linear_fp8": "product",
    "preferred_order": "dispatch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
