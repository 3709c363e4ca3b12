"""SLO-predictive control: what would TTFT and TPOT be in 16 bits, and is there still room?

For every replica and mode the latency model predicts, from the queue and the recent load, the TTFT of the
request that waits longest from now on and the TPOT of the requests being served. The larger of the two over
its SLO limit is the *pressure* of that mode. Pressure in 16 bits at ``high`` asks for FP8; pressure in 16
bits that stayed at ``low`` or below for ``calm_s`` asks for 16 bits again, whichever mode is in force:
returning does not need to be tried out.

A burst shows in the queue within one report. Its inflow over the last second, where it exceeds what 16 bits
can prefill, is projected ``horizon_s`` ahead, so that the flip comes before the queue is too long to
recover.

Both levels carry a factor learned from the outcome: where requests served in 16 bits miss the SLO more
often than those in FP8, by more than ``tolerance`` of all requests, the factor falls, and rises again when
they do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.base import Controller, Memory, Wish, by_load
from nestedfp.policies.latency import LatencyModel, StepCosts, TokenLoad
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.snapshot import ReplicaView, Snapshot

Floats = NDArray[np.float64]

INFLOW_WINDOW_S: Final = 1.0
MISS_WINDOW_S: Final = 60.0
ADAPTATION_S: Final = 20.0
FACTOR_RANGE: Final = (0.2, 1.2)
LOAD_WINDOW_S: Final = 2.0
SHORTEST_OUTPUT: Final = 4.0
_MAX_REASON_PRESSURE: Final = 99.0


class _Seen(NamedTuple):
    """What is remembered of one replica."""

    at_s: float
    waiting_prompt_tokens: int
    executed_tokens: int
    inflow_per_s: float
    """Prompt tokens arriving per second, averaged over about a second."""
    running: float
    """Running requests, averaged over about two seconds."""


class _Guard(NamedTuple):
    """What 16 bits cost the SLO lately, and the factor on both pressure levels that follows from it."""

    at_s: float = -math.inf
    missed_fp8: float = 0.0
    """Share of requests that missed the SLO on replicas in FP8, averaged over about a minute."""
    excess: float = 0.0
    """Share of all requests that missed it because of 16 bits, averaged over about a minute."""
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class _Memory:
    seen: Mapping[str, _Seen]
    calm_since: Mapping[str, float]
    shedding: frozenset[str]
    model: LatencyModel
    guard: _Guard
    turn: int
    """Counts decisions; chooses whose step corrects the model."""


class _Facts(NamedTuple):
    """The reports as columns, one row a replica."""

    running: Floats
    waiting: Floats
    oldest_s: Floats
    context: Floats
    arrivals: Floats
    prompt_per_s: Floats
    inflow: Floats
    decode_per_s: Floats


class _Forecast(NamedTuple):
    """Predicted times of one mode, one row a replica, in seconds."""

    ttft_s: Floats
    tpot_s: Floats


class PredictiveController(Controller):
    """Predictive control with a burst projection and a latency model corrected online."""

    def __init__(self, config: PolicyConfig) -> None:
        self._slo = config.slo
        self._settings = config.prediction
        self._calm_s = config.calm_s
        self._model = config.latency or latency_model()

    def start(self) -> Memory:
        return _Memory({}, {}, frozenset(), self._model, _Guard(), 0)

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        before = cast(_Memory, memory)
        views = snapshot.replicas
        if not views:
            return {}, before
        model = _learn(before.model, views, modes, before.turn)
        seen = {view.replica_id: _see(view, before.seen.get(view.replica_id), now) for view in views}
        facts = _facts(views, modes, seen, model)
        slow = self._forecast(model.of(FP16), facts)
        fast = self._forecast(model.of(FP8), facts)
        slow_pressure, fast_pressure = self._pressure(slow), self._pressure(fast)
        guard = _watch(before.guard, views, modes, self._settings.tolerance, now)
        high, low = self._settings.high * guard.factor, self._settings.low * guard.factor
        kept = _kept_for_strict(views, modes)
        wishes: dict[str, Wish] = {}
        calm_since: dict[str, float] = {}
        shedding: set[str] = set()
        for row, view in enumerate(views):
            replica_id = view.report.replica_id
            mode = modes[replica_id]
            pressure = float(slow_pressure[row])
            if pressure >= high and replica_id not in kept:
                if mode != FP8:
                    wishes[replica_id] = self._relief(slow, row, pressure, high)
                elif self._sheds(float(fast_pressure[row]), replica_id in before.shedding):
                    shedding.add(replica_id)
                    wishes[replica_id] = self._shed(model, facts, row, float(fast_pressure[row]))
            elif pressure <= low or replica_id in kept:
                since = calm_since[replica_id] = before.calm_since.get(replica_id, now)
                if mode != FP16 and now - since >= self._calm_s:
                    wishes[replica_id] = self._return(slow, row, pressure, low, now - since)
        return wishes, _Memory(seen, calm_since, frozenset(shedding), model, guard, before.turn + 1)

    def _forecast(self, costs: StepCosts, facts: _Facts) -> _Forecast:
        """TTFT behind the queue, and TPOT over the life of a request, if every replica ran at ``costs``."""
        prompt_tokens = facts.prompt_per_s / np.maximum(facts.arrivals, 1e-9)
        room = np.maximum(1.0, self._model.chunk_tokens - facts.running)
        full = costs.step_s(
            facts.running + room,
            facts.running + 1.0,
            facts.context,
            0.5 * room * np.minimum(prompt_tokens, room),
        )
        burst = np.maximum(0.0, facts.inflow - room / full) * self._settings.horizon_s
        steps = (facts.waiting + burst) / room
        load = TokenLoad(
            prompt_per_s=facts.prompt_per_s,
            decode_per_s=facts.decode_per_s,
            context=facts.context / np.maximum(facts.running, 1.0),
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

    def _sheds(self, fast_pressure: float, sheds_already: bool) -> bool:
        level = self._settings.high if sheds_already else 1.0
        return self._settings.shed and fast_pressure >= level

    def _relief(self, slow: _Forecast, row: int, pressure: float, high: float) -> Wish:
        signal, value, limit = self._crossing(slow, row)
        return Wish(
            mode=FP8,
            reason=f"{signal} of {value:.4g} s in 16 bits is {_shown(pressure)} of its limit",
            signal=signal,
            value=value,
            threshold=high * limit,
            urgent=pressure >= 1.0,
        )

    def _return(self, slow: _Forecast, row: int, pressure: float, low: float, calm_s: float) -> Wish:
        signal, value, limit = self._crossing(slow, row)
        return Wish(
            mode=FP16,
            reason=f"{signal} in 16 bits at {_shown(pressure)} of its limit after {calm_s:.1f} s of calm",
            signal=signal,
            value=value,
            threshold=low * limit,
        )

    def _shed(self, model: LatencyModel, facts: _Facts, row: int, pressure: float) -> Wish:
        """Bound the queue by what FP8 prefills within the TTFT limit."""
        running = float(facts.running[row])
        room = max(1.0, model.chunk_tokens - running)
        full = float(model.of(FP8).step_s(running + room, running + 1.0, float(facts.context[row])))
        bound = room * max(1.0, self._settings.high * self._slo.ttft_s / full)
        return Wish(
            mode=FP8,
            reason=f"FP8 is at {_shown(pressure)} of the SLO: the queue is bounded",
            limits={"waiting_prompt_tokens": float(int(bound))},
        )

    def _crossing(self, forecast: _Forecast, row: int) -> tuple[str, float, float]:
        """The predicted time that is nearest to its limit: its name, value and limit."""
        ttft_s, tpot_s = float(forecast.ttft_s[row]), float(forecast.tpot_s[row])
        if ttft_s / self._slo.ttft_s >= tpot_s / self._slo.tpot_s:
            return "predicted_ttft_s", ttft_s, self._slo.ttft_s
        return "predicted_tpot_s", tpot_s, self._slo.tpot_s


def _shown(pressure: float) -> str:
    return f"{100 * min(pressure, _MAX_REASON_PRESSURE):.0f} %"


def _learn(
    model: LatencyModel, views: tuple[ReplicaView, ...], modes: Mapping[str, str], turn: int
) -> LatencyModel:
    """The model corrected by the latest step of one replica; they take turns."""
    report = views[turn % len(views)].report
    if not report.step_time_s or not report.batch_tokens or report.context_tokens is None:
        return model
    mode = modes[report.replica_id]
    predicted = model.of(mode).step_s(report.batch_tokens, report.running, report.context_tokens)
    return model.corrected(mode, float(predicted), report.step_time_s)


def _watch(
    guard: _Guard, views: tuple[ReplicaView, ...], modes: Mapping[str, str], tolerance: float, now: float
) -> _Guard:
    """The guard after these reports; its factor falls while 16 bits cost more than ``tolerance``."""
    rows = [
        (view.report.slo_miss_share, view.report.arrivals_per_s, modes[view.report.replica_id] == FP16)
        for view in views
        if view.report.slo_miss_share is not None
    ]
    arrivals = sum(rate for _, rate, _ in rows)
    elapsed_s = now - guard.at_s
    if not rows or arrivals <= 0.0 or elapsed_s <= 0.0:
        return guard._replace(at_s=max(now, guard.at_s))
    slow = [(missed, rate) for missed, rate, in_16_bits in rows if in_16_bits]
    fast = [(missed, rate) for missed, rate, in_16_bits in rows if not in_16_bits]
    step_s = min(elapsed_s, 1.0)
    blend = -math.expm1(-step_s / MISS_WINDOW_S)
    missed_fp8 = guard.missed_fp8
    if fast:
        share = sum(missed * rate for missed, rate in fast) / max(sum(rate for _, rate in fast), 1e-9)
        missed_fp8 += blend * (min(1.0, share) - missed_fp8)
    excess = sum(max(0.0, missed - missed_fp8) * rate for missed, rate in slow) / arrivals
    excess = guard.excess + blend * (excess - guard.excess)
    # It falls up to ten times as fast as it rises: a burst costs more than caution does.
    push = min(0.5, max(-5.0, (0.8 * tolerance - excess) / tolerance))
    low, high = FACTOR_RANGE
    factor = min(high, max(low, guard.factor * math.exp(push * step_s / ADAPTATION_S)))
    return _Guard(now, missed_fp8, excess, factor)


def _see(view: ReplicaView, before: _Seen | None, now: float) -> _Seen:
    """The running averages of one replica after this report."""
    report = view.report
    executed = report.tokens_fp16 + report.tokens_fp8
    if before is None or now <= before.at_s:
        inflow = report.arriving_prompt_tokens_per_s or 0.0
        return _Seen(now, report.waiting_prompt_tokens, executed, inflow, float(report.running))
    elapsed_s = now - before.at_s
    # What arrived is what was executed and what the queue grew by; decode tokens are few beside a burst's
    # prompts.
    grown = report.waiting_prompt_tokens - before.waiting_prompt_tokens
    inflow = max(0.0, (executed - before.executed_tokens + grown) / elapsed_s)
    fast, slow = -math.expm1(-elapsed_s / INFLOW_WINDOW_S), -math.expm1(-elapsed_s / LOAD_WINDOW_S)
    return _Seen(
        now,
        report.waiting_prompt_tokens,
        executed,
        before.inflow_per_s + fast * (inflow - before.inflow_per_s),
        before.running + slow * (report.running - before.running),
    )


def _facts(
    views: tuple[ReplicaView, ...], modes: Mapping[str, str], seen: Mapping[str, _Seen], model: LatencyModel
) -> _Facts:
    rows = [
        (
            view.report.running,
            view.report.waiting_prompt_tokens,
            view.report.oldest_waiting_s,
            view.report.context_tokens or 0,
            view.report.arrivals_per_s,
            view.report.arriving_prompt_tokens_per_s or 0.0,
            seen[view.report.replica_id].inflow_per_s,
            seen[view.report.replica_id].running,
            modes[view.report.replica_id] == FP8,
        )
        for view in views
    ]
    running, waiting, oldest_s, context, arrivals, prompt, inflow, mean_running, fast = np.array(
        rows, float
    ).T
    per_request = context / np.maximum(running, 1.0)
    decode = np.zeros_like(running)
    for mode, chosen in ((FP8, fast > 0), (FP16, fast == 0)):
        step = _loaded_step(
            model.of(mode), mean_running, per_request, prompt, prompt / np.maximum(arrivals, 1e-9)
        )
        decode = np.where(chosen, mean_running / step, decode)
    return _Facts(running, waiting, oldest_s, context, arrivals, prompt, inflow, decode)


def _loaded_step(
    costs: StepCosts, running: Floats, per_request: Floats, prompt_per_s: Floats, prompt_tokens: Floats
) -> Floats:
    """Mean step time at a known batch: the steady step with the number of requests given, not derived."""
    linear = np.maximum(costs.weights_s, running * costs.token_s)
    base = costs.overhead_s + linear + running * (costs.sequence_s + per_request * costs.context_token_s)
    lump_s = np.maximum(0.0, (running + prompt_tokens) * costs.token_s - linear)
    step: Floats = base / (1.0 - np.minimum(0.9, prompt_per_s / np.maximum(prompt_tokens, 1.0) * lump_s))
    return step


def _kept_for_strict(views: tuple[ReplicaView, ...], modes: Mapping[str, str]) -> frozenset[str]:
    """Replicas that stay in 16 bits for requests that demand it: their share of all requests, rounded up."""
    strict = sum(view.report.strict_running + view.report.strict_waiting for view in views)
    if strict == 0:
        return frozenset()
    everything = sum(view.report.running + view.report.waiting for view in views)
    count = math.ceil(len(views) * min(1.0, strict / max(everything, 1)))
    ordered = sorted(by_load(views), key=lambda view: modes[view.report.replica_id] != FP16)
    return frozenset(view.report.replica_id for view in ordered[:count])
