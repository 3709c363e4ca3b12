"""The compiled step loop: continuous batching with chunked prefill, as vLLM's scheduler does it.

A step serves running requests first, oldest first, one token each once their prompt is computed, and gives
what is left of its tokens to prompts: ``chunk_tokens``, or fewer where the mode came with bounds
(``nestedfp.policies.steps``). Where the KV cache is full the youngest running request is preempted: its cache
is dropped and it returns to the head of the queue, to be computed anew. A step that holds a strict request
runs in 16 bits whatever the mode ordered.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from nestedfp.policies import steps
from nestedfp.policies.simulation.compiled import njit
from nestedfp.policies.simulation.routing import route
from nestedfp.policies.simulation.state import (
    TPOT,
    TPOT_AT,
    TTFT,
    TTFT_AT,
    WINDOW,
    Costs,
    Engines,
    Floats,
    Requests,
)
from nestedfp.policies.steps import IN_TIME, StepBounds, StepTerms, StepWork

SHED = -2
NEVER_FITS = -3
AUTO_NUMBER = 2
KV_HIGH = 0.9
"""Share of the KV cache in use from which on ``auto`` takes FP8, as the engine's default has it."""

for _function in (
    steps.batch_s,
    steps.between,
    steps.heaviness,
    steps.fitting,
    steps.latest_first_token_s,
    steps.cut,
):
    register_jitable(_function)
_choose, _cut, _pace_of = njit(steps.choose), njit(steps.cut), njit(steps.pace_of)


@njit
def seed(value: int) -> None:
    """Seed the compiled code's random numbers."""
    np.random.seed(value)


@njit
def advance(until_s: float, following: int, requests: Requests, cluster: Engines, costs: Costs) -> int:
    """Run every event up to ``until_s``; ``following``, the next request to arrive, is returned anew."""
    count = requests.shape[0]
    while True:
        first = cluster.tree[1]
        step_end_s = cluster.replicas[first].step_end_s
        arrival_s = requests[following].arrival_s if following < count else math.inf
        if min(step_end_s, arrival_s) > until_s:
            return following
        if arrival_s <= step_end_s:
            i = arrive(following, requests, cluster, costs.kv_tokens)
            following += 1
            if i >= 0 and cluster.replicas[i].step_end_s == math.inf:
                # An idle engine's next step begins now, with all that arrive now.
                _set_step_end(i, arrival_s, cluster)
        else:
            _finish_step(first, step_end_s, requests, cluster)
            start_step(first, step_end_s, requests, cluster, costs)


@njit
def arrive(r: int, requests: Requests, cluster: Engines, kv_tokens: int) -> int:
    """Queue request ``r`` on a replica and return which; where none takes it, a negative number says why.

    It starts no step: an idle replica waits for :func:`start_step`.
    """
    if requests[r].prompt + requests[r].output > kv_tokens:
        requests[r].replica = NEVER_FITS
        return NEVER_FITS
    i = route(r, requests[r].strict, cluster)
    if i < 0:
        requests[r].replica = SHED
        return SHED
    replica = cluster.replicas[i]
    if replica.waiting_tokens + requests[r].prompt > replica.shed_above:
        requests[r].replica = SHED
        return SHED
    requests[r].replica = i
    replica.arrivals += 1
    replica.arrived_tokens += requests[r].prompt
    if replica.tail < 0:
        replica.head = r
    else:
        requests[replica.tail].next = r
    replica.tail = r
    replica.waiting += 1
    replica.waiting_tokens += requests[r].prompt
    if requests[r].strict:
        replica.strict_waiting += 1
    return i


