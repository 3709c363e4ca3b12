"""The open-loop Locust user: walks a trace's arrival times, sends each request in a greenlet of its own.

Open loop means that an arrival never waits for an answer, so a slow server meets the same load as a fast
one. One such user is the whole load; Locust's user count plays no part. The results are the lines it writes;
what it reports to Locust's statistics (``TTFT`` and the whole answer, in ms) is a view.
"""

from __future__ import annotations

from locust import User, task  # isort: skip  # first: it patches sockets and threads for gevent

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, TextIO

import gevent
import httpx
from gevent.event import Event
from gevent.pool import Group

from nestedfp.loadtests.client import Exchange, exchange
from nestedfp.loadtests.records import RequestRecord
from nestedfp.loadtests.settings import ReplaySettings
from nestedfp.loadtests.stream import TokenStream
from nestedfp.loadtests.traces import Trace, TraceRequest

_POLL_S = 0.05
_KILL_S = 5.0


@dataclass
class Run:
    """A replay under way: what to send, where results go, and counters for the progress line.

    ``started`` is the moment, on ``time.monotonic``, that the trace's second 0 falls on.
    """

    trace: Trace
    settings: ReplaySettings
    client: httpx.Client
    results: TextIO
    started: float
    counts: Counter[str] = field(default_factory=Counter)
    precision: dict[str, str] = field(default_factory=dict)
    worst_lag_s: float = 0.0
    cut_short: str | None = None
    stopping: Event = field(default_factory=Event)
    finished: Event = field(default_factory=Event)

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet ended."""
        return self.counts["sent"] - self.counts["ok"] - self.counts["failed"]

    def stop(self, reason: str) -> None:
        """Send no more and end what is under way; ``reason`` becomes its error."""
        self.cut_short = self.cut_short or reason
        self.stopping.set()

    def saw_headers(self, seen: Exchange) -> None:
        """Remember the precision each replica answers in, for the progress line."""
        if seen.precision_at_start:
            self.precision[seen.replica or "server"] = seen.precision_at_start

    def write(self, record: RequestRecord) -> None:
        """Keep a record: one line, flushed, so that a killed run leaves what it had."""
        self.counts["ok" if record.ok else "failed"] += 1
        self.results.write(json.dumps(record.to_dict()) + "\n")
        self.results.flush()


class OpenLoopUser(User):
    """Walks ``replay.trace`` once. Set ``replay`` before starting it."""

    replay: ClassVar[Run]

    @task
    def walk(self) -> None:
        """Send every request at its time, then wait for the answers up to the straggler limit."""
        requests = Group()
        try:
            for request in self.replay.trace:
                if self._sleep_until(self.replay.started + request.arrival_s):
                    break
                requests.spawn(self._send, request)
            self._await(requests)
        finally:
            self.replay.finished.set()
        self.replay.stopping.wait()

    def _sleep_until(self, moment: float) -> bool:
        """Sleep until ``moment``; True if the run is being stopped."""
        while (left := moment - time.monotonic()) > 0:
            if self.replay.stopping.wait(left):
                return True
        return bool(self.replay.stopping.is_set())

    def _await(self, requests: Group) -> None:
        limit = self.replay.settings.straggler_s
        deadline = time.monotonic() + limit
        while requests and time.monotonic() < deadline and not self.replay.stopping.wait(_POLL_S):
            pass
        if requests:
            self.replay.cut_short = self.replay.cut_short or f"unfinished {limit:g} s after the last arrival"
            requests.kill(timeout=_KILL_S)

    def _send(self, request: TraceRequest) -> None:
        run = self.replay
        sent = time.monotonic()
        run.counts["sent"] += 1
        run.worst_lag_s = max(run.worst_lag_s, sent - run.started - request.arrival_s)
        seen = Exchange(TokenStream())
        limit = gevent.Timeout(run.settings.request_timeout_s)
        limit.start()
        try:
            exchange(run.client, run.settings, request, seen, run.saw_headers)
        except gevent.Timeout as timeout:
            if timeout is not limit:
                raise
            seen.error = f"unfinished {run.settings.request_timeout_s:g} s after it was sent"
        except gevent.GreenletExit:
            seen.error = run.cut_short or "ended by the client"
        finally:
            limit.close()
            record = _record(request, seen, sent - run.started, time.monotonic() - run.started, run.started)
            run.write(record)
        self._tell_locust(record)

    def _tell_locust(self, record: RequestRecord) -> None:
        failure = None if record.ok else RuntimeError(record.error)
        whole_s = record.ended_s - record.scheduled_s
        for kind, latency_s in (("TTFT", record.ttft_s), ("POST", whole_s)):
            if latency_s is not None:
                self.environment.events.request.fire(
                    request_type=kind,
                    name=self.replay.settings.path,
                    response_time=latency_s * 1e3,
                    response_length=record.output_tokens or 0,
                    exception=failure,
                    context={},
                )


def _record(
    request: TraceRequest, seen: Exchange, sent_s: float, ended_s: float, started: float
) -> RequestRecord:
    stream = seen.stream
    since_start = [moment - started for moment in stream.token_times]
    first_s = since_start[0] - request.arrival_s if since_start else None
    last_s = since_start[-1] - request.arrival_s if since_start else None
    output_tokens = stream.usage_count("completion_tokens")
    tpot_s = None
    if first_s is not None and last_s is not None and output_tokens is not None and output_tokens > 1:
        tpot_s = (last_s - first_s) / (output_tokens - 1)
    return RequestRecord(
        index=request.index,
        scheduled_s=request.arrival_s,
        sent_s=sent_s,
        lag_s=sent_s - request.arrival_s,
        ended_s=ended_s,
        trace_prompt_tokens=request.prompt_tokens,
        max_tokens=request.output_tokens,
        precision_class=request.precision_class,
        ok=seen.error is None,
        status=seen.status,
        error=seen.error,
        prompt_tokens=stream.usage_count("prompt_tokens"),
        output_tokens=output_tokens,
        ttft_s=first_s,
        e2el_s=last_s,
        tpot_s=tpot_s,
        itl_s=[after - before for before, after in pairwise(since_start)],
        precision_at_start=seen.precision_at_start,
        tokens_by_precision=stream.tokens_by_precision,
        replica=seen.replica,
        request_id=stream.request_id,
    )
