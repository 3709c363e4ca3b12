"""How freely an engine in ``auto`` may use 16 bits: the limits it is sent, from calm to overload.

Within ``auto`` the engine runs a step in 16 bits unless that step would leave a running request behind its
*pace* (mean time per output token) by more than its *debt*, or a prompt waits too long for its first step.
So FP8 is spent on the steps that need it, and a few numbers say how many do:

- the pace is a share of the TPOT limit as long as FP8 could win lost time back, and falls where it could
  not: the slower requests are served the more of them run at once, and the longer every step takes, FP8
  steps too. It falls with the *load*: the engine seconds that the requests of one second take in 16 bits;
- the debt is what a request may be behind in passing. What the pace leaves of the TPOT limit wins it back,
  token by token, so it is bounded by what the shorter of the answers seen lately can win back;
- a step of few tokens is bound by reading the weights: FP8 saves it as much time as a step of some hundred
  tokens, for fewer tokens. So the pace of such steps (``memory_pace_s``) falls further, and their time is
  what prompts are computed in 16 bits with;
- where even the largest such debt is less than one full step, answers are *short*: nothing but what FP8 has
  put them ahead lets a long step run in 16 bits. There all of this falls at less load, the debt to nothing;
- requests that FP8 alone would have met take the debt away, up to the tolerance. They say nothing of the
  batches that 16 bits let grow, which are the load's business;
- where many requests are missed, whatever for, FP8 has nothing to give away: everything is tight;
- a request whose first token is late is lost. It asks for no FP8, and a queue in which all are late does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from nestedfp.policies.config import Slo
from nestedfp.policies.controllers.facts import Facts, Floats
from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16

PASSING_FALLS: Final = (1.3, 1.8)
"""16-bit load from which the pace falls, and at which it is at its least, where the load passes."""
LASTING_FALLS: Final = (1.1, 1.2)
"""The same where it lasts."""
SHORT_FALLS: Final = (0.7, 1.1)
"""The same where answers are short."""
SUSTAINED: Final = (0.8, 0.9)
"""Load over a while from which on it counts as lasting, and at which it does in full."""
SUSTAINED_S: Final = 8.0
LEAST_PACE: Final = 0.5
"""Share of the TPOT limit; what is left of it is the reserve with which an overload is met."""
MEMORY_FALLS: Final = (0.9, 1.1)
"""The loads between which the pace of steps bound by reading the weights falls."""
SHORT_MEMORY_FALLS: Final = (0.7, 0.8)
"""The same, and the debt with it, where answers are short."""
LEAST_MEMORY_PACE: Final = 0.2
"""FP8 itself is no faster, so every such step is in FP8."""
DEBT_STEPS: Final = 16
FP8_OVERLOAD: Final = 1.0
"""FP8 load from which nothing is left to give away."""
RETURN_LOAD: Final = 1.25
"""16-bit load up to which ``auto`` may take over from FP8."""
QUEUE_SHARE: Final = 0.1
AGE_SHARE: Final = 0.2
"""Shares of the TTFT limit: of queued 16-bit prefill, and of waiting, from which on steps are in FP8."""
MEMORY_SHARE: Final = 0.5
"""Part of a replica's arrivals over some seconds that counts even when the last second brought fewer."""
MISSED: Final = (0.05, 0.1)
"""Share of requests missed from which on there is doubt, and from which it is complete."""
DOUBTFUL_PACE: Final = 0.3
"""The largest pace in complete doubt."""
DOUBTFUL_AGE: Final = 0.25
"""Part of the waiting that is allowed there."""
MISS_WINDOWS_S: Final = (10.0, 30.0)
"""Misses are learned within seconds and forgotten slowly, as bursts come in series."""
MOST_MISSED: Final = 0.15
"""More misses than this count as so many, so that they are forgotten within a minute of their end."""
COST_WINDOW_S: Final = 40.0
MOST_COST: Final = 2.0
"""The same for the cost of 16 bits, in tolerances."""


class Misses(NamedTuple):
    """What became of the requests lately."""

    at_s: float = -math.inf
    missed: float = 0.0
    """Share that missed the SLO, for whatever reason."""
    cost: float = 0.5
    """Share that missed it for 16-bit steps, over the tolerance."""

    @property
    def confidence(self) -> float:
        """1 where 16 bits lose no request, 0 at the tolerance, -1 at twice that."""
        return 1.0 - self.cost


class Room(NamedTuple):
    """The freedom of each replica, one row each."""

    pace: Floats
    """Share of the TPOT limit."""
    memory_pace: Floats
    """The same for steps bound by reading the weights; at most ``pace``."""
    debt_s: Floats
    doubt: float
    """How far misses are the rule, from 0 to 1, in tenths."""
    load: Floats
    """Engine seconds that the requests of one second take in 16 bits."""
    fast_load: Floats
    """The same in FP8."""
    offered: float
    """The 16-bit load of what arrived over some seconds, mean of all replicas."""
    short: bool
    """Whether answers are short."""


