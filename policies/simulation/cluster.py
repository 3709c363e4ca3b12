"""Simulated replicas under the real policy: run the engines to the next decision, report, decide, order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig, Slo
from nestedfp.policies.policy import Assignment, Policy, PolicyState
from nestedfp.policies.protocol import ReplicaReport
from nestedfp.policies.simulation import engine, recent
from nestedfp.policies.simulation.scaling import Scaler
from nestedfp.policies.simulation.state import (
    BOUNDS,
    MODES,
    Engines,
    EngineSettings,
    Floats,
    Ints,
    Requests,
    Workload,
    costs_of,
    engines_of,
    requests_of,
)
from nestedfp.policies.snapshot import ReplicaView, Snapshot

PERCENTILE_WINDOW_S: Final = 10.0
ARRIVAL_WINDOW_S: Final = 5.0
DRAIN_S: Final = 600.0
"""Longest time after the last arrival until the simulation gives up on what is unfinished."""
_NUMBER: Final = {mode: number for number, mode in enumerate(MODES)}


@dataclass(slots=True)
class Timeline:
    """One sample a second of the whole cluster."""

    t_s: list[float] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    modes: list[list[int]] = field(default_factory=list)
    """Mode number of each replica."""
    pace_s: list[list[float]] = field(default_factory=list)
    """Pace of ``auto`` that each replica was ordered; infinite without one."""
    fp16: list[int] = field(default_factory=list)
    fp8: list[int] = field(default_factory=list)
    """Tokens executed so far."""


@dataclass(slots=True)
class Outcome:
    """What came of a simulation."""

    requests: Requests
    engines: Engines
    flips: list[dict[str, Any]]
    """Mode changes as the actor logs them; ``at`` is simulated seconds."""
    timeline: Timeline
    duration_s: float
    replica_seconds: float
    """Of all replicas that existed, those starting and those finishing included, up to the last arrival."""
    decisions: int


class Cluster:
    """``replicas`` engines serving one workload; :meth:`tick` runs them to the next decision."""

    def __init__(
        self, workload: Workload, replicas: int, settings: EngineSettings, seed: int, slo: Slo
    ) -> None:
        checks.integer("replicas", replicas, minimum=1)
        checks.integer("seed", seed)
        engine.seed(seed)
        self.requests = requests_of(workload)
        self.engines = engines_of(replicas, settings.max_sequences, seed)
        self.now = 0.0
        self._costs = costs_of(settings)
        self._following = 0
        self._ids = [f"replica-{number}" for number in range(replicas)]
        self._numbers = {replica_id: number for number, replica_id in enumerate(self._ids)}
        self._ttft = np.empty(replicas)
        self._tpot = np.empty(replicas)
        self._missed = np.empty(replicas)
        self._slo = slo
        self._arrived: deque[tuple[float, Ints, Ints]] = deque()
        self._sequence = 0
        self._ready_s = np.zeros(replicas)
        """When a replica that was ordered serves; infinite where none is ordered."""

    @property
    def ids(self) -> list[str]:
        return self._ids

    @property
    def busy(self) -> bool:
        """Whether anything is still to come or in progress."""
        return self._following < len(self.requests) or bool(
            np.isfinite(self.engines.replicas["step_end_s"]).any()
        )

    def tick(self, until_s: float) -> None:
        """Run every event up to ``until_s``."""
        self._following = engine.advance(until_s, self._following, self.requests, self.engines, self._costs)
        self.now = until_s

    def views(self) -> tuple[ReplicaView, ...]:
        """What each active replica would report now."""
        self._sequence += 1
        replicas = self.engines.replicas
        recent.percentiles(self.now, PERCENTILE_WINDOW_S, 0.9, self.engines, self._ttft, self._tpot)
        slo = self._slo
        recent.miss_shares(self.now, PERCENTILE_WINDOW_S, slo.ttft_s, slo.tpot_s, self.engines, self._missed)
        span_s, arrivals, tokens = self._arrivals()
        columns = zip(
            self._ids,
            replicas["active"].tolist(),
            replicas["mode"].tolist(),
            replicas["running"].tolist(),
            replicas["waiting"].tolist(),
            replicas["waiting_tokens"].tolist(),
            self._oldest_waiting().tolist(),
            (replicas["kv"] / self._costs.kv_tokens).tolist(),
            (arrivals / span_s).tolist(),
            (tokens / span_s).tolist(),
            self._ttft.tolist(),
            self._tpot.tolist(),
            self._missed.tolist(),
            replicas["step_s"].tolist(),
            replicas["tokens"].tolist(),
            replicas["kv"].tolist(),
            replicas["fp16"].tolist(),
            replicas["fp8"].tolist(),
            replicas["flips"].tolist(),
            replicas["strict_running"].tolist(),
            replicas["strict_waiting"].tolist(),
            strict=True,
        )
        return tuple(ReplicaView(self._report(*row), 0.0) for row in columns if row[1])

    @property
    def ordered(self) -> int:
        """Replicas that serve or start."""
        return int(np.isfinite(self._ready_s).sum())

    @property
    def paid(self) -> int:
        """Replicas that exist: those ordered, and those that finish what they took before they left."""
        return int((np.isfinite(self._ready_s) | np.isfinite(self.engines.replicas["step_end_s"])).sum())

    def scale(self, wanted: int, startup_s: float) -> None:
        """Order replicas, ready after ``startup_s``, or send the last ones away once they have finished."""
        ordered = np.isfinite(self._ready_s)
        for number in np.flatnonzero(~ordered)[: max(0, wanted - int(ordered.sum()))]:
            self._ready_s[number] = self.now + startup_s
            self.engines.replicas["mode"][number] = 0
        for number in np.flatnonzero(ordered)[::-1][: max(0, int(ordered.sum()) - wanted)]:
            self._ready_s[number] = np.inf

    def open(self) -> None:
        """Let the replicas that are ready take requests, and no others."""
        self.engines.replicas["active"] = self._ready_s <= self.now

    def order(self, replica_id: str, mode: str, limits: Any) -> None:
        """Set the mode of one replica and its limits; one that is not given is lifted."""
        if mode not in _NUMBER:
            raise InvalidField("mode", mode, f"the simulator serves {', '.join(MODES)}")
        number = self._numbers[replica_id]
        self.engines.replicas["mode"][number] = _NUMBER[mode]
        given = limits or {}
        for name in BOUNDS:
            self.engines.replicas[name][number] = given.get(name, np.inf)
        self.engines.replicas["shed_above"][number] = given.get("waiting_prompt_tokens", np.inf)

    def _report(
        self,
        replica_id: str,
        active: bool,
        mode: int,
        running: int,
        waiting: int,
        waiting_tokens: int,
        oldest_s: float,
        kv_usage: float,
        arrivals_per_s: float,
        prompt_per_s: float,
        ttft_s: float,
        tpot_s: float,
        missed: float,
        step_s: float,
        batch_tokens: int,
        context: int,
        fp16: int,
        fp8: int,
        flips: int,
        strict_running: int,
        strict_waiting: int,
    ) -> ReplicaReport:
        return ReplicaReport(
            replica_id=replica_id,
            boot_id="simulated",
            sequence=self._sequence,
            mode=MODES[mode],
            epoch=1,
            running=running,
            waiting=waiting,
            waiting_prompt_tokens=waiting_tokens,
            oldest_waiting_s=oldest_s,
            kv_usage=kv_usage,
            arrivals_per_s=arrivals_per_s,
            ttft_p90_s=None if ttft_s != ttft_s else ttft_s,
            tpot_p90_s=None if tpot_s != tpot_s else tpot_s,
            step_time_s=step_s or None,
            tokens_fp16=fp16,
            tokens_fp8=fp8,
            flips=flips,
            age_s=0.0,
            slo_miss_share=None if missed != missed else missed,
            strict_running=strict_running,
            strict_waiting=strict_waiting,
            context_tokens=context,
            batch_tokens=batch_tokens,
            arriving_prompt_tokens_per_s=prompt_per_s,
        )

    def _column(self, name: str) -> Ints:
        return self.engines.replicas[name].copy()

    def _oldest_waiting(self) -> Floats:
        heads = self.engines.replicas["head"]
        since = self.requests["arrival_s"][np.maximum(heads, 0)]
        return np.where(heads >= 0, np.maximum(0.0, self.now - since), 0.0)

    def _arrivals(self) -> tuple[float, Ints, Ints]:
        """Length of the arrival window, and requests and prompt tokens that arrived within it."""
        arrivals, tokens = self._column("arrivals"), self._column("arrived_tokens")
        self._arrived.append((self.now, arrivals, tokens))
        while len(self._arrived) > 2 and self._arrived[1][0] <= self.now - ARRIVAL_WINDOW_S:
            self._arrived.popleft()
        since_s, before, tokens_before = self._arrived[0]
        return max(self.now - since_s, 1e-9), arrivals - before, tokens - tokens_before


def simulate(
    workload: Workload,
    policy: Policy,
    *,
    replicas: int,
    seed: int,
    settings: EngineSettings | None = None,
    scaler: Scaler | None = None,
    startup_s: float = 0.0,
) -> Outcome:
    """Serve ``workload`` on ``replicas`` simulated engines under ``policy``.

    The policy decides every ``decide_interval_s`` on fresh reports and its targets hold from the next step
    on. With a ``scaler`` the number of replicas is its own from the start on; one that it adds takes requests
    ``startup_s`` later, one that it removes finishes what it has. The same arguments give the same outcome.
    """
    most = max(replicas, scaler.max_replicas) if scaler else replicas
    cluster = Cluster(workload, most, settings or EngineSettings(), seed, policy.config.slo)
    cluster.scale(replicas, 0.0)
    cluster.open()
    scaled_s = 0.0
    replica_seconds = 0.0
    config: PolicyConfig = policy.config
    state: PolicyState = policy.start()
    targets: dict[str, Assignment] = {}
    timeline = Timeline()
    flips: list[dict[str, Any]] = []
    limits: dict[str, Any] = {}
    last_arrival_s = float(cluster.requests["arrival_s"][-1])
    decisions = 0
    arrived = 0
    while cluster.busy and cluster.now < last_arrival_s + DRAIN_S:
        views = cluster.views()
        if scaler is not None:
            if cluster.now >= scaled_s:
                fixed = {key for key, target in targets.items() if target.fixed}
                cluster.scale(scaler.replicas(views, cluster.ordered, cluster.now, fixed), startup_s)
                scaled_s += scaler.interval_s
            cluster.open()
        targets, state = policy.decide(Snapshot(views), state, cluster.now)
        decisions += 1
        for replica_id, target in targets.items():
            if target.changed:
                flips.append(
                    {
                        "at": cluster.now,
                        "replica_id": replica_id,
                        "from": target.previous,
                        "to": target.mode,
                        "reason": target.reason,
                        "signal": target.signal,
                        "value": target.value,
                        "threshold": target.threshold,
                    }
                )
            if target.changed or target.limits is not limits.get(replica_id):
                cluster.order(replica_id, target.mode, target.limits)
                limits[replica_id] = target.limits
        if not timeline.t_s or cluster.now - timeline.t_s[-1] >= 1.0 - 1e-6:
            arrived = _sample(timeline, cluster, arrived)
        if cluster.now < last_arrival_s:
            replica_seconds += cluster.paid * min(config.decide_interval_s, last_arrival_s - cluster.now)
        cluster.tick(decisions * config.decide_interval_s)
    finishes = cluster.requests["finish_s"]
    finished = finishes[np.isfinite(finishes)]
    duration_s = float(max(last_arrival_s, finished.max(initial=0.0)))
    return Outcome(
        requests=cluster.requests,
        engines=cluster.engines,
        flips=flips,
        timeline=timeline,
        duration_s=duration_s,
        replica_seconds=replica_seconds,
        decisions=decisions,
    )


def _sample(timeline: Timeline, cluster: Cluster, arrived_before: int) -> int:
    """Add one sample; returns the number of requests that have arrived so far."""
    replicas = cluster.engines.replicas
    arrived = int(replicas["arrivals"].sum())
    timeline.t_s.append(cluster.now)
    timeline.arrivals.append(arrived - arrived_before)
    timeline.waiting.append(int(replicas["waiting"].sum()))
    timeline.running.append(int(replicas["running"].sum()))
    timeline.active.append(int(replicas["active"].sum()))
    timeline.modes.append(replicas["mode"].tolist())
    timeline.pace_s.append(replicas["pace_s"].tolist())
    timeline.fp16.append(int(replicas["fp16"].sum()))
    timeline.fp8.append(int(replicas["fp8"].sum()))
    return arrived
