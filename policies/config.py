"""Settings of the policy, read from a mapping (a YAML block) and checked in full.

A bad or unknown key raises :class:`~nestedfp.policies.checks.InvalidField` with its dotted name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.latency import LatencyModel
from nestedfp.policies.protocol import AUTO, FP8, FP16

CONTROLLERS: Final = ("static-fp16", "static-fp8", "threshold", "predictive")
WATCHED_SIGNALS: Final = ("waiting", "oldest_waiting_s", "ttft_p90_s", "tpot_p90_s", "kv_usage")


@dataclass(frozen=True, slots=True)
class Slo:
    """The service level objective: this percentile of requests within both times, in seconds."""

    ttft_s: float = 1.0
    tpot_s: float = 0.033
    percentile: float = 90.0

    def __post_init__(self) -> None:
        checks.number("slo.ttft_s", self.ttft_s, above=0.0)
        checks.number("slo.tpot_s", self.tpot_s, above=0.0)
        checks.number("slo.percentile", self.percentile, above=0.0, maximum=100.0)


@dataclass(frozen=True, slots=True)
class Water:
    """Hysteresis of one signal: at ``high`` and above it asks for FP8, at ``low`` and below it is calm."""

    high: float
    low: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Settings of the predictive controller. Pressure is a predicted time over its SLO limit."""

    high: float = 0.8
    """Predicted 16-bit pressure that asks for FP8."""
    low: float = 0.6
    """Predicted 16-bit pressure at which 16 bits may return."""
    between: str = AUTO
    """The rung between 16 bits and FP8: ``auto``, a named plan whose costs are known, or empty for none."""
    rest_s: float = 60.0
    """How long the load must be light before ``auto`` gives way to 16 bits."""
    tolerance: float = 0.005
    """Share of requests missed at which the levels fall."""
    pace: float = 0.85
    """The most of the TPOT limit that a token of a heavy batch may take on average in 16 bits. What is left
    of it keeps batches small, so that a burst meets room. A light batch may take all of it."""
    light_batch: float = 0.1
    """Part of the TPOT limit: a batch that takes FP8 no more at any size of the step is light."""
    heavy_batch: float = 0.2
    """Part of the TPOT limit: a batch that takes FP8 as much is heavy; 0: every batch is."""
    first_token: float = 0.7
    """Part of the TTFT limit: a prompt that would be later than this in FP8 does not wait for 16 bits, if the
    batch is heavy."""
    light_first_token: float = 0.8
    """``first_token`` if the batch is light."""
    give_up: float = 1.5
    """Multiple of the TTFT limit: a prompt that would be as late as this in FP8 asks for none, unless the
    batch is heavy."""
    least_tokens: int = 256
    """Prompt tokens below which a step is not cut to keep the pace; 0 cuts any, a whole chunk none."""
    horizon_s: float = 0.5
    """How far ahead a burst in progress is projected."""
    shed: bool = False
    """Refuse what FP8 cannot serve within the SLO either."""

    def __post_init__(self) -> None:
        checks.number("prediction.high", self.high, above=0.0)
        checks.number("prediction.low", self.low, above=0.0)
        if self.low >= self.high:
            raise InvalidField("prediction.low", self.low, f"give less than high, {self.high:g}")
        if self.between:
            checks.name("prediction.between", self.between)
        checks.number("prediction.rest_s", self.rest_s)
        checks.number("prediction.pace", self.pace, above=0.0, maximum=1.0)
        checks.number("prediction.light_batch", self.light_batch, maximum=1.0)
        checks.number("prediction.heavy_batch", self.heavy_batch, maximum=1.0)
        if self.light_batch > self.heavy_batch > 0.0:
            raise InvalidField(
                "prediction.light_batch", self.light_batch, f"give at most heavy_batch, {self.heavy_batch:g}"
            )
        checks.number("prediction.first_token", self.first_token, above=0.0, maximum=1.0)
        checks.number("prediction.light_first_token", self.light_first_token, above=0.0, maximum=1.0)
        checks.number("prediction.give_up", self.give_up, minimum=1.0)
        checks.integer("prediction.least_tokens", self.least_tokens, minimum=0)
        checks.number("prediction.horizon_s", self.horizon_s)
        checks.number("prediction.tolerance", self.tolerance, above=0.0, maximum=1.0)
        checks.flag("prediction.shed", self.shed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """All settings of the policy. Durations are seconds."""

    controller: str = "threshold"
    slo: Slo = Slo()
    thresholds: Mapping[str, Water] = dataclasses.field(default_factory=dict)
    """Watched signals of the threshold controller; empty: derived from the SLO (:func:`slo_thresholds`)."""
    min_dwell_s: float = 2.0
    """Shortest stay in a mode; a signal beyond ``panic_factor`` times its high water ends it early."""
    calm_s: float = 3.0
    """How long all signals must be at or below low water before 16 bits return."""
    return_gap_s: float = 1.0
    """Shortest time between two replicas of the cluster returning to 16 bits."""
    panic_factor: float = 2.0
    """Multiple of high water that overrides the dwell time (never the bound on flips)."""
    max_flips_per_minute: int = 6
    """Most mode changes of one replica in any 60 s, manual pins included in the count."""
    lease_s: float = 5.0
    """How long a target holds after the replica's call."""
    sync_wait_s: float = 0.25
    """Longest wait of one long poll, and so the interval of reports."""
    decide_interval_s: float = 0.1
    """Shortest time between two decisions."""
    max_signal_age_s: float = 2.0
    """Older signals make no decision, and a longer time without a decision ends a calm."""
    cut_steps: bool = False
    """Cut the steps of static and threshold control to what the SLO leaves time for, as those of predictive
    control are cut always."""
    dry_run: bool = False
    """Decide and log, but leave every replica in the mode it has."""
    prediction: Prediction = Prediction()
    latency: LatencyModel | None = None
    """Step costs that predictions begin with, corrected online; None: those of an H100 serving Llama-3.1-8B,
    on whatever engine."""
    plans: tuple[str, ...] = ()
    """Named plans the engines know besides ``fp16``, ``fp8`` and ``auto``."""

    def __post_init__(self) -> None:
        checks.one_of("controller", self.controller, CONTROLLERS)
        for field in ("min_dwell_s", "calm_s", "return_gap_s"):
            checks.number(field, getattr(self, field))
        for field in ("lease_s", "sync_wait_s", "decide_interval_s", "max_signal_age_s"):
            checks.number(field, getattr(self, field), above=0.0)
        checks.number("panic_factor", self.panic_factor, minimum=1.0)
        checks.take_integer(self, "max_flips_per_minute", minimum=2)
        checks.flag("cut_steps", self.cut_steps)
        checks.flag("dry_run", self.dry_run)
        if self.sync_wait_s > self.lease_s / 3:
            raise InvalidField(
                "sync_wait_s", self.sync_wait_s, f"give at most a third of lease_s, {self.lease_s / 3:g}"
            )
        for field, why in (
            ("sync_wait_s", "a replica reports once in this time, and older signals decide nothing"),
            ("decide_interval_s", "a longer time without a decision ends a calm, so 16 bits never return"),
        ):
            if getattr(self, field) >= self.max_signal_age_s:
                remedy = f"give less than max_signal_age_s, {self.max_signal_age_s:g}: {why}"
                raise InvalidField(field, getattr(self, field), remedy)
        self._refuse_idle_settings()
        for plan in self.plans:
            checks.name("plans", plan)
        between = self.prediction.between
        if between and between != AUTO:
            checks.one_of("prediction.between", between, (AUTO, *self.plans))
            if self.latency is None or between not in self.latency.costs:
                raise InvalidField("prediction.between", between, "give its step costs in latency.costs")

    def _refuse_idle_settings(self) -> None:
        """Settings of the other controller would be taken for a rule in force. The static controllers heed
        neither's, so that a baseline can be run from the file of what it is compared with.
        """
        if self.controller == "threshold" and self.prediction.shed:
            remedy = "leave it out, or set controller: predictive, which alone refuses requests"
            raise InvalidField("prediction.shed", self.prediction.shed, remedy)
        if self.controller == "predictive" and self.thresholds:
            remedy = "leave it out, or set controller: threshold: predictive acts on step times and the SLO"
            raise InvalidField("thresholds", sorted(self.thresholds), remedy)

    @property
    def modes(self) -> tuple[str, ...]:
        """Every mode a replica may be told."""
        return (FP16, FP8, AUTO, *self.plans)

    @property
    def water(self) -> Mapping[str, Water]:
        """The thresholds in force."""
        return self.thresholds or slo_thresholds(self.slo)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``from_dict`` reads them back."""
        values = dataclasses.asdict(self)
        values["plans"] = list(self.plans)
        if self.latency is not None:
            del values["latency"]["correction"]
        return values

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PolicyConfig:
        """Read and check settings; anything left out keeps its default."""
        fields = {field.name for field in dataclasses.fields(cls)}
        values = dict(checks.mapping("", settings, sorted(fields)))
        if "slo" in values:
            known = [field.name for field in dataclasses.fields(Slo)]
            values["slo"] = Slo(**checks.mapping("slo", values["slo"], known))
        if "thresholds" in values:
            signals = checks.mapping("thresholds", values["thresholds"], WATCHED_SIGNALS)
            values["thresholds"] = {signal: _water(signal, given) for signal, given in signals.items()}
        if "prediction" in values:
            known = [field.name for field in dataclasses.fields(Prediction)]
            values["prediction"] = Prediction(**checks.mapping("prediction", values["prediction"], known))
        if values.get("latency") is not None:
            values["latency"] = LatencyModel.from_dict(values["latency"])
        if "plans" in values:
            if not isinstance(values["plans"], (list, tuple)):
                raise InvalidField("plans", values["plans"], "give a list of plan names")
            values["plans"] = tuple(values["plans"])
        return cls(**values)


def slo_thresholds(slo: Slo) -> dict[str, Water]:
    """Thresholds that follow from an SLO.

    Queueing acts first: a request that has waited a quarter of the TTFT limit is early warning enough for one
    step of flipping, the measured percentiles confirm it later.
    """
    return {
        "oldest_waiting_s": Water(high=0.25 * slo.ttft_s, low=0.05 * slo.ttft_s),
        "ttft_p90_s": Water(high=0.8 * slo.ttft_s, low=0.5 * slo.ttft_s),
        "tpot_p90_s": Water(high=0.95 * slo.tpot_s, low=0.7 * slo.tpot_s),
    }


def _water(signal: str, given: object) -> Water:
    field = f"thresholds.{signal}"
    levels = checks.mapping(field, given, ("high", "low"))
    for level in ("high", "low"):
        if level not in levels:
            raise InvalidField(f"{field}.{level}", None, "give both high and low")
    high = checks.number(f"{field}.high", levels["high"], above=0.0)
    low = checks.number(f"{field}.low", levels["low"])
    if low >= high:
        raise InvalidField(f"{field}.low", low, f"give less than high, {high:g}")
    return Water(high=high, low=low)
