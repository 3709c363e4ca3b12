"""SIGINT and SIGTERM as one exception, raised once, so that a second signal does not disturb the shutdown."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The first SIGINT or SIGTERM."""


class _Delivery:
    """Whether an interrupt may be raised now, and whether one waits to be."""

    held = 0
    waiting = False


def raise_on_signals() -> None:
    """Let the first SIGINT or SIGTERM raise :class:`Interrupted`; later ones do nothing."""
    _Delivery.waiting = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        if _Delivery.held:
            _Delivery.waiting = True
        else:
            raise Interrupted

    for name in _SIGNALS:
        signal.signal(name, stop)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold an interrupt back until the block ends.

    For calls that leave native state half made when an exception cuts them, as Ray's start and stop do. The
    signal handler itself must outlive the block, so nothing is blocked or replaced.
    """
    _Delivery.held += 1
    try:
        yield
    finally:
        _Delivery.held -= 1
    if _Delivery.waiting and not _Delivery.held:
        _Delivery.waiting = False
        raise Interrupted
