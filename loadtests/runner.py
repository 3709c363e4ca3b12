"""The replay's own process: runs the Locust user over a trace, prints progress, writes results.

Only :mod:`nestedfp.loadtests.replay` imports this module, and only in that process.
"""

from __future__ import annotations

from nestedfp.loadtests.user import OpenLoopUser, Run  # isort: skip  # first: Locust patches for gevent

import resource
import signal
import time
from pathlib import Path

import gevent
from locust.env import Environment
from locust.stats import get_stats_summary

from nestedfp.loadtests.client import check_endpoint, new_client
from nestedfp.loadtests.outcome import Outcome
from nestedfp.loadtests.settings import ReplaySettings
from nestedfp.loadtests.traces import Trace

_LEAD_S = 0.2
_HEARTBEAT_S = 0.02


class EndpointError(RuntimeError):
    """The endpoint cannot be load-tested; the message says why and what to do."""


def run(trace: Trace, settings: ReplaySettings, out_path: Path, *, locust_table: bool = False) -> Outcome:
    """Replay the trace once. Writes ``out_path`` line by line and the :class:`Outcome` beside it.

    :class:`EndpointError`, before any request, if the endpoint does not answer or does not serve the model.
    SIGINT and SIGTERM end the run early: requests under way are cut short and recorded as failed.
    """
    _raise_open_files_limit()
    with new_client(settings) as client, out_path.open("w", encoding="utf-8") as results:
        problem = check_endpoint(client, settings)
        if problem:
            raise EndpointError(problem)
        state = Run(trace, settings, client, results, started=time.monotonic() + _LEAD_S)
        Outcome.of(state, time.time() + _LEAD_S).write(out_path)
        OpenLoopUser.replay = state
        environment = Environment(user_classes=[OpenLoopUser], catch_exceptions=False)
        runner = environment.create_local_runner()
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, state.stop, f"the replay was ended by {number.name}")
        delays: list[float] = []
        side = [gevent.spawn(_tell, state), gevent.spawn(_heartbeat, delays)]
        runner.start(1, spawn_rate=1)
        state.finished.wait()
        gevent.killall(side)
        runner.quit()
    print(_progress_line(state), flush=True)
    if locust_table:
        print("\n".join(get_stats_summary(runner.stats)), flush=True)
    outcome = Outcome.of(state, time.time() - (time.monotonic() - state.started), delays)
    outcome.write(out_path)
    return outcome


def _tell(state: Run) -> None:
    while True:
        gevent.sleep(state.settings.progress_s)
        print(_progress_line(state), flush=True)


def _progress_line(state: Run) -> str:
    counts = state.counts
    precision = " ".join(f"{replica[-8:]}={mode}" for replica, mode in sorted(state.precision.items()))
    return (
        f"{max(0.0, time.monotonic() - state.started):6.1f} s  sent {counts['sent']}/{len(state.trace)}"
        f"  ok {counts['ok']}  failed {counts['failed']}  in flight {state.in_flight}"
        f"  worst lag {state.worst_lag_s * 1e3:.0f} ms" + (f"  answering in {precision}" if precision else "")
    )


def _heartbeat(delays: list[float]) -> None:
    """How late this process wakes: the error of every time it takes."""
    while True:
        due = time.monotonic() + _HEARTBEAT_S
        gevent.sleep(_HEARTBEAT_S)
        delays.append(time.monotonic() - due)


def _raise_open_files_limit() -> None:
    # Each request in flight is an open file; the usual soft limit of 1,024 is soon met.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
