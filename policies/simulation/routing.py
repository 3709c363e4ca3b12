"""Which replica a request goes to: the less loaded of two drawn at random, as Ray Serve's router does."""

from __future__ import annotations

import numpy as np

from nestedfp.policies.simulation.compiled import njit
from nestedfp.policies.simulation.state import Engines


@njit
def route(r: int, strict: bool, cluster: Engines) -> int:
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
