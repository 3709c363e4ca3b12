"""How much of an oracle's schedule is knowledge of the arrivals, and how much is luck with the noise.

The search of :mod:`nestedfp.policies.simulation.oracle` keeps whatever worked on one draw of the noise of
step times. Some of that is chance: on other draws, with the same arrivals and the same router, the same
schedule attains less. Who knows the arrivals does not know the noise, so :func:`hold` asks what share of
tokens in 16 bits schedules reach at an attainment that they keep on draws which no search has seen.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies.config import Slo
from nestedfp.policies.simulation.oracle import CUT_FP8, LEVELS, Schedule, figures, load_ahead, replay
from nestedfp.policies.simulation.state import EngineSettings, Workload

DRAWS: Final = (1001, 1002, 1003, 1004)
"""Seeds of the noise that no search uses."""
_HALVINGS: Final = 6


class Held(NamedTuple):
    """Means over the unseen draws."""

    found_share: float
    found_attainment: float
    """What the schedule of the search reaches as it is."""
    share: float | None
    """The best share at the attainment asked for; None where no schedule tried keeps it."""


def hold(
    workload: Workload,
    schedule: Schedule,
    attainment: float,
    *,
    seed: int,
    settings: EngineSettings,
    slo: Slo,
) -> Held:
    """``schedule`` on unseen noise, and the best share of 16-bit tokens that keeps ``attainment`` there.

    Tried are every level held throughout, and ``schedule`` with as few of its seconds in FP8 as it takes:
    those of the highest load first, or in random order, by bisection.
    """

    def means(trial: Schedule) -> tuple[float, float]:
        drawn = [
            figures(
                replay(workload, trial, seed=seed, settings=settings, slo=slo, noise_seed=draw),
                slo,
            )
            for draw in DRAWS
        ]
        share, attained = np.mean(drawn, axis=0)
        return float(share), float(attained)

    found_share, found_attainment = means(schedule)
    tried = [means(np.full_like(schedule, level)) for level in range(len(LEVELS))]
    load = load_ahead(workload, len(schedule))
    shuffled = np.random.default_rng(seed).permutation(len(schedule))
    for order in (np.argsort(-load, kind="stable"), shuffled):
        low, high = 0, len(schedule)
        for _ in range(_HALVINGS if found_attainment < attainment else 0):
            middle = (low + high) // 2
            tried.append(means(_in_fp8(schedule, order[:middle])))
            low, high = (low, middle) if tried[-1][1] >= attainment else (middle, high)
    tried.append((found_share, found_attainment))
    held = [share for share, attained in tried if attained >= attainment - 1e-12]
    return Held(found_share, found_attainment, max(held, default=None))


def _in_fp8(schedule: Schedule, seconds: NDArray[np.int64]) -> Schedule:
    changed = schedule.copy()
    changed[seconds] = CUT_FP8
    return changed
