"""What each replica of a simulated cluster knows of its latest requests."""

from __future__ import annotations

import math

from nestedfp.policies.simulation.compiled import njit
from nestedfp.policies.simulation.state import TPOT, TPOT_AT, TTFT, TTFT_AT, Engines, Floats


@njit
def miss_shares(
    now: float, window_s: float, ttft_s: float, tpot_s: float, cluster: Engines, share: Floats
) -> None:
    """Fill in each replica's ``slo_miss_share`` of the last ``window_s``; NaN without requests."""
    for i in range(cluster.replicas.shape[0]):
        recent = cluster.recent[i]
        first = recent[TTFT][recent[TTFT_AT] > now - window_s]
        each = recent[TPOT][recent[TPOT_AT] > now - window_s]
        if first.size == 0 and each.size == 0:
            share[i] = math.nan
            continue
        late = (first > ttft_s).sum() / max(1, first.size)
        slow = (each > tpot_s).sum() / max(1, each.size)
        share[i] = min(1.0, late + slow)


@njit
def percentiles(
    now: float, window_s: float, share: float, cluster: Engines, ttft: Floats, tpot: Floats
) -> None:
    """Fill in each replica's percentiles over the last ``window_s``; NaN where there are no values."""
    recent = cluster.recent
    for i in range(cluster.replicas.shape[0]):
        ttft[i] = _percentile(now - window_s, share, recent[i, TTFT], recent[i, TTFT_AT])
        tpot[i] = _percentile(now - window_s, share, recent[i, TPOT], recent[i, TPOT_AT])


@njit
def _percentile(since_s: float, share: float, values: Floats, times: Floats) -> float:
    recent = values[times > since_s]
    if recent.size == 0:
        return math.nan
    recent.sort()
    return float(recent[min(recent.size - 1, int(share * recent.size))])
