"""Capacity: carried just below it, not carried just above."""

from __future__ import annotations

import numpy as np
import pytest

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation.capacity import capacity_rps
from nestedfp.policies.simulation.cluster import simulate
from nestedfp.policies.simulation.state import Columns, poisson
from nestedfp.policies.simulation.summary import attained

LENGTHS = Columns(
    np.zeros(1), np.array([1500], dtype=np.int32), np.array([80], dtype=np.int32), np.zeros(1, dtype=np.bool_)
)


@pytest.mark.parametrize("controller", ["static-fp16", "static-fp8"])
def test_the_slo_holds_below_capacity_and_fails_above(controller: str) -> None:
    policy = Policy(PolicyConfig(controller=controller))
    found = capacity_rps(LENGTHS, policy, replicas=1, seed=3, seconds=40.0)
    shares = []
    for factor in (0.9, 1.25):
        load = poisson(LENGTHS, factor * found, 40.0, seed=3)
        outcome = simulate(load, policy, replicas=1, seed=3)
        shares.append(attained(outcome.requests, policy.config.slo).mean())
    assert shares[0] >= 0.9 > shares[1]


def test_fp8_carries_more_than_16_bits_and_less_than_twice_as_much() -> None:
    found = [
        capacity_rps(LENGTHS, Policy(PolicyConfig(controller=name)), replicas=1, seed=3, seconds=40.0)
        for name in ("static-fp16", "static-fp8")
    ]
    assert 1.2 < found[1] / found[0] < 2.0


def test_an_slo_out_of_reach_has_no_capacity() -> None:
    config = PolicyConfig.from_dict({"controller": "static-fp16", "slo": {"ttft_s": 0.001, "tpot_s": 0.001}})
    assert capacity_rps(LENGTHS, Policy(config), replicas=1, seed=3, seconds=20.0) == 0.0
