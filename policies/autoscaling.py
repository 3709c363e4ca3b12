"""How many replicas there should be: the slow lever beside precision, decided from the same facts.

Precision bridges the minutes until a replica has started, so replicas are added only when FP8 is not enough,
or has carried load for so long that it is no burst, or is not to be had: for requests that demand 16 bits, by
a pin or under a static policy. Nor is FP8 enough where the load grows so that it will not be by the time a
replica ordered now would serve; that time is measured at each order.

While FP8 carries load nothing is removed; and one replica leaves only when all are in 16 bits, none is beyond
a limit of the SLO and the rest is predicted to hold it in 16 bits, for a while without a break. A replica in
``auto`` uses FP8 for single steps at any load; it relies on FP8 where 16 bits alone are not predicted to
hold. While one that was ordered does not serve yet only a load that grows beyond it changes anything, but not
for ever: it may never find a place.

The facts of one replica are a flat dictionary of finite numbers (:func:`scaling_stats`), as Ray Serve's
``record_autoscaling_stats`` wants them: a single None or NaN there would end the metric for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import Slo
from nestedfp.policies.latency import LatencyModel, TokenLoad
from nestedfp.policies.protocol import AUTO, FP8, FP16, ReplicaReport
from nestedfp.policies.trend import Trend

STATS: Final = (
    "in_fp8",
    "fixed",
    "mode_s",
    "strain",
    "prompt_per_s",
    "prompt_tokens",
    "decode_per_s",
    "context",
)

LEAST_GROWTH: Final = 1.05
"""Less is left to what is seen of the replicas."""

UNDECIDED: Final = 0.5
"""``in_fp8`` of a replica in ``auto``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """Settings of the joint rule. Durations are seconds."""

    min_replicas: int = 1
    max_replicas: int = 1
    overload_s: float = 5.0
    """How long most replicas must have been too slow, as fast as they may be, before one is added."""
    fp8_patience_s: float = 120.0
    """How long most replicas may carry load in FP8 before one is added although FP8 holds."""
    spare_s: float = 300.0
    """How long one replica fewer must have been enough before one is removed."""
    start_s: float = 120.0
    """How long a replica takes from its order until it serves, before one has been seen to."""
    start_patience_s: float = 600.0
    """How long ordered replicas that do not serve hold everything; far more than a start takes. Afterwards
    those that serve are counted alone.
    """
    headroom: float = 0.7
    """Share of the TPOT limit that predictions may use up."""

    def __post_init__(self) -> None:
        checks.take_integer(self, "min_replicas", minimum=1)
        checks.take_integer(self, "max_replicas", minimum=1)
        if self.max_replicas < self.min_replicas:
            remedy = f"give at least min_replicas, {self.min_replicas}"
            raise InvalidField("max_replicas", self.max_replicas, remedy)
        for name in ("overload_s", "fp8_patience_s", "spare_s", "start_s", "start_patience_s"):
            checks.number(name, getattr(self, name))
        checks.number("headroom", self.headroom, above=0.0, maximum=1.0)


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What the rule remembers: since when replicas are too slow, one is spare, FP8 is relied upon, a start is
    awaited; how long starts take; how the load has been."""

    overloaded_since_s: float | None = None
    spare_since_s: float | None = None
    relied_since_s: float | None = None
    """Since when most replicas have relied on FP8."""
    starting_since_s: float | None = None
    """Since when some of those ordered have not served."""
    ordered_since_s: float | None = None
    """When more were ordered, until all serve."""
    start_s: float | None = None
    """How long the latest order took until all served."""
    serving: int = 0
    """How many replicas share the load, one that is silent for a while included."""
    demand: Trend = field(default_factory=Trend)
    """Prompt tokens a second that arrive at all of them."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """A decision: the number of replicas wanted, and why."""

    replicas: int
    reason: str


def scaling_stats(report: ReplicaReport, mode_s: float, slo: Slo, *, fixed: bool = False) -> dict[str, float]:
    """The numbers a replica contributes; ``mode_s`` is how long it has been in its mode. Always finite.

    ``in_fp8`` is 0 in 16 bits, 1 in FP8 or a plan, ``UNDECIDED`` in ``auto``; ``fixed`` is 1 where the mode
    stays whatever the load. ``strain`` is the worst of queueing, TTFT and TPOT over its SLO limit.
    """
    strain = max(
        report.oldest_waiting_s / slo.ttft_s,
        (report.ttft_p90_s or 0.0) / slo.ttft_s,
        (report.tpot_p90_s or 0.0) / slo.tpot_s,
    )
    decode_per_s = report.running / report.step_time_s if report.step_time_s else 0.0
    prompt_per_s = report.arriving_prompt_tokens_per_s or 0.0
    stats = {
        "in_fp8": {FP16: 0.0, AUTO: UNDECIDED}.get(report.mode, 1.0),
        "fixed": float(fixed),
        "mode_s": mode_s,
        "strain": strain,
        "prompt_per_s": prompt_per_s,
        "prompt_tokens": prompt_per_s / report.arrivals_per_s if report.arrivals_per_s else 0.0,
        "decode_per_s": decode_per_s,
        "context": (report.context_tokens or 0) / max(report.running, 1),
    }
    return {name: value if math.isfinite(value) and value >= 0 else 0.0 for name, value in stats.items()}


def desired_replicas(
    stats: Sequence[Mapping[str, float]],
    state: ScalingState,
    *,
    current: int,
    starting: int,
    config: ScalingConfig,
    slo: Slo,
    model: LatencyModel,
    now: float,
) -> tuple[Scaling, ScalingState]:
    """The number of replicas wanted, always an int within the configured bounds, and the state to keep.

    ``stats`` holds :func:`scaling_stats` of the replicas that serve (unusable rows are left out),
    ``current`` the number ordered, ``starting`` how many of these do not serve yet. Without a usable row
    nothing changes; while replicas start only a growing load changes anything, until ``start_patience_s``
    have passed without a moment in which all served.
    """
    usable = [row for row in stats if _usable(row)]
    if not usable:
        return _bounded(current, "no usable reports", config), ScalingState(start_s=state.start_s)
    ordered = state.ordered_since_s is not None
    state = _timed(state, starting, config, now)
    absent = 0
    if state.starting_since_s is not None and now - state.starting_since_s >= config.start_patience_s:
        absent, starting = starting, 0
    present = max(0, current - absent)
    state = _counted(state, usable, present, ordered, now)
    in_fp8 = [row for row in usable if _relies_on_fp8(row, config, slo, model)]
    mostly_fp8 = 2 * len(in_fp8) > len(usable)
    state = replace(state, relied_since_s=_since(mostly_fp8, state.relied_since_s, now))
    strained = [row for row in in_fp8 if row["strain"] >= 1.0]
    # FP8 may still help a replica in 16 bits, unless it has to stay there.
    stuck = [row for row in usable if row["in_fp8"] == 0 and row["fixed"] and row["strain"] >= 1.0]
    overloaded = 2 * (len(strained) + len(stuck)) > len(usable)
    state = replace(state, overloaded_since_s=_since(overloaded, state.overloaded_since_s, now))
    overloaded_s = 0.0 if state.overloaded_since_s is None else now - state.overloaded_since_s
    if overloaded and starting == 0 and overloaded_s >= config.overload_s:
        # What those added will mostly be in: nothing is predicted for some of each.
        mode = FP16 if len(stuck) > len(strained) else FP8
        wanted = max(current + 1, absent + _smallest(mode, usable, present, config, slo, model))
        counts = {"FP8": len(strained), "16 bits": len(stuck)}
        reason = ", ".join(f"{name} too slow on {count} replicas" for name, count in counts.items() if count)
        return _changed(wanted, reason, current, config, state, now)
    start_s = config.start_s if state.start_s is None else state.start_s
    if (growth := state.demand.growth(start_s)) >= LEAST_GROWTH:
        mode = FP16 if 2 * sum(row["fixed"] and row["in_fp8"] == 0 for row in usable) > len(usable) else FP8
        grown = [_grown(row, growth) for row in usable]
        # Those that start will serve by then.
        if not _holds(mode, grown, max(1, present), config, slo, model):
            wanted = absent + _smallest(mode, grown, present, config, slo, model)
            name = "16 bits" if mode == FP16 else "FP8"
            reason = f"load grows by {growth - 1:.0%} in {start_s:.0f} s, too much for {name}"
            if min(wanted, config.max_replicas) > current:
                return _changed(wanted, reason, current, config, state, now)
    if mostly_fp8 and starting == 0:
        relied_s = 0.0 if state.relied_since_s is None else now - state.relied_since_s
        long_in_fp8 = [
            row
            for row in in_fp8
            if (relied_s if row["in_fp8"] == UNDECIDED else row["mode_s"]) >= config.fp8_patience_s
        ]
        if 2 * len(long_in_fp8) > len(usable):
            reason = f"{len(long_in_fp8)} replicas in FP8 for {config.fp8_patience_s:g} s"
            return _changed(current + 1, reason, current, config, state, now)
    if in_fp8 or stuck or starting > 0:
        besides = f"{len(stuck)} too slow in 16 bits, " if stuck else ""
        reason = f"{len(in_fp8)} replicas in FP8, {besides}{starting} starting: hold"
        return _bounded(current, reason, config), replace(state, spare_since_s=None)
    # Who is absent may serve unheard: the only one heard of would then do the other's work beside its own.
    rest = max(present - 1, 0.5) if absent else current - 1
    # Predictions go by step costs that need not be the engine's. What is measured may come close to the
    # limits: steps are cut to use them up.
    slow = sum(row["strain"] >= 1.0 for row in usable)
    spare = current > config.min_replicas and not slow and _holds(FP16, usable, rest, config, slo, model)
    state = replace(state, spare_since_s=_since(spare, state.spare_since_s, now))
    if state.spare_since_s is not None and now - state.spare_since_s >= config.spare_s:
        reason = f"{max(1, present - 1)} replicas hold the SLO in 16 bits"
        return _changed(current - 1, reason, current, config, state, now)
    reason = f"{slow} replicas too slow in 16 bits, FP8 may help" if slow else "16 bits hold"
    return _bounded(current, reason, config), state


def _usable(row: Mapping[str, float]) -> bool:
    values = [row.get(name) for name in STATS]
    return all(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 for value in values)


def _relies_on_fp8(row: Mapping[str, float], config: ScalingConfig, slo: Slo, model: LatencyModel) -> bool:
    """Whether this replica could not do without FP8 for long."""
    if row["in_fp8"] == UNDECIDED:
        return not _holds(FP16, [row], 1, config, slo, model)
    return row["in_fp8"] > 0


def _counted(
    state: ScalingState, usable: Sequence[Mapping[str, float]], present: int, ordered: bool, now: float
) -> ScalingState:
    """With the demand of now, where all who share it are heard: a silent one may serve or not.

    One that was ``ordered`` takes its part of what is there. Any other that is new to this state brings what
    was not counted, and the trend begins anew.
    """
    heard = len(usable)
    serving = max(min(state.serving, present), heard)
    if heard < serving:
        return replace(state, serving=serving)
    known = heard <= state.serving or ordered
    demand = (state.demand if known else Trend()).seen(sum(row["prompt_per_s"] for row in usable), now)
    return replace(state, serving=serving, demand=demand)


def _timed(state: ScalingState, starting: int, config: ScalingConfig, now: float) -> ScalingState:
    """Since when some have not served, and, once all serve, how long the order took.

    What is beyond patience was no start, nor is what a clock that was set back or far ahead makes of one.
    """
    ordered_since_s = state.ordered_since_s
    if ordered_since_s is not None and not 0.0 <= now - ordered_since_s < config.start_patience_s:
        ordered_since_s = None
    ended = state.starting_since_s is not None and starting == 0
    start_s = now - ordered_since_s if ended and ordered_since_s is not None else state.start_s
    return replace(
        state,
        starting_since_s=_since(starting > 0, state.starting_since_s, now),
        ordered_since_s=None if ended else ordered_since_s,
        start_s=start_s,
    )


def _grown(row: Mapping[str, float], factor: float) -> dict[str, float]:
    """The row of a replica with more requests of the same kind."""
    more = {name: factor * row[name] for name in ("prompt_per_s", "decode_per_s")}
    return {**row, **more}


def _since(condition: bool, before: float | None, now: float) -> float | None:
    """Since when ``condition`` holds; a time in the future (the clock fell) starts again."""
    if not condition:
        return None
    return now if before is None or before > now else before


def _holds(
    mode: str,
    usable: Sequence[Mapping[str, float]],
    replicas: float,
    config: ScalingConfig,
    slo: Slo,
    model: LatencyModel,
) -> bool:
    """Whether ``replicas`` are predicted to carry the whole load in ``mode`` within the headroom."""
    count = len(usable)
    share = count / replicas
    load = TokenLoad(
        prompt_per_s=share * sum(row["prompt_per_s"] for row in usable) / count,
        decode_per_s=share * sum(row["decode_per_s"] for row in usable) / count,
        context=sum(row["context"] for row in usable) / count,
        prompt_tokens=sum(row["prompt_tokens"] for row in usable) / count,
    )
    return model.tpot_s(mode, load) <= config.headroom * slo.tpot_s


def _smallest(
    mode: str,
    usable: Sequence[Mapping[str, float]],
    current: int,
    config: ScalingConfig,
    slo: Slo,
    model: LatencyModel,
) -> int:
    """The smallest number from ``current`` up that is predicted to hold; the most allowed if none is.

    None at all carry nothing, so 1 is tried first where ``current`` is 0, as while Serve starts.
    """
    for replicas in range(max(1, current), config.max_replicas):
        if _holds(mode, usable, replicas, config, slo, model):
            return replicas
    return config.max_replicas


def _changed(
    replicas: int, reason: str, current: int, config: ScalingConfig, state: ScalingState, now: float
) -> tuple[Scaling, ScalingState]:
    """Another number, and all delays anew. Those who are absent get new patience only if more are ordered."""
    scaling = _bounded(replicas, reason, config)
    known = ScalingState(start_s=state.start_s, serving=state.serving, demand=state.demand)
    if scaling.replicas > current:
        return scaling, replace(known, ordered_since_s=now)
    return scaling, replace(known, starting_since_s=state.starting_since_s)


def _bounded(replicas: int, reason: str, config: ScalingConfig) -> Scaling:
    return Scaling(min(config.max_replicas, max(config.min_replicas, replicas)), reason)
