"""Durations as people write and read them: `90s`, `15m`, `2h`."""

from __future__ import annotations

import re
from typing import Final

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smh])")
_TENTHS_BELOW_S: Final = 9.95


def parse(text: str, longest_s: float) -> float:
    """Seconds of a number and its unit, more than 0 and at most `longest_s`; else a ValueError with the
    remedy. A number without a unit is refused: seconds and minutes are too easily taken for each other.
    """
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0.0 < seconds <= longest_s:
        raise ValueError(
            f"got {text!r}; give a number and its unit, such as 90s, 15m or 2h: "
            f"more than 0 and at most {show(longest_s)}"
        )
    return seconds


def show(seconds: float) -> str:
    """`0.4s`, `42s`, `14m59s`, `2h05m`, `24h`: two units at most, rounded; what is negative counts as 0."""
    if seconds < _TENTHS_BELOW_S:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return _two(whole, "m", "s")
    return _two(round(seconds / 60), "h", "m")


def _two(count: int, unit: str, part: str) -> str:
    whole, rest = divmod(count, 60)
    return f"{whole}{unit}{rest:02}{part}" if rest else f"{whole}{unit}"
