"""What a replay as a whole came to: written beside its results as ``<results>.replay.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nestedfp.loadtests.user import Run


@dataclass(frozen=True)
class Outcome:
    """Counts, start and conditions of a replay.

    ``started_unix`` and ``started_monotonic`` are the replay's second 0 on the wall clock and, on this host,
    on ``time.monotonic``. ``cut_short`` says why it did not run to its end. ``client_delay_ms`` tells how
    late the client's own process woke from short sleeps: times below that are not to be trusted.
    """

    trace: dict[str, Any]
    url: str
    model: str
    endpoint: str
    settings: dict[str, Any]
    started_unix: float
    started_monotonic: float
    finished: bool
    cut_short: str | None
    sent: int
    ok: int
    failed: int
    unsent: int
    worst_lag_ms: float
    client_delay_ms: dict[str, float] | None

    @classmethod
    def of(cls, state: Run, started_unix: float, delays_s: Sequence[float] = ()) -> Outcome:
        """The outcome so far."""
        settings = state.settings
        counts = state.counts
        delay_ms = None
        if delays_s:
            p50, p99, most = np.percentile(np.asarray(delays_s) * 1e3, [50, 99, 100])
            delay_ms = {"p50": float(p50), "p99": float(p99), "max": float(most)}
        return cls(
            trace=state.trace.describe(),
            url=settings.base_url,
            model=settings.model,
            endpoint=settings.endpoint,
            settings=settings.to_dict(),
            started_unix=started_unix,
            started_monotonic=state.started,
            finished=state.finished.is_set(),
            cut_short=state.cut_short,
            sent=counts["sent"],
            ok=counts["ok"],
            failed=counts["failed"],
            unsent=len(state.trace) - counts["sent"],
            worst_lag_ms=state.worst_lag_s * 1e3,
            client_delay_ms=delay_ms,
        )

    @staticmethod
    def path_beside(results: Path) -> Path:
        """Where the outcome of the replay that writes ``results`` lies."""
        return results.with_suffix(".replay.json")

    def write(self, results: Path) -> None:
        """Write beside ``results``; a reader sees the old file or the new one, never a part."""
        path = self.path_beside(results)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, results: Path) -> Outcome:
        """The outcome beside ``results``; OSError if there is none."""
        return cls(**json.loads(cls.path_beside(results).read_text(encoding="utf-8")))
