"""Seeded synthetic traces: Poisson and gamma arrivals, a square wave (calm, burst, calm), and an MMPP.

All are one construction. A unit-rate renewal process with gamma gaps of the wanted coefficient of variation
(CV) is laid over a piecewise constant rate by inverting the cumulative rate (time rescaling; for CV 1 this is
exactly the inhomogeneous Poisson process). Equal arguments give equal traces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nestedfp.loadtests.traces import Trace


@dataclass(frozen=True)
class Lengths:
    """Token lengths: lognormal with this mean and CV (0: constant), rounded and cut to [1, ``longest``]."""

    mean: float
    cv: float = 0.0
    longest: int = 1 << 20

    def __post_init__(self) -> None:
        if not (1 <= self.mean <= self.longest and self.cv >= 0 and math.isfinite(self.cv)):
            raise ValueError(f"lengths {self}: the mean must lie in [1, longest] and cv be at least 0")

    def sample(self, count: int, random: np.random.Generator) -> NDArray[np.int32]:
        """``count`` lengths, int32."""
        sigma2 = math.log1p(self.cv**2)
        drawn = random.lognormal(math.log(self.mean) - sigma2 / 2, math.sqrt(sigma2), count)
        lengths: NDArray[np.int32] = np.clip(np.rint(drawn), 1, self.longest).astype(np.int32)
        return lengths


@dataclass(frozen=True)
class Segment:
    """A stretch of constant load: seconds, and mean arrivals per second."""

    duration_s: float
    rate_rps: float

    def __post_init__(self) -> None:
        if not (self.duration_s > 0 and math.isfinite(self.duration_s)):
            raise ValueError(f"a segment lasts {self.duration_s!r} s; give a number greater than 0")
        if not (self.rate_rps >= 0 and math.isfinite(self.rate_rps)):
            raise ValueError(f"a segment's rate is {self.rate_rps!r} requests/s; give a number of at least 0")


def piecewise(
    segments: Sequence[Segment],
    prompt: Lengths,
    output: Lengths,
    *,
    cv: float = 1.0,
    seed: int = 0,
    name: str = "piecewise",
) -> Trace:
    """Arrivals at the segments' rates one after another; gamma gaps of CV ``cv`` in rescaled time."""
    if not (cv > 0 and math.isfinite(cv)):
        raise ValueError(f"cv is {cv!r}; give a number greater than 0 (1 is a Poisson process)")
    random = np.random.default_rng(seed)
    ends = np.cumsum([segment.duration_s for segment in segments])
    expected = np.cumsum([segment.duration_s * segment.rate_rps for segment in segments])
    arrivals = np.interp(
        _unit_renewals(float(expected[-1]), cv, random),
        np.concatenate(([0.0], expected)),
        np.concatenate(([0.0], ends)),
    )
    rates = ", ".join(f"{segment.duration_s:g} s at {segment.rate_rps:g}/s" for segment in segments[:8])
    more = f", ... ({len(segments)} segments)" if len(segments) > 8 else ""
    return Trace.from_columns(
        name,
        arrivals,
        prompt.sample(len(arrivals), random),
        output.sample(len(arrivals), random),
        history=(f"synthetic {name}: {rates}{more}; cv {cv:g}, seed {seed}",),
    )


def square_wave(
    prompt: Lengths,
    output: Lengths,
    *,
    calm_rps: float,
    burst_rps: float,
    calm_s: float,
    burst_s: float,
    bursts: int = 1,
    cv: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Calm, burst, calm: ``bursts`` bursts of ``burst_s`` seconds between calms of ``calm_s`` seconds."""
    if bursts < 0:
        raise ValueError(f"bursts is {bursts!r}; give a whole number of at least 0")
    segments = [Segment(calm_s, calm_rps)]
    for _ in range(bursts):
        segments += [Segment(burst_s, burst_rps), Segment(calm_s, calm_rps)]
    return piecewise(segments, prompt, output, cv=cv, seed=seed, name="square")


def gamma(
    prompt: Lengths, output: Lengths, *, rate_rps: float, duration_s: float, cv: float = 1.0, seed: int = 0
) -> Trace:
    """A renewal process: gamma gaps with mean ``1 / rate_rps`` and CV ``cv``; above 1 it is bursty."""
    return piecewise([Segment(duration_s, rate_rps)], prompt, output, cv=cv, seed=seed, name="gamma")


def mmpp(
    prompt: Lengths,
    output: Lengths,
    *,
    calm_rps: float,
    burst_rps: float,
    mean_calm_s: float,
    mean_burst_s: float,
    duration_s: float,
    seed: int = 0,
) -> Trace:
    """A two-state Markov-modulated Poisson process: exponential sojourns, starting in the stationary mix."""
    means, rates = (mean_calm_s, mean_burst_s), (calm_rps, burst_rps)
    if not all(mean > 0 and math.isfinite(mean) for mean in means):
        raise ValueError(f"mean sojourns are {means} s; give numbers greater than 0")
    if not (duration_s > 0 and math.isfinite(duration_s)):
        raise ValueError(f"the trace lasts {duration_s!r} s; give a number greater than 0")
    # Its own stream, so that the sojourns do not shift when lengths or rates change.
    random = np.random.default_rng([seed, 1])
    state = int(random.random() < mean_burst_s / (mean_calm_s + mean_burst_s))
    segments: list[Segment] = []
    elapsed = 0.0
    while elapsed < duration_s:
        sojourn = min(float(random.exponential(means[state])), duration_s - elapsed)
        if sojourn > 0:
            segments.append(Segment(sojourn, rates[state]))
        elapsed += sojourn
        state = 1 - state
    trace = piecewise(segments, prompt, output, seed=seed, name="mmpp")
    note = f"{calm_rps:g}/s for {mean_calm_s:g} s and {burst_rps:g}/s for {mean_burst_s:g} s in the mean"
    return replace(trace, history=(f"synthetic mmpp: {note}, {duration_s:g} s in all; seed {seed}",))


def _unit_renewals(until: float, cv: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Renewal times of a unit-rate gamma process in [0, until), from an ordinary (not stationary) start."""
    shape = 1.0 / cv**2
    times = np.zeros(0)
    last = 0.0
    while last < until:
        block = last + np.cumsum(random.gamma(shape, 1.0 / shape, int(until - last) + 16))
        times = np.concatenate((times, block))
        last = float(block[-1])
    renewals: NDArray[np.float64] = times[times < until]
    return renewals
