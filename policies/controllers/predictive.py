"""SLO-predictive control: what would TTFT and TPOT be in 16 bits, and is there still room?

For every replica and mode the latency model predicts, from the queue and the recent load, the TTFT of the
request that waits longest from now on and the TPOT of the requests being served. The larger of the two over
its SLO limit is the *pressure* of that mode. A burst shows in the queue within one report. Its inflow over
the last second, where it exceeds what 16 bits can prefill, is projected ``horizon_s`` ahead, so that relief
comes before the queue is too long to recover.

The ladder has a rung for each mode, 16 bits first and FP8 last; a replica goes down to the first rung whose
pressure is below its high level, and up again to the first whose pressure has stayed at or below its low
level for long enough, seen at least once in ``max_signal_age_s``, whichever mode is in force: returning does
not need to be tried out.

- With ``between: auto`` the middle rung leaves the choice of single steps to the engine. As it costs next to
  no FP8 while the load is light, it is taken early and given up late. FP8 is ordered of all replicas, where
  together they have had more load than FP8 serves for long enough.
- With a named plan the middle rung is that plan, under the same levels as 16 bits.
- Without one there are only 16 bits and FP8.

In the last two the levels carry a factor learned from the outcome: it falls while requests miss the SLO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.base import KEPT, Controller, Memory, Wish, kept_for_strict
from nestedfp.policies.controllers.facts import (
    FIRST_OUTPUT_TOKENS,
    Facts,
    Floats,
    Seen,
    columns_of,
    gather,
    mean_output,
    see,
)
from nestedfp.policies.controllers.load import engine_load, missed
from nestedfp.policies.latency import LatencyModel, StepCosts, TokenLoad
from nestedfp.policies.protocol import AUTO, FP8, FP16
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.snapshot import ReplicaView, Snapshot

SHORTEST_OUTPUT: Final = 4.0
UNKNOWN_MISSES: Final = 0.5
"""Share of requests missed, over the tolerance, before any is known."""
LIGHT: Final = (0.4, 0.3)
"""16-bit pressure from which ``auto`` takes over, and up to which it gives way."""
FP8_OVERLOAD: Final = 1.0
"""Mean FP8 load of all replicas from which there is nothing left to choose. One replica alone is beyond it by
chance, and for as long as its queue takes to drain."""
FULL_OVERLOAD: Final = 1.5
"""Load from which every second of overload counts in full, in between in part. Beyond, most of it is a queue,
which says how long it will last rather than how much there is to do."""
OVERLOAD_S: Final = 12.0
"""Seconds of overload from which FP8 is ordered outright: bursts pass within ``auto``."""
RECOVERY: Final = 2.0
"""How many of them a second without overload takes back: an overload has its gaps, bursts have pauses."""
EASED_S: Final = 1.0
"""How long there must be no overload before ``auto`` takes over again."""
SAME_BOUND: Final = 0.1
"""Part of a queue's bound by which another must differ to be ordered: each order is a call of the engine."""
_MAX_REASON_PRESSURE: Final = 99.0


@dataclass(frozen=True, slots=True)
class _Memory:
    seen: Seen | None
    calm_since: Mapping[str, tuple[str, float]]
    """The rung above that a replica could take, and since when."""
    overload_s: float
    """Seconds of overload that count, while ``auto`` is in force anywhere."""
    queue_bounds: Mapping[str, float]
    """Prompt tokens, of each replica that sheds."""
    model: LatencyModel
    missed: float
    """Share of requests that missed the SLO, over the tolerance."""
    output_tokens: float
    turn: int
    """Counts decisions; chooses whose step corrects the model."""


class _Forecast(NamedTuple):
    """Predicted times of one mode, one row a replica, in seconds."""

    ttft_s: Floats
    tpot_s: Floats


