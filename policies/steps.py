"""What one step of an engine may be: its precision, and how many tokens it takes. Pure.

Two deadlines stand behind every step. A request that decodes is to get its next token before it falls behind
its *pace*, and a prompt its first token within the TTFT limit. :func:`choose` takes 16 bits where both can be
met, and cuts the step to what 16 bits compute in time:

- the request that is furthest behind its pace says how long the step may take. As many prompt tokens are
  taken as fit into that time. Where those are fewer than ``least_tokens``, the step is in FP8: ever smaller
  steps would spend their time on what a step costs at any size;
- for every prompt, in its order, the time of its first token is predicted as if the engine served all that
  is before it in FP8 from the next step on. A prompt that would be late even so cannot wait for 16 bits.

Both rules follow the batch. What it takes FP8 at any size of the step says how much of a reserve it needs.
A light batch may use the whole TPOT limit, and its prompts wait longer for 16 bits. A heavy one is kept to
the pace: its answers are long or many, and what they are ahead is what a burst meets. While the batch is not
heavy, a prompt that FP8 would give its first token far too late counts as lost already: a queue of such
prompts is served in 16 bits until FP8 would serve an arrival nearly in time. Under a heavy batch that queue
might stay for good.

So FP8 is taken at the last moment at which it still helps, by the step. An FP8 step is cut in the same way,
to the time that the SLO itself leaves, since a step of some thousand tokens takes FP8 longer than one token
may take, too. What is late already is lost and asks for nothing, nor does a batch that nearly fills the KV
cache wait: requests that end sooner free it.

The simulator compiles these functions, vLLM's scheduler calls them as they are. So they take lists or
arrays, and call nothing but each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[np.float64]

MARGIN: Final = 0.95
"""Part of the time left that a step is planned to take: steps vary by a few per cent."""
PACE, FIRST_TOKEN, CACHE, IN_TIME = range(4)
"""Why a step has its precision: for the pace, a first token, the KV cache; or in 16 bits, all is in time."""


class StepTerms(NamedTuple):
    """The cost terms of a step in one precision, seconds: those of ``policies.latency.StepCosts``."""

    overhead_s: float
    weights_s: float
    token_s: float
    sequence_s: float
    context_token_s: float
    pair_s: float


class StepBounds(NamedTuple):
    """What steps are held to."""

    pace_s: float
    """Mean time per output token that a heavy batch is kept to in 16 bits; at most ``tpot_s``, to which a
    light one is."""
    tpot_s: float
    """The SLO's, to which FP8 steps are cut."""
    ttft_s: float
    """Predicted time to the first token from which on a prompt cannot wait, before a heavy batch."""
    late_s: float
    """Age from which on a request without a first token is lost."""
    least_tokens: float
    """Prompt tokens below which a step is not cut; infinite: no step is cut."""
    light_ttft_s: float
    """``ttft_s`` before a light batch."""
    given_up_s: float
    """Predicted time to the first token from which on a prompt counts as lost, unless the batch is heavy."""
    light_s: float
    """What a batch takes FP8 at any size of the step, up to which it is light."""
    heavy_s: float
    """From which on it is heavy; 0: every batch is. In between, both bounds change evenly."""


_PRECISIONS: Final = ("fp16", "fp8")
LIMIT_NAMES: Final = (
    *StepBounds._fields,
    *(f"{precision}_{term}" for precision in _PRECISIONS for term in StepTerms._fields),
)
"""The names under which bounds and terms are sent with a mode: ``pace_s``, ``fp16_token_s``."""


def to_limits(bounds: StepBounds, terms: Mapping[str, StepTerms]) -> dict[str, float]:
    """Bounds, and the terms of ``fp16`` and ``fp8``, by the names they are sent under."""
    values = (*bounds, *(value for precision in _PRECISIONS for value in terms[precision]))
    return dict(zip(LIMIT_NAMES, values, strict=True))


def from_limits(limits: Mapping[str, float]) -> tuple[StepBounds, dict[str, StepTerms]]:
    """What :func:`to_limits` was given; KeyError for a name that lacks."""
    bounds = StepBounds(*(limits[name] for name in StepBounds._fields))
    terms = {
        precision: StepTerms(*(limits[f"{precision}_{term}"] for term in StepTerms._fields))
        for precision in _PRECISIONS
    }
    return bounds, terms


class StepWork(NamedTuple):
    """What there is to do, as the scheduler sees it before it composes a step."""

    pace_left_s: float
    """How long the step may take until the next request falls behind its pace: of all decoding requests that
    are not lost the least of ``made * pace_s - since_s``, where ``made`` counts the tokens after the first,
    that of this step included, and ``since_s`` is the time from the first to the start of the step. With
    the pace of the batch (:func:`pace_of`); infinite without any."""
    slo_left_s: float
    """The same with ``tpot_s``, of the requests that have not missed it already."""
    prompt_tokens: Numbers
    """Of each prompt that is not computed yet, the batch's first, then the queue's: what is left of it."""
    prompt_context: Numbers
    """Of the same: tokens that are computed already."""
    prompt_age_s: Numbers
    """Of the same: seconds from its arrival to the start of the step."""
    decodes: int
    """Requests that decode, lost ones too."""
    requests: int
    """Requests in the batch."""
    context: float
    """KV tokens of the batch."""
    most_tokens: int
    """What the engine takes in a step at most."""
    crowded: bool
    """Whether the KV cache is nearly full."""


