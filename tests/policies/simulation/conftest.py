"""A load that keeps two replicas of the roofline's engine busy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nestedfp.policies.simulation.state import Columns, poisson


@pytest.fixture(scope="session")
def load() -> Callable[..., Columns]:
    """Makes Poisson arrivals at a rate for some seconds, of prompts and answers of mixed lengths."""
    count = 500
    random = np.random.default_rng(1)
    lengths = Columns(
        np.arange(count) * 1.0,
        random.integers(200, 2000, count).astype(np.int32),
        random.integers(20, 200, count).astype(np.int32),
        np.zeros(count, dtype=np.bool_),
    )

    def make(rate: float, seconds: float = 30.0) -> Columns:
        return poisson(lengths, rate, seconds, 2)

    return make
