"""What the reports say, as columns: one row a replica, with the running averages a forecast needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.latency import LatencyModel, StepCosts
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.snapshot import ReplicaView

Floats = NDArray[np.float64]

INFLOW_WINDOW_S: Final = 1.0
LOAD_WINDOW_S: Final = 2.0
OUTPUT_WINDOW_S: Final = 30.0
FIRST_OUTPUT_TOKENS: Final = 100.0
"""Mean output length assumed until requests have been seen."""
LONGEST_OUTPUT_TOKENS: Final = 5000.0


class Seen(NamedTuple):
    """What is remembered of the replicas: arrays with one place each, by ``places``."""

    at_s: float
    places: Mapping[str, int]
    waiting: Floats
    """Queued prompt tokens."""
    fp16: Floats
    fp8: Floats
    """Tokens executed since the boot."""
    inflow: Floats
    """Prompt tokens arriving per second, averaged over about a second."""
    running: Floats
    """Running requests, averaged over about two seconds."""
    decode: Floats
    """Output tokens per second, averaged over about two seconds; NaN where steps are not timed."""
    only_fp16: NDArray[np.bool_]
    only_fp8: NDArray[np.bool_]
    """Whether all steps since the decision before were of that precision."""


class Facts(NamedTuple):
    """The reports as columns, one row a replica. Rates are per second."""

    running: Floats
    waiting: Floats
    """Prompt tokens in the queue."""
    oldest_s: Floats
    context: Floats
    """KV tokens of the running requests together."""
    arrivals: Floats
    """Requests, over the replica's window of some seconds."""
    prompt_per_s: Floats
    """Prompt tokens, over the same window."""
    inflow: Floats
    """Prompt tokens, over the last second."""
    decode_per_s: Floats
    """Output tokens given, measured over two seconds; where steps are not timed, as the model has it."""

    @property
    def prompt_tokens(self) -> Floats:
        """Mean prompt of the requests that arrive."""
        mean: Floats = self.prompt_per_s / np.maximum(self.arrivals, 1e-9)
        return mean

    @property
    def context_each(self) -> Floats:
        """Mean KV tokens of a running request."""
        mean: Floats = self.context / np.maximum(self.running, 1.0)
        return mean


class Columns(NamedTuple):
    """The signals of the reports as they are, one row a replica."""

    running: Floats
    waiting: Floats
    oldest_s: Floats
    context: Floats
    arrivals: Floats
    prompt_per_s: Floats
    step_s: Floats
    fp16: Floats
    fp8: Floats


def columns_of(views: Sequence[ReplicaView]) -> Columns:
    """The columns of these reports; what is unknown is 0."""
    rows = [
        (
            report.running,
            report.waiting_prompt_tokens,
            report.oldest_waiting_s,
            report.context_tokens or 0,
            report.arrivals_per_s,
            report.arriving_prompt_tokens_per_s or 0.0,
            report.step_time_s or 0.0,
            report.tokens_fp16,
            report.tokens_fp8,
        )
        for report in [view.report for view in views]
    ]
    return Columns(*np.array(rows, dtype=np.float64).T)


