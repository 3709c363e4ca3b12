"""The few pieces of SVG that the report's picture is drawn from. Pure; sizes in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


def element(name: str, content: str | None = None, /, **attributes: str | float | None) -> str:
    """One SVG or HTML element. Attribute values are escaped, ``content`` is not; None leaves one out.

    ``class_`` is ``class``, other underscores are hyphens; numbers are cut to a tenth.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{shown}/>" if content is None else f"<{name}{shown}>{content}</{name}>"


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def label(x: float, y: float, text: str, class_: str = "tick", anchor: str = "start") -> str:
    """Text with its baseline at (x, y)."""
    return element("text", escape(text), x=x, y=y, class_=class_, text_anchor=anchor)


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` over pixels from ``start`` to ``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"an axis cannot run from {self.low} to {self.high} (log: {self.log})")

    @classmethod
    def fitting(cls, values: Iterable[float], start: float, end: float) -> Axis:
        """From 0 to just above the largest value; logarithmic if the values span more than a factor of 30."""
        positive = sorted(value for value in values if value > 0)
        if not positive:
            return cls(0.0, 1.0, start, end)
        low, high = positive[len(positive) // 50], positive[-1]
        if high > 30 * low:
            return cls(positive[0] / 1.2, high * 1.2, start, end, log=True)
        return cls(0.0, high * 1.08, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value, held within the axis."""
        held = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(held / self.low) / math.log(self.high / self.low)
        else:
            share = (held - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About ``count`` round values on the axis: steps of 1, 2 or 5 times a power of ten."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                made = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
                if len(made) <= count + 1:
                    break
            return made
        rough = (self.high - self.low) / max(count, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def number(value: float) -> str:
    """A tick's value: thousands separated, no needless digits."""
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def steps(points: Sequence[tuple[float, float]], x: Axis, y: Axis, until: float) -> str:
    """Path data of a line that holds each value until the next point, the last one until ``until``.

    Where several points fall on one pixel column, only the largest is drawn, so that a long run stays small.
    """
    columns: dict[int, float] = {}
    for at, value in points:
        pixel = int(x.at(at))
        columns[pixel] = max(value, columns.get(pixel, value))
    if not columns:
        return ""
    commands, first = [], True
    for pixel, value in columns.items():
        commands.append(f"M{pixel} {y.at(value):.1f}" if first else f"H{pixel}V{y.at(value):.1f}")
        first = False
    return "".join([*commands, f"H{x.at(until):.0f}"])