def batch_s(terms: StepTerms, requests: int, context: float) -> float:
    """What ``requests`` with ``context`` KV tokens take at any size of the step, weights apart."""
    return terms.overhead_s + requests * terms.sequence_s + context * terms.context_token_s


def heaviness(bounds: StepBounds, fast: StepTerms, requests: int, context: float) -> float:
    """From 0, a light batch, to 1, a heavy one."""
    taken_s = batch_s(fast, requests, context)
    if taken_s >= bounds.heavy_s:
        return 1.0
    if taken_s <= bounds.light_s:
        return 0.0
    return (taken_s - bounds.light_s) / (bounds.heavy_s - bounds.light_s)


def between(light: float, heavy: float, weight: float) -> float:
    """A bound that is ``light`` at a weight of 0 and ``heavy`` at 1."""
    return heavy if weight >= 1.0 else light + (heavy - light) * weight


def pace_of(bounds: StepBounds, fast: StepTerms, requests: int, context: float) -> float:
    """The mean time per output token that this batch is kept to in 16 bits."""
    return between(bounds.tpot_s, bounds.pace_s, heaviness(bounds, fast, requests, context))


def fitting(seconds: float, terms: StepTerms, work: StepWork) -> float:
    """How many tokens a step of ``seconds`` computes, decoding requests first; at most ``most_tokens``.

    0 where the time is too short for these requests, or for reading the weights.
    """
    left_s = seconds - batch_s(terms, work.requests, work.context)
    tokens = float(work.decodes)
    if left_s < max(terms.weights_s, tokens * terms.token_s):
        return 0.0
    left_s -= tokens * terms.token_s
    for prompt in range(len(work.prompt_tokens)):
        if tokens >= work.most_tokens:
            break
        wanted = work.prompt_tokens[prompt]
        each_s = terms.token_s + terms.pair_s * (work.prompt_context[prompt] + 0.5 * wanted)
        if wanted * each_s >= left_s:
            return min(float(work.most_tokens), tokens + left_s / max(each_s, 1e-12))
        tokens += wanted
        left_s -= wanted * each_s
    # All there is fits, and what arrives until the step is composed may join.
    return float(work.most_tokens)


def cut(bounds: StepBounds, terms: StepTerms, work: StepWork) -> int:
    """The most tokens that a step may take, whose precision is given: what the SLO leaves time for."""
    tokens = fitting(MARGIN * work.slo_left_s, terms, work)
    return int(min(float(work.most_tokens), max(tokens, work.decodes + bounds.least_tokens)))


def choose(bounds: StepBounds, slow: StepTerms, fast: StepTerms, work: StepWork) -> tuple[int, int, float]:
    """The step that may come next: most tokens, why, and the value behind that.

    It is in 16 bits where the reason is ``IN_TIME``, else in FP8. The value: for ``PACE`` the tokens that 16
    bits would compute in time, for ``FIRST_TOKEN`` the predicted TTFT, else 0.
    """
    if work.crowded:
        return cut(bounds, fast, work), CACHE, 0.0
    wanted = float(work.decodes)
    for prompt in range(len(work.prompt_tokens)):
        wanted += work.prompt_tokens[prompt]
    tokens = fitting(MARGIN * work.pace_left_s, slow, work)
    if tokens < min(wanted, work.decodes + bounds.least_tokens, float(work.most_tokens)):
        return cut(bounds, fast, work), PACE, tokens
    ttft_s = latest_first_token_s(int(tokens), bounds, slow, fast, work)
    weight = heaviness(bounds, fast, work.requests, work.context)
    if ttft_s > between(bounds.light_ttft_s, bounds.ttft_s, weight):
        return cut(bounds, fast, work), FIRST_TOKEN, ttft_s
    return int(tokens), IN_TIME, 0.0


def latest_first_token_s(
    tokens: int, bounds: StepBounds, slow: StepTerms, fast: StepTerms, work: StepWork
) -> float:
    """The longest predicted TTFT of the prompts that are neither lost nor given up, after a 16-bit step of
    ``tokens`` and nothing but FP8 from then on; 0 without any.

    FP8 steps are taken to be full, and their batch to be the present one.
    """
    heavy = heaviness(bounds, fast, work.requests, work.context) >= 1.0
    given_up_s = math.inf if heavy else bounds.given_up_s
    full_s = batch_s(fast, work.requests, work.context) + work.decodes * fast.token_s
    shared_s = full_s / max(1, work.most_tokens - work.decodes)
    end_s = batch_s(slow, work.requests, work.context) + work.decodes * slow.token_s
    room = float(tokens - work.decodes)
    floor_s = slow.weights_s - work.decodes * slow.token_s
    step_s = 0.0
    latest_s = 0.0
    for prompt in range(len(work.prompt_tokens)):
        wanted = work.prompt_tokens[prompt]
        pairs = work.prompt_context[prompt] + 0.5 * wanted
        taken = max(0.0, min(wanted, room))
        room -= taken
        step_s += taken * (slow.token_s + slow.pair_s * pairs)
        end_s += (wanted - taken) * (shared_s + fast.token_s + fast.pair_s * pairs)
        age_s = work.prompt_age_s[prompt]
        ttft_s = age_s + end_s + max(step_s, floor_s)
        if age_s <= bounds.late_s and ttft_s < given_up_s:
            latest_s = max(latest_s, ttft_s)
    return latest_s
