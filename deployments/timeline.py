"""Follows the policy actor during a replay and writes what it sees as `timeline.jsonl`.

A line is a replica's state (`sample`) or a mode change with the signal that crossed (`flip`); times are
seconds since the replay's start. `nestedfp.loadtests.records` reads the file.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

from ray.exceptions import RayError

from nestedfp.policies.protocol import FP8, FP16

Status = Callable[[], Mapping[str, Any]]

_INTERVAL_S: Final = 0.25
_SAMPLED: Final = ("mode", "running", "waiting", "tokens_fp16", "tokens_fp8")

logger = logging.getLogger(__name__)


def reports(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The last report of each replica in a policy status."""
    return {replica: entry["report"] for replica, entry in status["replicas"].items()}


def tokens_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    """Tokens executed in each precision from one status to a later one, over the replicas of the later."""
    earlier = reports(before)
    counts = dict.fromkeys((FP16, FP8), 0)
    for replica, report in reports(after).items():
        for mode in counts:
            name = f"tokens_{mode}"
            counts[mode] += (report[name] or 0) - (earlier.get(replica, {}).get(name) or 0)
    return counts


def is_quiet(status: Mapping[str, Any], replicas: int, mode: str = FP16) -> bool:
    """Whether `replicas` report, none of them has a request, and all are in `mode`."""
    seen = reports(status).values()
    return len(seen) >= replicas and all(
        report["mode"] == mode and not report["running"] and not report["waiting"] for report in seen
    )


class Recorder:
    """Writes the timeline from :meth:`start` until it is closed; a context manager.

    `status` returns the policy actor's status. A call of it that fails (the actor restarts) leaves a gap.
    """

    def __init__(self, path: Path, status: Status) -> None:
        self._path = path
        self._status = status
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)
        self._origin_s = 0.0
        self._origin_unix = 0.0
        self._last_flip_at = float("-inf")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def start(self, started_monotonic: float, started_unix: float) -> None:
        """Begin; the arguments are the replay's second 0 on both clocks."""
        self._origin_s, self._origin_unix = started_monotonic, started_unix
        self._last_flip_at = time.time()
        self._thread.start()

    def _run(self) -> None:
        with self._path.open("w") as file:
            while True:
                last = self._done.wait(_INTERVAL_S)
                try:
                    self._write(file, self._status())
                except RayError as error:
                    logger.warning("no policy status: %s", str(error).partition("\n")[0])
                if last:
                    return

    def _write(self, file: IO[str], status: Mapping[str, Any]) -> None:
        now_s = time.monotonic() - self._origin_s
        lines: list[dict[str, Any]] = [
            {"t": now_s, "kind": "sample", "replica": replica, **{name: report[name] for name in _SAMPLED}}
            for replica, report in reports(status).items()
        ]
        for entry in status["log"]:
            if entry["at"] > self._last_flip_at:
                self._last_flip_at = entry["at"]
                facts = {name: value for name, value in entry.items() if name not in ("at", "replica_id")}
                lines.append(
                    {
                        "t": entry["at"] - self._origin_unix,
                        "kind": "flip",
                        "replica": entry["replica_id"],
                        **facts,
                    }
                )
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