class _Rung(NamedTuple):
    """One mode of the ladder: its pressure on every replica, and the levels to leave it and to return."""

    mode: str
    pressure: Floats
    high: float
    low: float
    calm_s: float
    """How long the pressure must be at ``low`` before a replica returns."""


class PredictiveController(Controller):
    """Predictive control with a burst projection and a latency model corrected online."""

    def __init__(self, config: PolicyConfig) -> None:
        self._slo = config.slo
        self._settings = config.prediction
        self._calm_s = config.calm_s
        self._longest_gap_s = config.max_signal_age_s
        self._model = config.latency or latency_model()

    def start(self) -> Memory:
        return _Memory(None, {}, 0.0, {}, self._model, UNKNOWN_MISSES, FIRST_OUTPUT_TOKENS, 0)

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        before = cast(_Memory, memory)
        views = snapshot.replicas
        if not views:
            return {}, before
        ids = [view.report.replica_id for view in views]
        ordered = [modes[replica_id] for replica_id in ids]
        columns = columns_of(views)
        seen = see(ids, columns, before.seen, now)
        model = _learn(before.model, views, seen, before.turn)
        facts = gather(columns, ordered, seen, model)
        elapsed_s = now - before.seen.at_s if before.seen is not None else 0.0
        state = replace(
            before,
            seen=seen,
            calm_since=before.calm_since if elapsed_s <= self._longest_gap_s else {},
            model=model,
            missed=missed(before.missed, _missed(views), self._settings.tolerance, elapsed_s),
            output_tokens=mean_output(before.output_tokens, facts, elapsed_s),
            turn=before.turn + 1,
        )
        fast_load = float(engine_load(facts, model.of(FP8), state.output_tokens).mean())
        overload_s = _overload_s(before.overload_s, fast_load, elapsed_s) if AUTO in ordered else 0.0
        return self._climb(views, ids, ordered, facts, fast_load, replace(state, overload_s=overload_s), now)

    def _climb(
        self,
        views: tuple[ReplicaView, ...],
        ids: list[str],
        modes: list[str],
        facts: Facts,
        fast_load: float,
        memory: _Memory,
        now: float,
    ) -> tuple[dict[str, Wish], Memory]:
        """Every replica's place on the ladder."""
        slow = self._forecast(memory.model.of(FP16), facts)
        fast_pressure = self._pressure(self._forecast(memory.model.of(FP8), facts))
        rungs = self._rungs(slow, fast_load, facts, memory)
        places = {rung.mode: place for place, rung in enumerate(rungs)}
        kept = kept_for_strict(views, modes)
        needed = _first_rung([rung.pressure < rung.high for rung in rungs])
        able = _first_rung([rung.pressure <= rung.low for rung in rungs])
        wishes: dict[str, Wish] = {}
        calm_since: dict[str, tuple[str, float]] = {}
        queue_bounds: dict[str, float] = {}
        for row, (replica_id, mode) in enumerate(zip(ids, modes, strict=True)):
            if mode == FP16 and replica_id in kept:
                wishes[replica_id] = KEPT
                continue
            place = places.get(mode, 0)
            goal, best = (0, 0) if replica_id in kept else (needed[row], able[row])
            if mode != FP8 and goal <= place <= best:
                continue
            wish: Wish | None = None
            if goal > place:
                wish = self._relief(rungs, place, goal, slow, row)
            elif best < place:
                rung = rungs[best]
                last = memory.calm_since.get(replica_id, ("", now))
                since = last[1] if last[0] == rung.mode else now
                calm_since[replica_id] = (rung.mode, since)
                if now - since >= rung.calm_s:
                    wish = self._return(rung, slow, row, now - since)
            if wish is None and mode == FP8 and self._settings.shed:
                pressure = float(fast_pressure[row])
                before = memory.queue_bounds.get(replica_id)
                if pressure >= (1.0 if before is None else self._settings.high):
                    bound = self._queue_bound(memory.model, facts, row)
                    if before is not None and abs(bound - before) <= SAME_BOUND * before:
                        bound = before
                    queue_bounds[replica_id] = bound
                    wish = _shed(bound, pressure)
            if wish is not None:
                wishes[replica_id] = wish
        return wishes, replace(memory, calm_since=calm_since, queue_bounds=queue_bounds)

    def _rungs(self, slow: _Forecast, fast_load: float, facts: Facts, memory: _Memory) -> list[_Rung]:
        """The ladder with today's pressures; FP8, the last resort, has none."""
        settings = self._settings
        slow_pressure = self._pressure(slow)
        last = _Rung(FP8, np.full_like(slow_pressure, -math.inf), 0.0, 0.0, 0.0)
        if settings.between == AUTO:
            auto = np.full_like(slow_pressure, fast_load)
            high = FP8_OVERLOAD if memory.overload_s >= OVERLOAD_S else math.inf
            return [
                _Rung(FP16, slow_pressure, LIGHT[0], LIGHT[1], settings.rest_s),
                _Rung(AUTO, auto, high, FP8_OVERLOAD, EASED_S),
                last,
            ]
        factor = _factor(memory.missed)
        high, low = settings.high * factor, settings.low * factor
        rungs = [_Rung(FP16, slow_pressure, high, low, self._calm_s), last]
        if settings.between:
            plan = self._pressure(self._forecast(memory.model.of(settings.between), facts))
            rungs.insert(1, _Rung(settings.between, plan, high, low, self._calm_s))
        return rungs

    def _forecast(self, costs: StepCosts, facts: Facts) -> _Forecast:
        """TTFT behind the queue, and TPOT over the life of a request, if every replica ran at ``costs``."""
        prompt_tokens = facts.prompt_tokens
        room_tokens = np.maximum(1.0, self._model.chunk_tokens - facts.running)
        full = costs.step_s(
            facts.running + room_tokens,
            facts.running + 1.0,
            facts.context,
            0.5 * room_tokens * np.minimum(prompt_tokens, room_tokens),
        )
        burst = np.maximum(0.0, facts.inflow - room_tokens / full) * self._settings.horizon_s
        steps = (facts.waiting + burst) / room_tokens
        load = TokenLoad(
            prompt_per_s=facts.prompt_per_s,
            decode_per_s=facts.decode_per_s,
            context=facts.context_each,
            prompt_tokens=prompt_tokens,
        )
        steady = np.minimum(costs.steady_step_s(load), full)
        ttft_s = np.maximum(steps * full, facts.oldest_s) + np.where(facts.waiting > 0, full, steady)
        output = np.maximum(SHORTEST_OUTPUT, facts.decode_per_s / np.maximum(facts.arrivals, 1e-9))
        slowed = np.minimum(steps, output)
        tpot_s = (slowed * full + (output - slowed) * steady) / output
        return _Forecast(ttft_s, tpot_s)

    def _pressure(self, forecast: _Forecast) -> Floats:
        pressure: Floats = np.maximum(forecast.ttft_s / self._slo.ttft_s, forecast.tpot_s / self._slo.tpot_s)
        return pressure

    def _relief(self, rungs: list[_Rung], place: int, needed: int, slow: _Forecast, row: int) -> Wish:
        """The way down: what crossed the level of the rung in force."""
        rung = rungs[place]
        pressure = float(rung.pressure[row])
        if rung.mode == AUTO:
            return Wish(
                mode=rungs[needed].mode,
                reason="more load than FP8 serves",
                signal="fp8_load",
                value=pressure,
                threshold=rung.high,
                urgent=True,
            )
        signal, value, limit = self._crossing(slow, row)
        return Wish(
            mode=rungs[needed].mode,
            reason=f"{signal} of {value:.4g} s in 16 bits is {_shown(value / limit)} of its limit",
            signal=signal,
            value=value,
            threshold=rung.high * limit,
            urgent=pressure >= 1.0 or rungs[needed].mode == AUTO,
        )

    def _return(self, rung: _Rung, slow: _Forecast, row: int, calm_s: float) -> Wish:
        signal, value, limit = self._crossing(slow, row)
        return Wish(
            mode=rung.mode,
            reason=f"{signal} in 16 bits at {_shown(value / limit)} of its limit, calm for {calm_s:.1f} s",
            signal=signal,
            value=value,
            threshold=rung.low * limit,
        )

    def _queue_bound(self, model: LatencyModel, facts: Facts, row: int) -> float:
        """Prompt tokens that FP8 prefills within the TTFT limit."""
        running = float(facts.running[row])
        room_tokens = max(1.0, model.chunk_tokens - running)
        full = float(model.of(FP8).step_s(running + room_tokens, running + 1.0, float(facts.context[row])))
        return float(int(room_tokens * max(1.0, self._settings.high * self._slo.ttft_s / full)))

    def _crossing(self, forecast: _Forecast, row: int) -> tuple[str, float, float]:
        """The predicted time that is nearest to its limit: its name, value and limit."""
        ttft_s, tpot_s = float(forecast.ttft_s[row]), float(forecast.tpot_s[row])
        if ttft_s / self._slo.ttft_s >= tpot_s / self._slo.tpot_s:
            return "predicted_ttft_s", ttft_s, self._slo.ttft_s
        return "predicted_tpot_s", tpot_s, self._slo.tpot_s


