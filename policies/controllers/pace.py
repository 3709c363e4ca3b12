"""How freely an engine in ``auto`` may use 16 bits: the limits it is sent, from calm to overload.

Within ``auto`` the engine runs a step in 16 bits unless that step would leave a running request behind its
*pace* (mean time per output token) by more than its *debt*, or a prompt waits too long for its first step.
So FP8 is spent on the steps that need it, and one number says how many do:

- the pace is the TPOT limit as long as FP8 could win lost time back, and falls where it could not: the
  slower requests are served the more of them run at once, and the longer every step takes, FP8 steps too.
  It falls with the *load*: the engine seconds that the requests of one second take in 16 bits;
- the debt is what a request may be behind in passing, where 16 bits would win it back; it falls with the
  load, and while requests are missed. What was lost because of 16 bits cannot be told from outside,
  so any miss counts;
- where misses are frequent, the pace is bounded whatever the load, and a queue is served in FP8 altogether,
  and for a second beyond its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.config import Slo
from nestedfp.policies.controllers.facts import Facts, Floats
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16

PACE_FALLS: Final = (1.0, 1.4)
"""16-bit load from which the pace falls, and at which it is at its least."""
LEAST_PACE: Final = 0.2
"""Share of the TPOT limit; where FP8 itself is no faster, every step that decodes is in FP8."""
DEBT_STEPS: Final = 16
DEBT_FALLS: Final = (0.9, 1.8)
"""16-bit load up to which the whole debt is allowed, and from which none is."""
DOUBTFUL_PACE: Final = 0.45
"""Largest pace at a confidence of -1."""
FP8_OVERLOAD: Final = 1.0
"""FP8 load from which nothing is left to give away."""
CAUTIOUS_PACE: Final = 0.1
"""Pace in a queue where requests are often missed."""
QUEUE_SHARE: Final = 0.1
AGE_SHARE: Final = 0.2
"""Shares of the TTFT limit: of queued 16-bit prefill, and of waiting, from which on steps are in FP8."""
HOPELESS: Final = -0.75
"""Confidence below which a queue is served in FP8 and nothing else: FP8 alone misses requests there."""
CAUTIOUS_AGE: Final = 0.25
"""Part of that waiting which is allowed in a queue where requests are often missed."""
QUEUE_MEMORY_S: Final = 1.0
MEMORY_SHARE: Final = 0.5
"""Part of a replica's arrivals over some seconds that counts even when the last second brought fewer."""
MISS_WINDOW_S: Final = 10.0


class Confidence(NamedTuple):
    """How far the SLO is met: 1 where no request is missed, 0 at the tolerance, -1 at twice that."""

    at_s: float = -math.inf
    missed: float = 0.0
    value: float = 0.5


class Room(NamedTuple):
    """The freedom of each replica, one row each."""

    pace: Floats
    """Share of the TPOT limit."""
    debt_s: Floats
    overloaded: NDArray[np.bool_]
    """Whether even FP8 has nothing to spare."""


def watch(before: Confidence, missed: list[tuple[float, float]], tolerance: float, now: float) -> Confidence:
    """The confidence after these reports: (miss share, requests per second) of each replica that knows."""
    weight = sum(rate for _, rate in missed)
    elapsed_s = now - before.at_s
    if weight <= 0.0 or elapsed_s <= 0.0:
        return before._replace(at_s=max(now, before.at_s))
    if math.isinf(elapsed_s):
        return Confidence(now, 0.5 * tolerance, 0.5)
    share = min(1.0, sum(share * rate for share, rate in missed) / weight)
    blend = -math.expm1(-min(elapsed_s, 1.0) / MISS_WINDOW_S)
    average = before.missed + blend * (share - before.missed)
    return Confidence(now, average, max(-1.0, min(1.0, 1.0 - average / tolerance)))


