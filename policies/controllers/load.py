"""How loaded each replica is, and how many of its requests miss the SLO: what the rungs go by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from nestedfp.policies.controllers.facts import Facts, Floats
from nestedfp.policies.latency import StepCosts

MEMORY_SHARE: Final = 0.5
"""Part of a replica's arrivals over some seconds that counts even when the last second brought fewer."""
MISS_WINDOW_S: Final = 40.0
MOST_MISSED: Final = 2.0
"""More misses than this, in tolerances, count as so many: they are forgotten within a minute of their end."""


def engine_load(facts: Facts, costs: StepCosts, output_tokens: float) -> Floats:
    """Engine seconds, by replica, that the requests of one second take at ``costs``, their queue included.

    Fixed costs of steps are left out, as a loaded engine's steps hold many tokens.
    """
    prompt_tokens = np.maximum(facts.prompt_tokens, 1.0)
    # The router spreads a burst evenly, so that all replicas together tell of it sooner than each alone.
    burst = float(facts.inflow.mean()) / max(float(facts.prompt_per_s.mean()), 1e-9)
    recent = np.where(facts.prompt_per_s > 0, float(facts.arrivals.mean()) * burst, 0.0)
    arrivals = np.maximum(recent, MEMORY_SHARE * facts.arrivals) + facts.waiting / prompt_tokens
    context = np.where(facts.running > 0, facts.context_each, prompt_tokens + 0.5 * output_tokens)
    prompt_s = costs.token_s + 0.5 * prompt_tokens * costs.pair_s
    decode_s = costs.token_s + costs.sequence_s + context * costs.context_token_s
    taken: Floats = arrivals * (prompt_tokens * prompt_s + output_tokens * decode_s)
    return taken


def missed(
    before: float, reports: Sequence[tuple[float, float]], tolerance: float, elapsed_s: float
) -> float:
    """The share of requests that missed the SLO over ``tolerance``, averaged over ``MISS_WINDOW_S``.

    ``reports`` holds of each replica its share and its requests per second.
    """
    weight = sum(rate for _, rate in reports)
    if weight <= 0.0 or elapsed_s <= 0.0:
        return before
    now = min(MOST_MISSED, sum(share * rate for share, rate in reports) / weight / tolerance)
    return before - math.expm1(-min(elapsed_s, 1.0) / MISS_WINDOW_S) * (now - before)
