"""How freely an engine in ``auto`` may use 16 bits: the limits it is sent, from calm to overload.

Within ``auto`` the engine runs a step in 16 bits unless that step would leave a running request behind its
*pace* (mean time per output token) by more than its *debt*, or a prompt waits too long for its first step.
So FP8 is spent on the steps that need it, and a few numbers say how many do:

- the pace is the TPOT limit as long as FP8 could win lost time back, and falls where it could not: the
  slower requests are served the more of them run at once, and the longer every step takes, FP8 steps too.
  It falls with the *load*: the engine seconds that the requests of one second take in 16 bits;
- a step of few tokens is bound by reading the weights: FP8 saves it as much time as a step of some hundred
  tokens, for fewer tokens. So the pace of such steps (``memory_pace_s``) falls earlier and further, and
  their time is what prompts are computed in 16 bits with;
- the debt is what a request may be behind in passing, where 16 bits would win it back; it falls with the
  load, and while requests are missed. What was lost because of 16 bits cannot be told from outside,
  so any miss counts;
- where misses are frequent, the pace is bounded whatever the load; where they are the rule, a queue is served
  in FP8 altogether, and for a second beyond its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np

from nestedfp.policies.config import Slo
from nestedfp.policies.controllers.facts import Facts, Floats
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16

PACE_FALLS: Final = 1.0
"""16-bit load from which the pace falls."""
PACE_LEAST: Final = (1.8, 1.2)
"""16-bit load at which the pace is at its least: where the load passes, and where it lasts."""
SUSTAINED: Final = (0.8, 0.9)
"""Load over a while from which on it counts as lasting, and at which it does in full."""
SUSTAINED_S: Final = 8.0
LEAST_PACE: Final = 0.5
"""Share of the TPOT limit; what is left of it is the reserve with which an overload is met."""
MEMORY_FALLS: Final = (0.9, 1.1)
"""The same loads for the pace of steps bound by reading the weights."""
LEAST_MEMORY_PACE: Final = 0.2
"""FP8 itself is no faster, so every such step is in FP8."""
DEBT_STEPS: Final = 16
DEBT_FALLS: Final = (0.9, 2.4)
"""16-bit load up to which the whole debt is allowed, and from which none is."""
FP8_OVERLOAD: Final = 1.0
"""FP8 load from which nothing is left to give away."""
RETURN_LOAD: Final = 1.25
"""16-bit load up to which ``auto`` may take over from FP8."""
CAUTIOUS_PACE: Final = 0.1
"""Pace in a queue where requests are often missed."""
QUEUE_SHARE: Final = 0.1
AGE_SHARE: Final = 0.2
"""Shares of the TTFT limit: of queued 16-bit prefill, and of waiting, from which on steps are in FP8."""
LEAST_CONFIDENCE: Final = -4.0
"""More misses than this count as so many, so that confidence returns within seconds of their end."""
DOUBTFUL_PACE: Final = ((LEAST_CONFIDENCE, -1.0, 0.0), (0.2, 0.45, 1.0))
"""Confidences, and the largest pace at each."""
QUEUE_DOUBT: Final = (-1.0, LEAST_CONFIDENCE)
"""Confidence from which on a queue is doubtful, and at which it is in full."""
HOPELESS: Final = 0.75
"""Doubt of a queue from which it is served in FP8 and nothing else: FP8 alone misses requests there."""
CAUTIOUS_AGE: Final = 0.25
"""Part of that waiting which is allowed in a queue where requests are often missed."""
QUEUE_MEMORY_S: Final = 1.0
MEMORY_SHARE: Final = 0.5
"""Part of a replica's arrivals over some seconds that counts even when the last second brought fewer."""
MISS_WINDOW_S: Final = 10.0


class Confidence(NamedTuple):
    """How far the SLO is met: 1 where no request is missed, 0 at the tolerance, -1 at twice that, and on."""

    at_s: float = -math.inf
    missed: float = 0.0
    value: float = 0.5


class Room(NamedTuple):
    """The freedom of each replica, one row each."""

    pace: Floats
    """Share of the TPOT limit."""
    memory_pace: Floats
    """The same for steps bound by reading the weights; at most ``pace``."""
    debt_s: Floats
    load: Floats
    """Engine seconds that the requests of one second take in 16 bits."""
    fast_load: Floats
    """The same in FP8."""
    offered: float
    """The 16-bit load of what arrived over some seconds, mean of all replicas."""


def watch(before: Confidence, missed: list[tuple[float, float]], tolerance: float, now: float) -> Confidence:
    """The confidence after these reports: (miss share, requests per second) of each replica that knows."""
    weight = sum(rate for _, rate in missed)
    elapsed_s = now - before.at_s
    if weight <= 0.0 or elapsed_s <= 0.0:
        return before._replace(at_s=max(now, before.at_s))
    if math.isinf(elapsed_s):
        return Confidence(now, 0.5 * tolerance, 0.5)
    share = sum(share * rate for share, rate in missed) / weight
    share = min((1.0 - LEAST_CONFIDENCE) * tolerance, share)
    blend = -math.expm1(-min(elapsed_s, 1.0) / MISS_WINDOW_S)
    average = before.missed + blend * (share - before.missed)
    return Confidence(now, average, max(LEAST_CONFIDENCE, min(1.0, 1.0 - average / tolerance)))