def room(
    facts: Facts, model: LatencyModel, output_tokens: float, confidence: float, largest_debt_s: float
) -> Room:
    """Pace and debt of every replica, from the load of the present moment."""
    prompt_tokens = np.maximum(facts.prompt_tokens, 1.0)
    # The router spreads a burst evenly, so that all replicas together tell of it sooner than each alone.
    burst = float(facts.inflow.mean()) / max(float(facts.prompt_per_s.mean()), 1e-9)
    recent = np.where(facts.prompt_per_s > 0, float(facts.arrivals.mean()) * burst, 0.0)
    arrivals = np.maximum(recent, MEMORY_SHARE * facts.arrivals) + facts.waiting / prompt_tokens
    context = np.where(facts.running > 0, facts.context_each, prompt_tokens + 0.5 * output_tokens)
    load = arrivals * _work_s(model.of(FP16), prompt_tokens, output_tokens, context)
    fast_load = arrivals * _work_s(model.of(FP8), prompt_tokens, output_tokens, context)
    pace = np.clip(1.0 - (1.0 - LEAST_PACE) * _rise(load, PACE_FALLS), LEAST_PACE, 1.0)
    debt = (1.0 - np.clip(_rise(load, DEBT_FALLS), 0.0, 1.0)) * max(0.0, confidence)
    overloaded: NDArray[np.bool_] = np.greater_equal(fast_load, FP8_OVERLOAD)
    return Room(
        pace=np.round(pace, 1),
        debt_s=np.floor(debt * DEBT_STEPS) / DEBT_STEPS * largest_debt_s,
        overloaded=overloaded,
    )


def _work_s(costs: StepCosts, prompt_tokens: Floats, output_tokens: float, context: Floats) -> Floats:
    """Engine seconds that one request takes, fixed costs of steps left out."""
    decode_s = costs.token_s + costs.sequence_s + context * costs.context_token_s
    prompt_s = costs.token_s + 0.5 * prompt_tokens * costs.pair_s
    work: Floats = prompt_tokens * prompt_s + output_tokens * decode_s
    return work


def _rise(load: Floats, span: tuple[float, float]) -> Floats:
    """How far ``load`` has come along ``span``: 0 at its start, 1 at its end."""
    low, high = span
    rise: Floats = (load - low) / (high - low)
    return rise


def auto_limits(
    pace: float, debt_s: float, queued_lately: bool, confidence: float, slo: Slo, model: LatencyModel
) -> Mapping[str, float]:
    """The limits sent to one replica; steps of a tenth, so that they change seldom.

    ``pace_s`` and ``debt_s`` as in the module's text, ``queue_tokens`` and ``wait_s`` (of the oldest prompt)
    from which on steps are in FP8, and the terms of a 16-bit step, by which the engine looks ahead. These are
    as configured: corrections would change every limit with every step.
    """
    costs = model.costs[FP16]
    confidence = round(10 * confidence) / 10
    wait_s = AGE_SHARE * slo.ttft_s
    queue_tokens = QUEUE_SHARE * slo.ttft_s / max(costs.token_s, 1e-9)
    if confidence < 0.0:
        pace = min(pace, round(10 * (1.0 + confidence * (1.0 - DOUBTFUL_PACE))) / 10)
    if queued_lately and confidence < 0.0:
        cautious = min(pace, 1.0 + confidence * (1.0 - CAUTIOUS_PACE))
        pace, debt_s = round(10 * cautious) / 10, 0.0
        queue_tokens = 0.0 if confidence < HOPELESS else queue_tokens * (1.0 + confidence)
        wait_s *= 1.0 + confidence * (1.0 - CAUTIOUS_AGE)
    return {
        "pace_s": max(pace, CAUTIOUS_PACE) * slo.tpot_s,
        "debt_s": debt_s,
        "queue_tokens": float(int(queue_tokens)),
        "wait_s": wait_s,
        "overhead_s": costs.overhead_s,
        "weights_s": costs.weights_s,
        "token_s": costs.token_s,
        "sequence_s": costs.sequence_s,
    }
