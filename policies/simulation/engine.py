"""The compiled step loop: continuous batching with chunked prefill, as vLLM's scheduler does it.

A step serves running requests first, oldest first, one token each once their prompt is computed, and gives
what is left of ``chunk_tokens`` to prompts. Where the KV cache is full the youngest running request is
preempted: its cache is dropped and it returns to the head of the queue, to be computed anew. A step that
holds a strict request runs in 16 bits whatever the mode ordered; in ``auto`` each step runs in 16 bits
unless that breaks a limit. A request goes to the less loaded of two replicas drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from nestedfp.policies.misses import shares
from nestedfp.policies.simulation.state import (
    OUTPUT,
    TPOT,
    TPOT_AT,
    TPOT_LOST,
    TTFT,
    TTFT_AT,
    TTFT_LOST,
    WINDOW,
    Costs,
    Engines,
    Floats,
    Requests,
)

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Numba's compiler with its cache on disk, typed."""
    return cast(F, numba.njit(cache=True)(function))


_shares = njit(shares)
SHED = -2
NEVER_FITS = -3
AUTO_NUMBER = 2
KV_HIGH = 0.9
"""Share of the KV cache in use from which on ``auto`` takes FP8, as the engine's default has it."""


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
            arrive(following, arrival_s, requests, cluster, costs)
            following += 1
        else:
            _finish_step(first, step_end_s, requests, cluster)
            _start_step(first, step_end_s, requests, cluster, costs)


@njit
def misses(
    now: float, window_s: float, ttft_s: float, tpot_s: float, cluster: Engines, share: Floats, cost: Floats
) -> None:
    """Fill in each replica's share of requests over a limit in the last ``window_s``; NaN without any.

    ``cost`` is the share that would have met the limit, had no 16-bit step added to it.
    """
    for i in range(cluster.replicas.shape[0]):
        recent = cluster.recent[i]
        first, done = recent[TTFT_AT] > now - window_s, recent[TPOT_AT] > now - window_s
        share[i], cost[i] = _shares(
            recent[TTFT][first],
            recent[TTFT_LOST][first],
            recent[TPOT][done],
            recent[TPOT_LOST][done],
            ttft_s,
            tpot_s,
        )


@njit
def percentiles(
    now: float, window_s: float, share: float, cluster: Engines, ttft: Floats, tpot: Floats
) -> None:
    """Fill in each replica's percentiles over the last ``window_s``; NaN where there are no values."""
    recent = cluster.recent
    for i in range(cluster.replicas.shape[0]):
        ttft[i] = _recent_percentile(now - window_s, share, recent[i, TTFT], recent[i, TTFT_AT])
        tpot[i] = _recent_percentile(now - window_s, share, recent[i, TPOT], recent[i, TPOT_AT])


@njit
def short_outputs(share: float, cluster: Engines, tokens: Floats) -> None:
    """Fill in each replica's percentile of the latest output lengths; NaN before any."""
    for i in range(cluster.replicas.shape[0]):
        tokens[i] = _recent_percentile(
            -math.inf, share, cluster.recent[i, OUTPUT], cluster.recent[i, TPOT_AT]
        )


@njit
def _recent_percentile(since_s: float, share: float, values: Floats, times: Floats) -> float:
    recent = values[times > since_s]
    if recent.size == 0:
        return math.nan
    recent.sort()
    return float(recent[min(recent.size - 1, int(share * recent.size))])


@njit
def arrive(r: int, now: float, requests: Requests, cluster: Engines, costs: Costs) -> None:
    """Queue request ``r`` on a replica; where none takes it, its ``replica`` says why."""
    if requests[r].prompt + requests[r].output > costs.kv_tokens:
        requests[r].replica = NEVER_FITS
        return
    i = _route(r, requests[r].strict, cluster)
    if i < 0:
        requests[r].replica = SHED
        return
    replica = cluster.replicas[i]
    if replica.waiting_tokens + requests[r].prompt > replica.shed_above:
        requests[r].replica = SHED
        return
    requests[r].replica = i
    # Behind a queue a request also waits for what earlier ones lost.
    requests[r].lost_s = replica.lost_s if replica.tail < 0 else requests[replica.tail].lost_s
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
    if replica.step_end_s == math.inf:
        _start_step(i, now, requests, cluster, costs)


@njit
def _route(r: int, strict: bool, cluster: Engines) -> int:
    """The less loaded of two random candidates; a strict request prefers replicas in 16 bits. -1 if none.

    The candidates depend on seed and request alone, so that policies are compared on the same draws.
    """
    one = _draw(2 * r, strict, cluster)
    if one < 0 and strict:
        strict = False
        one = _draw(2 * r, strict, cluster)
    if one < 0:
        return -1
    other = _draw(2 * r + 1, strict, cluster)
    one_load = cluster.replicas[one].running + cluster.replicas[one].waiting
    other_load = cluster.replicas[other].running + cluster.replicas[other].waiting
    return one if one_load <= other_load else other


