"""What the future would be worth: the best schedule found by a search that sees all arrivals, and a bound.

A schedule gives every replica, for every second, one of a table of levels: how freely its engine may use 16
bits, from always to never. All are settings of ``auto``, so a schedule changes no mode and keeps any dwell
time and any bound on flips; a schedule of modes is a special case. :func:`search` maximises the share of
tokens in 16 bits subject to an attainment, on the very engines, requests and draws that the policies met:

1. every level held throughout;
2. two levels, the tighter one in the seconds of the highest load, counted over the arrivals from one second
   back to three seconds ahead, for several shares of such seconds;
3. from the best of these and of the policy's own schedule: coordinate descent over blocks of seconds, all
   replicas together, then single replicas, each moved by one or two levels, kept where the objective rises.

It is a local search, and how far it stays behind the best schedule is mostly unknown: :func:`share_bound`
bounds what any schedule could reach, but on most loads by 1 or little less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.config import PolicyConfig, Slo
from nestedfp.policies.controllers.bounds import bounds_of
from nestedfp.policies.protocol import AUTO, FP8, FP16
from nestedfp.policies.simulation import engine
from nestedfp.policies.simulation.cluster import DRAIN_S, Cluster, Outcome
from nestedfp.policies.simulation.state import BOUNDS, EngineSettings, Floats, Requests, Workload
from nestedfp.policies.simulation.summary import attained
from nestedfp.policies.steps import StepBounds

TPOT_S: Final = Slo().tpot_s
TTFT_S: Final = Slo().ttft_s
LEAST_TOKENS: Final = 256.0


def _level(
    pace: float, first_token: float, give_up: float = math.inf, least_tokens: float = LEAST_TOKENS
) -> StepBounds:
    """One pace for all batches; with ``give_up`` they are taken to be light ones, whose pace is 1."""
    heavy_from_s = 0.0 if math.isinf(give_up) else math.inf
    return StepBounds(
        pace_s=pace * TPOT_S,
        tpot_s=TPOT_S,
        ttft_s=first_token * TTFT_S,
        late_s=TTFT_S,
        least_tokens=least_tokens,
        light_ttft_s=first_token * TTFT_S,
        given_up_s=give_up * TTFT_S,
        light_s=heavy_from_s,
        heavy_s=heavy_from_s,
    )


_SHARES: Final = (
    (1.0, 0.95, 1.0),
    (1.0, 0.8, 1.2),
    (1.0, 0.95),
    (1.0, 0.8),
    (0.9, 0.8),
    (0.8, 0.8),
    (0.8, 0.6),
    (0.8, 0.4),
    (0.6, 0.4),
    (0.6, 0.2),
    (0.4, 0.1),
)
LEVELS: Final = (
    StepBounds(*[math.inf] * len(BOUNDS)),
    _level(1.0, math.inf, least_tokens=0.0),
    *(_level(*share) for share in _SHARES[:4]),
    bounds_of(PolicyConfig()),
    *(_level(*share) for share in _SHARES[4:]),
    _level(0.0, 0.0)._replace(late_s=math.inf),
    _level(0.0, 0.0, least_tokens=math.inf)._replace(tpot_s=1e9, late_s=math.inf),
)
"""Bounds of ``auto``, from 16 bits always to FP8 always: first and last are the static policies, beside them
stand 16 bits and FP8 in steps cut to the SLO (16 bits wherever the weights can be read in time). The policy's
own bounds are one, and the first two of the shares give up prompts as it does, sooner."""
POLICY: Final = LEVELS.index(bounds_of(PolicyConfig()))
"""The bounds that the policy sends."""
CUT_FP8: Final = len(LEVELS) - 2
_PENALTY: Final = 50.0
Schedule = NDArray[np.int8]
"""[seconds, replicas] places in a table of levels."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best schedule: what it reaches, and how many were tried."""

    schedule: Schedule
    share: float
    attainment: float
    tried: int