@njit
def start_step(i: int, now: float, requests: Requests, cluster: Engines, costs: Costs) -> None:
    """Schedule a step on replica ``i`` and set when it ends; with nothing to do the replica goes idle."""
    replica = cluster.replicas[i]
    mode, budget = _bounded(i, now, requests, cluster, costs)
    tokens = 0
    context = 0
    pairs = 0.0
    preempted = False
    k = 0
    while k < replica.running:
        r = cluster.slots[i, k]
        need = requests[r].prompt + requests[r].generated - requests[r].computed
        take = min(need, budget)
        while take > 0 and replica.kv + take > costs.kv_tokens and k < replica.running:
            _preempt_last(i, requests, cluster)
            preempted = True
        if k >= replica.running:
            break
        cluster.scheduled[i, k] = take
        replica.kv += take
        budget -= take
        tokens += take
        if take > 0:
            context += requests[r].computed
        if need > 1:
            pairs += take * (requests[r].computed + 0.5 * take)
        k += 1
    slots = cluster.slots.shape[1]
    while not preempted and budget > 0 and replica.head >= 0 and replica.running < slots:
        r = replica.head
        take = min(requests[r].prompt + requests[r].generated, budget)
        if replica.kv + take > costs.kv_tokens:
            break
        _dequeue(i, requests, cluster)
        k = replica.running
        cluster.slots[i, k] = r
        cluster.scheduled[i, k] = take
        replica.running += 1
        replica.kv += take
        if requests[r].strict:
            replica.strict_running += 1
        budget -= take
        tokens += take
        pairs += 0.5 * take * take
    if tokens == 0:
        _set_step_end(i, math.inf, cluster)
        return
    if replica.strict_running > 0:
        mode = 0
    duration = _step_s(mode, tokens, replica.running, context, pairs, costs)
    if costs.noise > 0:
        duration *= math.exp(costs.noise * np.random.standard_normal())
    if mode != replica.step_mode:
        duration += costs.flip_s
        replica.flips += 1
        replica.step_mode = mode
    replica.step_s = duration
    replica.tokens = tokens
    replica.sequences = replica.running
    replica.context = context
    replica.pairs = pairs
    _set_step_end(i, now + duration, cluster)


@njit
def _step_s(mode: int, tokens: int, sequences: int, context: int, pairs: float, costs: Costs) -> float:
    """Duration of a step by the latency model's formula."""
    return float(
        costs.overhead_s[mode]
        + max(costs.weights_s[mode], tokens * costs.token_s[mode])
        + sequences * costs.sequence_s[mode]
        + context * costs.context_token_s[mode]
        + pairs * costs.pair_s[mode]
    )


@njit
def _bounded(i: int, now: float, requests: Requests, cluster: Engines, costs: Costs) -> tuple[int, int]:
    """Mode of the next step and the most tokens it may take, within the bounds that came with the mode."""
    replica = cluster.replicas[i]
    mode = 0 if replica.strict_running > 0 else replica.mode
    if replica.tpot_s == math.inf:
        return (0 if mode == AUTO_NUMBER else mode), costs.chunk_tokens
    bounds = StepBounds(
        replica.pace_s,
        replica.tpot_s,
        replica.ttft_s,
        replica.late_s,
        replica.least_tokens,
        replica.light_ttft_s,
        replica.given_up_s,
        replica.light_s,
        replica.heavy_s,
    )
    work = _work(i, now, bounds, requests, cluster, costs)
    if mode != AUTO_NUMBER:
        return mode, _cut(bounds, _terms(mode, costs), work)
    tokens, why, _ = _choose(bounds, _terms(0, costs), _terms(1, costs), work)
    return (0 if why == IN_TIME else 1), tokens


@njit
def _work(
    i: int, now: float, bounds: StepBounds, requests: Requests, cluster: Engines, costs: Costs
) -> StepWork:
    """What replica ``i`` has to do. A preempted request is computed anew like a prompt that no one awaits."""
    replica = cluster.replicas[i]
    prompts = np.empty((3, replica.running + replica.waiting))
    context = 0
    for k in range(replica.running):
        context += requests[cluster.slots[i, k]].computed
    pace_s = _pace_of(bounds, _terms(1, costs), replica.running, float(context))
    decodes = count = 0
    pace_left_s = slo_left_s = math.inf
    for k in range(replica.running):
        r = cluster.slots[i, k]
        made = requests[r].generated
        if requests[r].prompt + made - requests[r].computed > 1 or made == 0:
            _note_prompt(prompts, count, r, now, requests)
            count += 1
            continue
        decodes += 1
        if requests[r].first_s - requests[r].arrival_s <= bounds.late_s:
            since_s = now - requests[r].first_s
            pace_left_s = min(pace_left_s, made * pace_s - since_s)
            if made * bounds.tpot_s > since_s:
                slo_left_s = min(slo_left_s, made * bounds.tpot_s - since_s)
    r = replica.head
    while r >= 0:
        _note_prompt(prompts, count, r, now, requests)
        count += 1
        r = requests[r].next
    return StepWork(
        pace_left_s,
        slo_left_s,
        prompts[0, :count],
        prompts[1, :count],
        prompts[2, :count],
        decodes,
        replica.running,
        float(context),
        costs.chunk_tokens,
        replica.kv >= KV_HIGH * costs.kv_tokens,
    )


