"""Numba's compiler for the step loop, with its cache on disk.

Numba renews the cache of a function when the file of that function changes, not when the file of one that it
calls does. So the cache lies in a folder named after all the sources together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_HERE: Final = Path(__file__).parent
SOURCES: Final = (_HERE.parent / "steps.py", *sorted(_HERE.glob("*.py")))
"""Every file with a function that is compiled."""


def _cache() -> Path:
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()
    return Path(numba.config.CACHE_DIR or _HERE / "__pycache__") / f"numba-{digest[:16]}"


_CACHE: Final = str(_cache())


def njit(function: F) -> F:
    """``function`` compiled at its first call, typed as it is."""
    before = numba.config.CACHE_DIR
    # Read when the decorator runs. Where it cannot be written to, numba takes a folder of its own.
    numba.config.CACHE_DIR = _CACHE
    try:
        return cast(F, numba.njit(cache=True)(function))
    finally:
        numba.config.CACHE_DIR = before
