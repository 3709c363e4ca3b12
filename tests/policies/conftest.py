"""Facts to decide on, and a clock the test moves; the helpers beside the tests are importable."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.snapshot import ReplicaView

sys.path.insert(0, str(Path(__file__).parent))

IDLE: dict[str, Any] = {
    "running": 0,
    "waiting": 0,
    "waiting_prompt_tokens": 0,
    "oldest_waiting_s": 0.0,
    "kv_usage": 0.0,
    "arrivals_per_s": 0.0,
    "ttft_p90_s": None,
    "tpot_p90_s": None,
    "step_time_s": None,
    "tokens_fp16": 0,
    "tokens_fp8": 0,
    "flips": 0,
    "age_s": 0.0,
}


class FakeClock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def idle() -> dict[str, Any]:
    """The signals of a replica with nothing to do."""
    return dict(IDLE)


@pytest.fixture
def report() -> Callable[..., ReplicaReport]:
    """Makes a report of an idle replica, with the given fields changed."""

    def make(replica_id: str = "a", **changes: Any) -> ReplicaReport:
        identity = {"replica_id": replica_id, "boot_id": "boot", "sequence": 1, "mode": "fp16", "epoch": 0}
        return ReplicaReport(**{**identity, **IDLE, **changes})

    return make


@pytest.fixture
def view(report: Callable[..., ReplicaReport]) -> Callable[..., ReplicaView]:
    """Makes a view of an idle replica whose signals are fresh, with the given fields changed."""

    def make(replica_id: str = "a", *, stale_s: float = 0.0, **changes: Any) -> ReplicaView:
        return ReplicaView(report(replica_id, **changes), stale_s)

    return make


@pytest.fixture
def least_cpu_s() -> Callable[..., float]:
    """Seconds of CPU that the fastest of 100 calls of `action(step)` took.

    Without garbage collection, whose cost here is that of the other tests' objects, not of the call.
    """

    def measure(action: Callable[[int], object]) -> float:
        durations = []
        gc.collect()
        gc.disable()
        try:
            for step in range(100):
                started = time.process_time()
                action(step)
                durations.append(time.process_time() - started)
        finally:
            gc.enable()
        return min(durations)

    return measure
