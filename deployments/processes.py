"""Ends what was started, whatever became of its parents.

Ray and vLLM start trees of processes. When one in the middle is killed, at an interrupt during start-up say,
those below it are handed to init and go on. As a subreaper this process is handed them instead.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psutil

_PR_SET_CHILD_SUBREAPER: Final = 36
_GRACE_S: Final = 10.0
_KILL_S: Final = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def none_left_behind(grace_s: float = _GRACE_S) -> Iterator[None]:
    """When the block ends, so has every process started in it: by itself within `grace_s` seconds, or killed.

    Orphans are found on Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(_descendants())
    try:
        yield
    finally:
        _end([process for process in _descendants() if process not in before], grace_s)


def is_running(name: str) -> bool:
    """Whether a process of this name, started by this one or below it, has not ended."""
    return any(_is_running(process, name) for process in _descendants())


def _is_running(process: psutil.Process, name: str) -> bool:
    try:
        return bool(process.name() == name and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _descendants() -> list[psutil.Process]:
    """All of them but this process's own multiprocessing tracker, which lives as long as it does."""
    me = psutil.Process()
    return [process for process in me.children(recursive=True) if not _is_own_tracker(process, me.pid)]


def _is_own_tracker(process: psutil.Process, parent: int) -> bool:
    try:
        return process.ppid() == parent and any("resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _end(processes: list[psutil.Process], grace_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        logger.info("killing %d, which outlived the application", process.pid)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=_KILL_S)
