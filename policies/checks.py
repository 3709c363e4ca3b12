"""Checks of values that come from outside: settings files and messages.

Every failure is an :class:`InvalidField` that names the field, the value given and the remedy.
Units stand in the field names (``_s`` is seconds, ``_per_s`` is per second).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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


@contextmanager
def within(place: str) -> Iterator[None]:
    """Put the dotted name ``place`` before the field of whatever is refused inside."""
    try:
        yield
    except InvalidField as error:
        raise InvalidField(f"{place}.{error.field}", error.value, error.remedy) from None


def number(
    field: str,
    value: object,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    above: float | None = None,
) -> float:
    """``value`` as a finite float within [minimum, maximum]; ``above`` is an open lower bound instead."""
    result = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            result = float(value)
    within = result >= minimum if above is None else result > above
    if not (within and result <= maximum and math.isfinite(result)):
        lower = f"at least {minimum:g}" if above is None else f"greater than {above:g}"
        upper = "" if math.isinf(maximum) else f" and at most {maximum:g}"
        raise InvalidField(field, value, f"give a finite number {lower}{upper}")
    return result


def integer(field: str, value: object, *, minimum: int = 0) -> int:
    """``value`` as an int of at least ``minimum``; a float is accepted only if it is whole."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = isinstance(value, int) or value.is_integer()
        if whole and value >= minimum:
            return int(value)
    raise InvalidField(field, value, f"give a whole number of at least {minimum}")


def take_integer(block: object, name: str, *, place: str = "", minimum: int = 0) -> None:
    """Check field ``name`` of a frozen dataclass and keep it as an int: YAML reads ``8.0`` or ``1e3`` as a
    float. ``place`` is the dotted name of the block.
    """
    field = f"{place}.{name}" if place else name
    object.__setattr__(block, name, integer(field, getattr(block, name), minimum=minimum))


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
