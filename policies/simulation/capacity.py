"""What a cluster can carry: the highest Poisson rate at which a policy still meets the SLO."""

from __future__ import annotations

from nestedfp.policies import checks
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation.cluster import simulate
from nestedfp.policies.simulation.state import EngineSettings, Workload, poisson
from nestedfp.policies.simulation.summary import attained


def capacity_rps(
    lengths: Workload,
    policy: Policy,
    *,
    replicas: int,
    seed: int,
    seconds: float = 60.0,
    precision: float = 0.02,
    settings: EngineSettings | None = None,
) -> float:
    """Requests per second of the whole cluster, found by bisection to a relative ``precision``.

    A rate is carried if the SLO's percentile of requests drawn from ``lengths`` over ``seconds`` meets both
    of its limits. 0 if not even one request in ten seconds and replica does.
    """
    checks.number("precision", precision, above=0.0, maximum=1.0)

    def carries(rate: float) -> bool:
        load = poisson(lengths, rate, seconds, seed)
        outcome = simulate(load, policy, replicas=replicas, seed=seed, settings=settings)
        return (
            float(attained(outcome.requests, policy.config.slo).mean()) * 100 >= policy.config.slo.percentile
        )

    low = 0.1 * replicas
    if not carries(low):
        return 0.0
    high = 2 * low
    while carries(high):
        low, high = high, 2 * high
    while high > low * (1 + precision):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if carries(middle) else (low, middle)
    return low