def _overload_s(before: float, load: float, elapsed_s: float) -> float:
    """Seconds of overload after another decision: what an overload adds, and what the lack of one takes.

    At most one second is known of the time since the decision before, however long that was, and nothing
    where the clock went back.
    """
    known_s = min(max(elapsed_s, 0.0), 1.0)
    if load < FP8_OVERLOAD:
        return max(0.0, before - RECOVERY * known_s)
    return before + min(1.0, (load - FP8_OVERLOAD) / (FULL_OVERLOAD - FP8_OVERLOAD)) * known_s


def _shed(queue_bound: float, pressure: float) -> Wish:
    return Wish(
        mode=FP8,
        reason=f"FP8 is at {_shown(pressure)} of the SLO: the queue is bounded",
        limits={"waiting_prompt_tokens": queue_bound},
    )


def _shown(pressure: float) -> str:
    return f"{100 * min(pressure, _MAX_REASON_PRESSURE):.0f} %"


def _factor(missed: float) -> float:
    """The factor on all levels: 1.2 where nothing is missed, 0.8 at the tolerance, 0.2 at twice that."""
    return 1.2 - 0.4 * missed if missed <= 1.0 else 0.8 - 0.6 * (missed - 1.0)


def _first_rung(passes: list[NDArray[np.bool_]]) -> list[int]:
    """The first rung that passes, by row; the last passes always."""
    first: list[int] = np.argmax(np.stack(passes), axis=0).tolist()
    return first


def _missed(views: tuple[ReplicaView, ...]) -> list[tuple[float, float]]:
    """The share of requests missed and their rate, of each replica that knows it."""
    reports = [view.report for view in views]
    return [
        (report.slo_miss_share, report.arrivals_per_s)
        for report in reports
        if report.slo_miss_share is not None
    ]


def _learn(model: LatencyModel, views: tuple[ReplicaView, ...], seen: Seen, turn: int) -> LatencyModel:
    """The model corrected by the latest step of one replica, where its precision is known."""
    row = turn % len(views)
    report = views[row].report
    mode = FP16 if seen.only_fp16[row] else FP8 if seen.only_fp8[row] else None
    if mode is None or not report.step_time_s or not report.batch_tokens or report.context_tokens is None:
        return model
    predicted = model.of(mode).step_s(report.batch_tokens, report.running, report.context_tokens)
    return model.corrected(mode, float(predicted), report.step_time_s)