def see(ids: Sequence[str], columns: Columns, before: Seen | None, now: float) -> Seen:
    """The running averages after these reports; ``ids`` names the rows.

    A replica not seen before starts its averages with what it reports.
    """
    places = {replica_id: place for place, replica_id in enumerate(ids)}
    with np.errstate(divide="ignore", invalid="ignore"):
        # Sampled in time, batch over step length averages to the tokens given per second, however steps vary.
        given = np.where(columns.step_s > 0, columns.running / columns.step_s, np.nan)
    inflow, running = columns.prompt_per_s, columns.running
    nothing = np.zeros(len(ids), dtype=np.bool_)
    only_fp16 = only_fp8 = nothing
    if before is not None and now > before.at_s:
        elapsed_s = now - before.at_s
        place = np.array([before.places.get(replica_id, -1) for replica_id in ids])
        known = place >= 0
        in_fp16 = np.maximum(0.0, columns.fp16 - before.fp16[place])
        in_fp8 = np.maximum(0.0, columns.fp8 - before.fp8[place])
        # What arrived is what was executed and what the queue grew by; decode tokens are few beside a
        # burst's prompts.
        grown = columns.waiting - before.waiting[place]
        arrived = np.maximum(0.0, (in_fp16 + in_fp8 + grown) / elapsed_s)
        fast, slow = -math.expm1(-elapsed_s / INFLOW_WINDOW_S), -math.expm1(-elapsed_s / LOAD_WINDOW_S)
        inflow = np.where(known, before.inflow[place] + fast * (arrived - before.inflow[place]), inflow)
        running = np.where(known, before.running[place] + slow * (running - before.running[place]), running)
        averaged = before.decode[place] + slow * (given - before.decode[place])
        given = np.where(known & ~np.isnan(averaged), averaged, given)
        only_fp16 = known & (in_fp16 > 0) & (in_fp8 == 0)
        only_fp8 = known & (in_fp8 > 0) & (in_fp16 == 0)
    return Seen(
        at_s=now,
        places=places,
        waiting=columns.waiting,
        fp16=columns.fp16,
        fp8=columns.fp8,
        inflow=inflow,
        running=running,
        decode=given,
        only_fp16=only_fp16,
        only_fp8=only_fp8,
    )


def gather(columns: Columns, modes: Sequence[str], seen: Seen, model: LatencyModel) -> Facts:
    """The facts of these reports; ``modes`` is the mode ordered of each replica."""
    decode = seen.decode
    untimed = np.isnan(decode)
    if untimed.any():
        prompt_tokens = columns.prompt_per_s / np.maximum(columns.arrivals, 1e-9)
        each = columns.context / np.maximum(columns.running, 1.0)
        fast = np.array([mode == FP8 for mode in modes])
        for mode, chosen in ((FP8, fast), (FP16, ~fast)):
            step = loaded_step(model.of(mode), seen.running, each, columns.arrivals, prompt_tokens)
            decode = np.where(untimed & chosen, seen.running / step, decode)
    return Facts(
        running=columns.running,
        waiting=columns.waiting,
        oldest_s=columns.oldest_s,
        context=columns.context,
        arrivals=columns.arrivals,
        prompt_per_s=columns.prompt_per_s,
        inflow=seen.inflow,
        decode_per_s=decode,
    )


def loaded_step(
    costs: StepCosts, running: Floats, context_each: Floats, prompts_per_s: Floats, prompt_tokens: Floats
) -> Floats:
    """Mean step time at a known batch: the steady step with the number of requests given, not derived."""
    linear = np.maximum(costs.weights_s, running * costs.token_s)
    base = costs.overhead_s + linear + running * (costs.sequence_s + context_each * costs.context_token_s)
    lump_s = np.maximum(0.0, (running + prompt_tokens) * costs.token_s - linear)
    lump_s = lump_s + 0.5 * prompt_tokens * prompt_tokens * costs.pair_s
    step: Floats = base / (1.0 - np.minimum(0.99, prompts_per_s * lump_s))
    return step


def mean_output(before: float, facts: Facts, elapsed_s: float) -> float:
    """Mean output length of the cluster's requests, averaged over half a minute.

    By Little's law: tokens given per second over requests arriving per second.
    """
    arrivals = float(facts.arrivals.sum())
    given = float(facts.decode_per_s.sum())
    if arrivals <= 0.0 or given <= 0.0 or elapsed_s <= 0.0:
        return before
    present = min(LONGEST_OUTPUT_TOKENS, max(1.0, given / arrivals))
    return before - math.expm1(-min(elapsed_s, 1.0) / OUTPUT_WINDOW_S) * (present - before)
