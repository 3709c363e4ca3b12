"""NestedFP: one 16-bit copy of a model's weights, served as FP16 (or BF16) and as FP8.

Importing this package loads neither torch nor vLLM: the names below are resolved on first use, so
that the pure sub-packages (`nestedfp.policies`, `nestedfp.loadtests`) stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestedfp.linear import nested_linear as nested_linear
    from nestedfp.precision import Precision as Precision
    from nestedfp.weight import InexactRowsError as InexactRowsError
    from nestedfp.weight import NestedWeight as NestedWeight
    from nestedfp.weight import NonFiniteWeightError as NonFiniteWeightError
    from nestedfp.weight import nest as nest

_HOME = {
    "InexactRowsError": "nestedfp.weight",
    "NestedWeight": "nestedfp.weight",
    "NonFiniteWeightError": "nestedfp.weight",
    "Precision": "nestedfp.precision",
    "nest": "nestedfp.weight",
    "nested_linear": "nestedfp.linear",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nestedfp' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
