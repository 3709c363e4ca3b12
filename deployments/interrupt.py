"""SIGINT and SIGTERM as one exception, raised once, so that a second signal does not disturb the shutdown."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The first SIGINT or SIGTERM."""


def raise_on_signals() -> None:
    """Let the first SIGINT or SIGTERM raise :class:`Interrupted`; later ones do nothing."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise Interrupted

    for name in _SIGNALS:
        signal.signal(name, stop)