def watch(
    before: Misses, reports: Sequence[tuple[float, float, float]], tolerance: float, now: float
) -> Misses:
    """What is known after these reports: of each replica the shares missed and missed for 16 bits, and its
    requests per second."""
    weight = missed = cost = 0.0
    for share, lost, rate in reports:
        weight += rate
        missed += share * rate
        cost += lost * rate
    elapsed_s = now - before.at_s
    if weight <= 0.0 or elapsed_s <= 0.0 or math.isinf(elapsed_s):
        return before._replace(at_s=max(now, before.at_s))
    missed, cost = min(MOST_MISSED, missed / weight), min(MOST_COST, cost / weight / tolerance)
    learn_s, forget_s = MISS_WINDOWS_S
    window_s = learn_s if missed > before.missed else forget_s
    elapsed_s = min(elapsed_s, 1.0)
    return Misses(
        now,
        before.missed - math.expm1(-elapsed_s / window_s) * (missed - before.missed),
        before.cost - math.expm1(-elapsed_s / COST_WINDOW_S) * (cost - before.cost),
    )


class Bounds(NamedTuple):
    """The most that may be allowed: settings, and what answers can win back."""

    pace: float
    debt_s: float
    tpot_s: float
    short_output_tokens: float
    """Length that only few answers stay below; 1 where none are known."""


def room(
    facts: Facts, model: LatencyModel, output_tokens: float, misses: Misses, bounds: Bounds, sustained: float
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
    # What the shorter answers are allowed together; the pace leaves some of it.
    allowed_s = bounds.tpot_s * bounds.short_output_tokens
    short = (1.0 - bounds.pace) * allowed_s < _full_step_s(model)
    doubt = float(np.interp(misses.missed, MISSED, (0.0, 1.0)))
    span = SHORT_FALLS if short else _between(PASSING_FALLS, LASTING_FALLS, _part(sustained, SUSTAINED))
    pace = _falling(load, span, bounds.pace, LEAST_PACE)
    pace = np.round(np.minimum(pace, 1.0 - doubt * (1.0 - DOUBTFUL_PACE)), 1)
    memory_span = SHORT_MEMORY_FALLS if short else MEMORY_FALLS
    memory_pace = _falling(load, memory_span, 1.0, LEAST_MEMORY_PACE)
    memory_pace = np.minimum(memory_pace, 1.0 - doubt * (1.0 - LEAST_MEMORY_PACE))
    debt = np.minimum(1.0, (1.0 - pace) * allowed_s / max(bounds.debt_s, 1e-9))
    debt = debt * max(0.0, misses.confidence) * (1.0 - doubt)
    if short:
        debt = _falling(load, memory_span, 1.0, 0.0) * debt
    return Room(
        pace=pace,
        memory_pace=np.round(np.minimum(pace, memory_pace), 1),
        debt_s=np.floor(debt * DEBT_STEPS) / DEBT_STEPS * bounds.debt_s,
        doubt=round(doubt, 1),
        load=load,
        fast_load=fast_load,
        offered=float((facts.arrivals * work_s).mean()),
        short=short,
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


def _full_step_s(model: LatencyModel) -> float:
    """A 16-bit step with as many tokens as the engine takes."""
    return float(model.costs[FP16].step_s(model.chunk_tokens, 1, 0))


def _part(value: float, span: tuple[float, float]) -> float:
    """How far ``value`` has come along ``span``: 0 up to its start, 1 from its end on."""
    return float(np.interp(value, span, (0.0, 1.0)))


def _between(one: tuple[float, float], other: tuple[float, float], part: float) -> tuple[float, float]:
    """The span that lies ``part`` of the way from ``one`` to ``other``."""
    return one[0] + part * (other[0] - one[0]), one[1] + part * (other[1] - one[1])


def _falling(load: Floats, span: tuple[float, float], most: float, least: float) -> Floats:
    """``most`` up to the start of ``span``, ``least`` from its end on."""
    return np.interp(load, span, (most, least))


def auto_limits(
    pace: float, memory_pace: float, debt_s: float, doubt: float, slo: Slo, model: LatencyModel
) -> Mapping[str, float]:
    """The limits sent to one replica; coarse, so that they change seldom.

    ``pace_s``, ``memory_pace_s`` and ``debt_s`` as in the module's text, ``queue_tokens`` and ``wait_s`` (of
    the oldest prompt) from which on steps are in FP8, less of both with ``doubt``, ``late_s``, after which a
    request without a first token is lost, and the terms of a 16-bit step, by which the engine looks ahead.
    These are as configured: corrections would change every limit with every step.
    """
    costs = model.costs[FP16]
    queue_tokens = (1.0 - doubt) * QUEUE_SHARE * slo.ttft_s / max(costs.token_s, 1e-9)
    return {
        "pace_s": pace * slo.tpot_s,
        "memory_pace_s": memory_pace * slo.tpot_s,
        "debt_s": debt_s,
        # At 0 tokens an empty queue would be enough.
        "queue_tokens": max(1.0, float(int(queue_tokens))),
        "wait_s": (1.0 - doubt * (1.0 - DOUBTFUL_AGE)) * AGE_SHARE * slo.ttft_s,
        "late_s": slo.ttft_s,
        "overhead_s": costs.overhead_s,
        "weights_s": costs.weights_s,
        "token_s": costs.token_s,
        "sequence_s": costs.sequence_s,
    }