def replay(
    workload: Workload,
    schedule: Schedule,
    *,
    seed: int,
    settings: EngineSettings,
    slo: Slo,
    noise_seed: int | None = None,
) -> Requests:
    """The requests after ``workload`` was served under ``schedule``; its last second holds to the end.

    ``seed`` draws the router's candidates and, unless ``noise_seed`` is given, the noise of step times.
    """
    cluster = Cluster(workload, schedule.shape[1], settings, seed, slo)
    if noise_seed is not None:
        engine.seed(noise_seed)
    for replica_id in cluster.ids:
        cluster.order(replica_id, AUTO, None)
    limits = np.array(LEVELS)
    end_s = float(cluster.requests["arrival_s"][-1]) + DRAIN_S
    second = 0
    while cluster.busy and cluster.now < end_s:
        places = schedule[min(second, len(schedule) - 1)]
        for column, name in enumerate(BOUNDS):
            cluster.engines.replicas[name] = limits[places, column]
        second += 1
        cluster.tick(float(second))
    return cluster.requests


def figures(requests: Requests, slo: Slo) -> tuple[float, float]:
    """Share of executed tokens in 16 bits, and attainment."""
    fp16, fp8 = int(requests["fp16"].sum()), int(requests["fp8"].sum())
    return fp16 / max(fp16 + fp8, 1), float(attained(requests, slo).mean())


def schedule_of(outcome: Outcome) -> Schedule:
    """A policy's run as a schedule: the level of the mode that was ordered in each second."""
    modes = np.array(outcome.timeline.modes)
    bounded = np.isfinite(outcome.timeline.pace_s)
    places = np.where(bounded, np.where(modes == 0, 1, POLICY), 0)
    result: Schedule = np.where(modes == 1, CUT_FP8, places).astype(np.int8)
    return result


class _Search:
    def __init__(
        self, workload: Workload, target: float, seed: int, settings: EngineSettings, slo: Slo
    ) -> None:
        self._workload = workload
        self._target = target
        self._seed = seed
        self._settings = settings
        self._slo = slo
        self.tried = 0
        self.best: tuple[float, float, float, Schedule] | None = None
        self.met: tuple[float, float, Schedule] | None = None

    def value(self, schedule: Schedule) -> float:
        """Try a schedule; remembers the best one, and the best that keeps the attainment."""
        requests = replay(
            self._workload,
            schedule,
            seed=self._seed,
            settings=self._settings,
            slo=self._slo,
        )
        share, attainment = figures(requests, self._slo)
        self.tried += 1
        objective = share - _PENALTY * max(0.0, self._target - attainment)
        if self.best is None or objective > self.best[0]:
            self.best = (objective, share, attainment, schedule)
        if attainment >= self._target - 1e-12 and (self.met is None or share > self.met[0]):
            self.met = (share, attainment, schedule)
        return objective


def search(
    workload: Workload,
    attainment: float,
    *,
    replicas: int,
    seed: int,
    settings: EngineSettings,
    slo: Slo,
    starts: tuple[Schedule, ...] = (),
    tries: int = 400,
) -> Found:
    """The schedule with the highest share of tokens in 16 bits found at ``attainment`` or more.

    ``starts`` are schedules to begin with beside the search's own; ``tries`` bounds the simulations. Where
    no schedule tried reaches the attainment, the one that comes nearest is returned.
    """
    seconds = max(1, math.ceil(float(workload.arrival_s[-1])) + 2)
    run = _Search(workload, attainment, seed, settings, slo)
    shape = (seconds, replicas)
    values = [run.value(np.full(shape, level, dtype=np.int8)) for level in range(len(LEVELS))]
    for start in starts:
        padded = np.pad(start, ((0, max(0, seconds - len(start))), (0, 0)), mode="edge")[:seconds]
        run.value(padded.astype(np.int8))
    base, last = int(np.argmax(values)), len(LEVELS) - 1
    load = load_ahead(workload, seconds)
    for share in (0.03, 0.1, 0.2, 0.35, 0.5):
        peak = load >= np.quantile(load, 1.0 - share)
        for calm in {0, max(0, base - 2), max(0, base - 1)}:
            for tight in {min(base + 1, last), min(base + 3, last), last}:
                schedule = np.where(peak[:, None], tight, calm) * np.ones(shape)
                run.value(schedule.astype(np.int8))
    random = np.random.default_rng(seed)
    for block, one_replica in _blocks(seconds, replicas, random):
        if run.tried >= tries:
            break
        _move(run, block, one_replica, tries)
    assert run.best is not None
    if run.met is not None:
        return Found(run.met[2], run.met[0], run.met[1], run.tried)
    return Found(run.best[3], run.best[1], run.best[2], run.tried)