@njit
def _hash(seed: int, number: int) -> int:
    """A hash of both, 63 bits (the finaliser of MurmurHash3 over their mix)."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number + 1) * np.uint64(
        0xD1B54A32D192ED03
    )
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return int(x >> np.uint64(1))


@njit
def _draw(number: int, only_16_bits: bool, cluster: Engines) -> int:
    """Candidate ``number``: a replica that takes requests, in 16 bits if asked; -1 if there is none."""
    count = cluster.replicas.shape[0]
    for attempt in range(16 + count):
        i = _hash(cluster.seed, 16 * number + attempt) % count if attempt < 16 else attempt - 16
        replica = cluster.replicas[i]
        if replica.active and (replica.mode == 0 or not only_16_bits):
            return i
    return -1


@njit
def _start_step(i: int, now: float, requests: Requests, cluster: Engines, costs: Costs) -> None:
    """Schedule a step on replica ``i`` and set when it ends; with nothing to do the replica goes idle."""
    replica = cluster.replicas[i]
    budget = costs.chunk_tokens
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
    slow_s = _step_s(0, tokens, replica.running, context, pairs, costs)
    mode = replica.mode
    if replica.strict_running > 0:
        mode = 0
    elif mode == AUTO_NUMBER:
        memory_bound = tokens * costs.token_s[0] < costs.weights_s[0]
        crowded = replica.kv >= KV_HIGH * costs.kv_tokens
        mode = 1 if crowded or _too_slow(i, now, slow_s, memory_bound, requests, cluster) else 0
    duration = slow_s if mode == 0 else _step_s(mode, tokens, replica.running, context, pairs, costs)
    if costs.noise > 0:
        duration *= math.exp(costs.noise * np.random.standard_normal())
    if mode != replica.step_mode:
        duration += costs.flip_s
        replica.flips += 1
        replica.step_mode = mode
    replica.step_s = duration
    replica.step_lost_s = 0.0
    if mode == 0:
        replica.step_lost_s = slow_s - _step_s(1, tokens, replica.running, context, pairs, costs)
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
def _too_slow(
    i: int, now: float, duration: float, memory_bound: bool, requests: Requests, cluster: Engines
) -> bool:
    """The choice within ``auto``: whether a step of ``duration`` in 16 bits would break one of its limits.

    That is: the queue beyond the step holds ``queue_tokens``, a prompt has waited ``wait_s`` for its first
    token, or a running request would end the step more than ``debt_s`` behind its pace; where the step is
    bound by reading the weights, behind ``memory_pace_s`` if that is less.

    A request whose first token is later than ``late_s`` is lost and breaks no limit. A queue breaks none when
    all of it is lost; before that, what is lost counts too, as others wait behind it.
    """
    replica = cluster.replicas[i]
    late_s = replica.late_s
    # The last of the queue came last, so that with it all are late.
    if replica.tail >= 0 and now - requests[replica.tail].arrival_s <= late_s:
        if replica.waiting_tokens >= replica.queue_tokens:
            return True
        if now - requests[replica.head].arrival_s >= replica.wait_s:
            return True
    pace_s = min(replica.pace_s, replica.memory_pace_s) if memory_bound else replica.pace_s
    end_s = now + duration
    for k in range(replica.running):
        r = cluster.slots[i, k]
        made = requests[r].generated
        if made == 0:
            waited_s = now - requests[r].arrival_s
            if replica.wait_s <= waited_s <= late_s:
                return True
        elif requests[r].first_s - requests[r].arrival_s > late_s:
            continue
        elif end_s - requests[r].first_s > made * pace_s + replica.debt_s:
            return True
    return False


@njit
def _finish_step(i: int, now: float, requests: Requests, cluster: Engines) -> None:
    """Credit the tokens of the step that ends now, and let finished requests go."""
    replica = cluster.replicas[i]
    kept = 0
    replica.lost_s += replica.step_lost_s
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
    cluster.recent[i, TTFT_LOST, place] = replica.lost_s - requests[r].lost_s
    requests[r].lost_s = replica.lost_s
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
        steps = requests[r].output - 1
        cluster.recent[i, TPOT, place] = (now - requests[r].first_s) / steps
        cluster.recent[i, TPOT_AT, place] = now
        cluster.recent[i, OUTPUT, place] = requests[r].output
        cluster.recent[i, TPOT_LOST, place] = (replica.lost_s - requests[r].lost_s) / steps
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