@njit
def _note_prompt(prompts: Floats, place: int, r: int, now: float, requests: Requests) -> None:
    computed = requests[r].computed
    prompts[0, place] = requests[r].prompt + requests[r].generated - computed
    prompts[1, place] = computed
    prompts[2, place] = now - requests[r].arrival_s if requests[r].generated == 0 else -math.inf


@njit
def _terms(mode: int, costs: Costs) -> StepTerms:
    return StepTerms(
        costs.overhead_s[mode],
        costs.weights_s[mode],
        costs.token_s[mode],
        costs.sequence_s[mode],
        costs.context_token_s[mode],
        costs.pair_s[mode],
    )


@njit
def _finish_step(i: int, now: float, requests: Requests, cluster: Engines) -> None:
    """Credit the tokens of the step that ends now, and let finished requests go."""
    replica = cluster.replicas[i]
    kept = 0
    fp8 = replica.step_mode == 1
    for k in range(replica.running):
        r = cluster.slots[i, k]
        done = cluster.scheduled[i, k]
        requests[r].computed += done
        if fp8:
            requests[r].fp8 += done
            replica.fp8 += done
        else:
            requests[r].fp16 += done
            replica.fp16 += done
        if done > 0 and requests[r].computed == requests[r].prompt + requests[r].generated:
            requests[r].generated += 1
            if requests[r].generated == 1:
                _record_first(i, r, now, requests, cluster)
            if requests[r].generated == requests[r].output:
                _record_finish(i, r, now, requests, cluster)
                continue
        cluster.slots[i, kept] = r
        kept += 1
    replica.running = kept


@njit
def _record_first(i: int, r: int, now: float, requests: Requests, cluster: Engines) -> None:
    replica = cluster.replicas[i]
    requests[r].first_s = now
    place = replica.ttft_count % WINDOW
    cluster.recent[i, TTFT, place] = now - requests[r].arrival_s
    cluster.recent[i, TTFT_AT, place] = now
    replica.ttft_count += 1


@njit
def _record_finish(i: int, r: int, now: float, requests: Requests, cluster: Engines) -> None:
    replica = cluster.replicas[i]
    requests[r].finish_s = now
    replica.kv -= requests[r].computed
    if requests[r].strict:
        replica.strict_running -= 1
    if requests[r].output > 1:
        place = replica.tpot_count % WINDOW
        cluster.recent[i, TPOT, place] = (now - requests[r].first_s) / (requests[r].output - 1)
        cluster.recent[i, TPOT_AT, place] = now
        replica.tpot_count += 1


@njit
def _dequeue(i: int, requests: Requests, cluster: Engines) -> None:
    replica = cluster.replicas[i]
    r = replica.head
    replica.head = requests[r].next
    if replica.head < 0:
        replica.tail = -1
    requests[r].next = -1
    replica.waiting -= 1
    replica.waiting_tokens -= requests[r].prompt + requests[r].generated
    if requests[r].strict:
        replica.strict_waiting -= 1


@njit
def _preempt_last(i: int, requests: Requests, cluster: Engines) -> None:
    """Drop the cache of the youngest running request and put it at the head of the queue."""
    replica = cluster.replicas[i]
    replica.running -= 1
    r = cluster.slots[i, replica.running]
    replica.kv -= requests[r].computed
    requests[r].computed = 0
    requests[r].next = replica.head
    replica.head = r
    if replica.tail < 0:
        replica.tail = r
    replica.waiting += 1
    replica.waiting_tokens += requests[r].prompt + requests[r].generated
    replica.preemptions += 1
    if requests[r].strict:
        replica.strict_running -= 1
        replica.strict_waiting += 1


@njit
def _set_step_end(i: int, step_end_s: float, cluster: Engines) -> None:
    """Set when replica ``i`` ends its step and replay its matches up the tournament tree."""
    replica = cluster.replicas[i]
    replica.step_end_s = step_end_s
    tree = cluster.tree
    node = (tree.shape[0] // 2 + i) // 2
    while node >= 1:
        left, right = tree[2 * node], tree[2 * node + 1]
        tree[node] = left
        if right >= 0 and cluster.replicas[right].step_end_s < cluster.replicas[left].step_end_s:
            tree[node] = right
        node //= 2