def _move(run: _Search, block: slice, replica: slice, tries: int) -> None:
    """Move one block by a level or two, as long as that helps."""
    for step in (-1, 1, -2, 2):
        while run.tried < tries:
            assert run.best is not None
            before, schedule = run.best[0], run.best[3].copy()
            part = schedule[block, replica]
            moved = np.clip(part + step, 0, len(LEVELS) - 1)
            if (moved == part).all():
                break
            schedule[block, replica] = moved
            if run.value(schedule) <= before:
                break


def _blocks(seconds: int, replicas: int, random: np.random.Generator) -> Iterator[tuple[slice, slice]]:
    """Blocks of 10, 5 and 2 seconds of all replicas, then of 5 seconds of one, each round in random order."""
    while True:
        for length in (10, 5, 2):
            for start in random.permutation(range(0, seconds, length)).tolist():
                yield slice(start, start + length), slice(None)
        for start in random.permutation(range(0, seconds, 5)).tolist():
            replica = int(random.integers(replicas))
            yield slice(start, start + 5), slice(replica, replica + 1)


def load_ahead(workload: Workload, seconds: int) -> Floats:
    """Tokens that arrive from one second before each second to three seconds after its start."""
    tokens = np.asarray(workload.prompt_tokens, dtype=np.float64) + workload.output_tokens
    by_second, _ = np.histogram(workload.arrival_s, bins=np.arange(seconds + 1), weights=tokens)
    padded = np.concatenate([[0.0], by_second, np.zeros(2)])
    load: Floats = sum((padded[k : k + seconds] for k in range(1, 4)), start=padded[:seconds])
    return load


def share_bound(
    workload: Workload, attainment: float, *, replicas: int, settings: EngineSettings, slo: Slo
) -> float:
    """An upper bound on the share of tokens in 16 bits of any schedule that reaches ``attainment``.

    The relaxed problem: replicas share all work freely, steps have no fixed cost and batches no limit, and
    the requests allowed to miss are those with the most tokens. A request that is met and whose deadline
    (arrival, TTFT limit, one TPOT limit a token) lies within a window has all its work done in that window;
    what that takes in 16 bits beyond the window's replica-seconds is tokens in FP8. Windows do not overlap;
    the best of several lengths counts.
    """
    slow, fast = settings.model.of(FP16), settings.model.of(FP8)
    arrival = np.asarray(workload.arrival_s, dtype=np.float64)
    prompt = np.asarray(workload.prompt_tokens, dtype=np.float64)
    output = np.asarray(workload.output_tokens, dtype=np.float64)
    tokens = prompt + output - 1.0
    read = output * slow.sequence_s + output * (prompt + 0.5 * output) * slow.context_token_s
    work = read + 0.5 * prompt * prompt * slow.pair_s
    deadline = arrival + slo.ttft_s + slo.tpot_s * output
    saved_s = slow.token_s - fast.token_s
    missed = int((1.0 - attainment) * len(arrival) + 1e-9)
    spare_s = float(np.sort(tokens * slow.token_s + work)[::-1][:missed].sum())
    forced = 0.0
    for length in (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, float(deadline.max()) + 1.0):
        window = (arrival // length).astype(np.int64)
        inside = deadline <= (window + 1) * length
        needed_s = np.bincount(window[inside], weights=(tokens * slow.token_s + work)[inside])
        beyond_s = np.maximum(0.0, needed_s - replicas * length).sum() - spare_s
        forced = max(forced, beyond_s / saved_s)
    return float(max(0.0, 1.0 - forced / tokens.sum()))
