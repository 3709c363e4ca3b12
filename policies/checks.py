"""Checks of values that come from outside: settings files and messages.

Every failure is an :class:`InvalidField` that names the field, the value given and the remedy.
Units stand in the field names (``_s`` is seconds, ``_per_s`` is per second).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_MAX_TEXT = 256


class InvalidField(ValueError):
    """A field holds a value that cannot be used.

    ``field`` is its dotted name, ``value`` what was given, ``remedy`` what to write instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(field, value, remedy)
        self.field = field
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.field}: got {self.value!r}; {self.remedy}"


def number(
    field: str,
    value: object,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    above: float | None = None,
) -> float:
    """``value`` as a finite float within [minimum, maximum]; ``above`` is an open lower bound instead."""
    lower = f"at least {minimum:g}" if above is None else f"greater than {above:g}"
    wanted = f"give a finite number {lower}" + ("" if math.isinf(maximum) else f" and at most {maximum:g}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidField(field, value, wanted)
    try:
        result = float(value)
    except OverflowError:
        raise InvalidField(field, value, wanted) from None
    if not math.isfinite(result) or result > maximum:
        raise InvalidField(field, value, wanted)
    if result < minimum if above is None else result <= above:
        raise InvalidField(field, value, wanted)
    return result


def integer(field: str, value: object, *, minimum: int = 0) -> int:
    """``value`` as an int of at least ``minimum``; a float is accepted only if it is whole."""
    remedy = f"give a whole number of at least {minimum}"
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or whole):
        raise InvalidField(field, value, remedy)
    result = int(value)  # type: ignore[call-overload]
    if result < minimum:
        raise InvalidField(field, value, remedy)
    return int(result)


def text(field: str, value: object) -> str:
    """``value`` as a non-empty string of at most 256 characters."""
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT:
        raise InvalidField(field, value, f"give a non-empty string of at most {_MAX_TEXT} characters")
    return value


def name(field: str, value: object) -> str:
    """``value`` as a lower-case name: a letter, then letters, digits, ``_``, ``.``, ``-``; at most 64."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise InvalidField(field, value, "give a lower-case name such as 'fp16' or 'mlp-fp8'")
    return value


def flag(field: str, value: object) -> bool:
    """``value`` as a bool; numbers and strings are refused."""
    if not isinstance(value, bool):
        raise InvalidField(field, value, "give true or false")
    return value


def one_of(field: str, value: object, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise InvalidField(field, value, f"choose one of {', '.join(allowed)}")
    return value


def mapping(field: str, value: object, known: Iterable[str]) -> Mapping[str, Any]:
    """``value`` as a mapping whose keys are all among ``known``."""
    keys = tuple(known)
    if not isinstance(value, Mapping):
        raise InvalidField(field, value, f"give a mapping with keys among {', '.join(keys)}")
    for key in value:
        if key not in keys:
            where = f"{field}.{key}" if field else str(key)
            raise InvalidField(where, value[key], f"remove it: the known keys are {', '.join(keys)}")
    return value
