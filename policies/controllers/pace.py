"""How freely an engine in ``auto`` may use 16 bits: the limits it is sent, from calm to overload.

Within ``auto`` the engine runs a step in 16 bits unless that step would leave a running request behind its
*pace* (mean time per output token) by more than its *debt*, or a prompt waits too long for its first step.
So FP8 is spent on the steps that need it, and one number says how many do:

- the pace is the TPOT limit as long as FP8 could win lost time back, and falls where it could not: the
  slower requests are served the more of them run at once, and the longer every step takes, FP8 steps too.
  It is the largest pace at whose batch a mean FP8 step stays within a share of the limit, the *reserve*;
- the debt is what a request may be behind in passing, where 16 bits alone would soon win it back;
- both widen while requests are met and close in when they are missed: what counts as lost in 16 bits cannot
  be told from outside, so any miss counts. Where misses are frequent a queue is served in FP8 altogether,
  for a second beyond its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.config import Slo
from nestedfp.policies.controllers.facts import Facts, Floats, loaded_step
from nestedfp.policies.latency import LatencyModel, TokenLoad
from nestedfp.policies.protocol import FP8, FP16

STEPS: Final = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
"""Paces to choose from, as shares of the TPOT limit."""
FLOOR: Final = 0.2
"""Pace where even the least of ``STEPS`` leaves no reserve."""
CAUTIOUS_PACE: Final = 0.15
"""Pace in a queue where requests are often missed."""
RESERVE: Final = (0.35, 0.6)
"""Share of the TPOT limit that a mean FP8 step may take, at confidence 0 and 1."""
LARGEST_DEBT_S: Final = 0.25
DEBT_STEPS: Final = 8
EASE: Final = (0.8, 0.4)
"""Debt is allowed below this 16-bit pressure, and in full below the second."""
QUEUE_SHARE: Final = 0.1
AGE_SHARE: Final = 0.2
"""Shares of the TTFT limit: of queued 16-bit prefill, and of waiting, from which on steps are in FP8."""
QUEUE_MEMORY_S: Final = 1.0
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
    reserved: NDArray[np.bool_]
    """Whether any pace leaves the reserve."""


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


def room(facts: Facts, model: LatencyModel, output_tokens: float, confidence: float, slo: Slo) -> Room:
    """Pace and debt of every replica, from the load of the last second or of its window, the higher."""
    fast, slow = model.of(FP8), model.of(FP16)
    prompt_tokens = np.maximum(facts.prompt_tokens, 1.0)
    recent = np.maximum(facts.inflow, facts.prompt_per_s) / prompt_tokens
    arrivals = np.maximum(recent, facts.arrivals) + facts.waiting / prompt_tokens
    arrivals = np.where(facts.prompt_per_s > 0, arrivals, facts.arrivals)
    decode = arrivals * output_tokens
    each = np.where(facts.running > 0, facts.context_each, prompt_tokens + 0.5 * output_tokens)
    batch = np.maximum(facts.running, STEPS[:, None] * slo.tpot_s * decode)
    low, high = RESERVE
    reserve = low + (high - low) * max(0.0, confidence)
    holds = loaded_step(fast, batch, each, arrivals, prompt_tokens) <= reserve * slo.tpot_s
    any_holds: NDArray[np.bool_] = np.any(holds, axis=0)
    pace = np.where(any_holds, STEPS[holds.argmax(axis=0)], FLOOR)
    load = TokenLoad(
        prompt_per_s=arrivals * prompt_tokens,
        decode_per_s=decode,
        context=each,
        prompt_tokens=prompt_tokens,
    )
    none, all_of_it = EASE
    ease = (none - slow.steady_step_s(load) / slo.tpot_s) / (none - all_of_it)
    debt = np.clip(ease, 0.0, 1.0) * max(0.0, confidence)
    return Room(pace, np.floor(debt * DEBT_STEPS) / DEBT_STEPS * LARGEST_DEBT_S, any_holds)


def auto_limits(
    pace: float, debt_s: float, queued_lately: bool, confidence: float, slo: Slo, model: LatencyModel
) -> Mapping[str, float]:
    """The limits sent to one replica; steps of a tenth, so that they change seldom.

    ``pace_s`` and ``debt_s`` as in the module's text, ``queue_tokens`` and ``wait_s`` (of the oldest prompt)
    from which on steps are in FP8, and the terms of a 16-bit step, by which the engine looks ahead. These are
    as configured: corrections would change every limit with every step.
    """
    costs = model.costs[FP16]
    queue_tokens = QUEUE_SHARE * slo.ttft_s / max(costs.token_s, 1e-9)
    if queued_lately and confidence < 0.0:
        cautious = min(pace, 1.0 + confidence * (1.0 - CAUTIOUS_PACE))
        pace, debt_s = round(10 * cautious) / 10, 0.0
        if confidence < -0.5:
            queue_tokens = 1.0
    return {
        "pace_s": max(pace, CAUTIOUS_PACE) * slo.tpot_s,
        "debt_s": debt_s,
        "queue_tokens": float(int(queue_tokens)),
        "wait_s": AGE_SHARE * slo.ttft_s,
        "overhead_s": costs.overhead_s,
        "weights_s": costs.weights_s,
        "token_s": costs.token_s,
        "sequence_s": costs.sequence_s,
    }