def room(
    facts: Facts,
    model: LatencyModel,
    output_tokens: float,
    confidence: float,
    largest_debt_s: float,
    sustained: float,
) -> Room:
    """Pace and debt of every replica, from the load of the present moment.

    ``sustained`` is the 16-bit load averaged over ``SUSTAINED_S``. Where it shows that the load lasts, a
    reserve is kept, since one more rise would find batches too large for FP8.
    """
    prompt_tokens = np.maximum(facts.prompt_tokens, 1.0)
    # The router spreads a burst evenly, so that all replicas together tell of it sooner than each alone.
    burst = float(facts.inflow.mean()) / max(float(facts.prompt_per_s.mean()), 1e-9)
    recent = np.where(facts.prompt_per_s > 0, float(facts.arrivals.mean()) * burst, 0.0)
    arrivals = np.maximum(recent, MEMORY_SHARE * facts.arrivals) + facts.waiting / prompt_tokens
    context = np.where(facts.running > 0, facts.context_each, prompt_tokens + 0.5 * output_tokens)
    work_s = _work_s(model.of(FP16), prompt_tokens, output_tokens, context)
    load = arrivals * work_s
    fast_load = arrivals * _work_s(model.of(FP8), prompt_tokens, output_tokens, context)
    least_at = float(np.interp(sustained, SUSTAINED, PACE_LEAST))
    pace = _falling(load, (PACE_FALLS, least_at), LEAST_PACE)
    memory_pace = _falling(load, MEMORY_FALLS, LEAST_MEMORY_PACE)
    debt = (1.0 - np.clip(_rise(load, DEBT_FALLS), 0.0, 1.0)) * max(0.0, confidence)
    return Room(
        pace=np.round(pace, 1),
        memory_pace=np.round(np.minimum(pace, memory_pace), 1),
        debt_s=np.floor(debt * DEBT_STEPS) / DEBT_STEPS * largest_debt_s,
        load=load,
        fast_load=fast_load,
        offered=float((facts.arrivals * work_s).mean()),
    )


def sustained_load(before: float, offered: float, elapsed_s: float) -> float:
    """The load averaged over ``SUSTAINED_S``, after ``elapsed_s`` at ``offered``."""
    return before - math.expm1(-max(0.0, elapsed_s) / SUSTAINED_S) * (offered - before)


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


def _falling(load: Floats, span: tuple[float, float], least: float) -> Floats:
    """1 up to the start of ``span``, ``least`` from its end on."""
    share: Floats = np.clip(1.0 - (1.0 - least) * _rise(load, span), least, 1.0)
    return share


def auto_limits(
    pace: float,
    memory_pace: float,
    debt_s: float,
    queued_lately: bool,
    confidence: float,
    slo: Slo,
    model: LatencyModel,
) -> Mapping[str, float]:
    """The limits sent to one replica; steps of a tenth, so that they change seldom.

    ``pace_s``, ``memory_pace_s`` and ``debt_s`` as in the module's text, ``queue_tokens`` and ``wait_s`` (of
    the oldest prompt) from which on steps are in FP8, and the terms of a 16-bit step, by which the engine
    looks ahead. These are as configured: corrections would change every limit with every step.
    """
    costs = model.costs[FP16]
    start, end = QUEUE_DOUBT
    queue_doubt = round(10 * min(1.0, max(0.0, (confidence - start) / (end - start)))) / 10
    wait_s = AGE_SHARE * slo.ttft_s
    queue_tokens = QUEUE_SHARE * slo.ttft_s / max(costs.token_s, 1e-9)
    pace = min(pace, round(10 * float(np.interp(confidence, *DOUBTFUL_PACE))) / 10)
    if queued_lately and queue_doubt > 0.0:
        cautious = min(pace, 1.0 - queue_doubt * (1.0 - CAUTIOUS_PACE))
        pace, debt_s = round(10 * cautious) / 10, 0.0
        queue_tokens = 0.0 if queue_doubt > HOPELESS else queue_tokens * (1.0 - queue_doubt)
        wait_s *= 1.0 - queue_doubt * (1.0 - CAUTIOUS_AGE)
    pace = max(pace, CAUTIOUS_PACE)
    return {
        "pace_s": pace * slo.tpot_s,
        "memory_pace_s": min(pace, memory_pace) * slo.tpot_s,
        "debt_s": debt_s,
        "queue_tokens": float(int(queue_tokens)),
        "wait_s": wait_s,
        "overhead_s": costs.overhead_s,
        "weights_s": costs.weights_s,
        "token_s": costs.token_s,
        "sequence_s": costs.sequence_s,
    }
