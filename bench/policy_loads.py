"""The loads that policies are compared on: Azure traces, square waves, gamma bursts, by share of capacity.

Capacity is the highest Poisson rate of the load's own lengths at which static FP16 meets the SLO: at least
90 % of the requests of 60 s within both limits (TTFT and mean TPOT), found by bisection to 2 %.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nestedfp.loadtests.readers import read_trace
from nestedfp.loadtests.synthetic import Lengths, gamma, square_wave
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.latency import LatencyModel
from nestedfp.policies.policy import Policy
from nestedfp.policies.simulation.capacity import capacity_rps
from nestedfp.policies.simulation.state import EngineSettings, Workload, rescaled

TRACES = {
    "azure-code-2023": "azure_code_2023-11-16.csv",
    "azure-conv-2023": "azure_conv_2023-11-16.csv",
    "azure-conv-2024": "azure_conv_2024-05-14_1400_20min.csv",
}
BURSTS = ("square-wave", "gamma-cv4")
SHARES = (0.6, 0.9, 1.2)
PROMPT, OUTPUT = Lengths(1000, cv=1.0, longest=8000), Lengths(150, cv=1.0, longest=1000)


class Load(NamedTuple):
    name: str
    share: float
    """Of the capacity."""
    capacity_rps: float
    workload: Workload


CUT = "-cut"


def policy(name: str, latency: LatencyModel | None = None) -> Policy:
    """By the name of its controller; with `CUT` behind it, its steps are cut to the SLO.

    latency: the step costs it begins with, else the roofline's.
    """
    config = PolicyConfig(controller=name.removesuffix(CUT), cut_steps=name.endswith(CUT), latency=latency)
    return Policy(config)


def loads(
    folder: Path,
    limit: int,
    replicas: int,
    seed: int,
    settings: EngineSettings,
    capacities: Mapping[str, float] | None = None,
) -> Iterator[Load]:
    """Every load; `limit` requests of each trace, synthetic ones drawn with `seed`.

    `capacities` holds those that are known already, by load; they are those of engines with `settings`.
    """
    known = capacities or {}

    def carried(lengths: Workload) -> float:
        fixed = policy("static-fp16")
        return capacity_rps(lengths, fixed, replicas=replicas, seed=seed, settings=settings)

    for name, file in TRACES.items():
        trace = read_trace(folder / file, limit=limit)
        capacity = known.get(name) or carried(trace)
        for share in SHARES:
            yield Load(name, share, capacity, rescaled(trace, share * capacity))
    even = gamma(PROMPT, OUTPUT, rate_rps=10.0, duration_s=400.0, seed=seed)
    capacity = known.get(BURSTS[0]) or carried(even)
    for share in (0.8, 1.0):
        burst, calm = 1.5 * share * capacity, 0.5 * share * capacity
        wave = square_wave(
            PROMPT, OUTPUT, calm_rps=calm, burst_rps=burst, calm_s=40.0, burst_s=15.0, bursts=5, seed=seed
        )
        yield Load("square-wave", share, capacity, wave)
    for share in SHARES:
        rate = share * capacity
        bursts = gamma(PROMPT, OUTPUT, rate_rps=rate, duration_s=240.0, cv=4.0, seed=seed)
        yield Load("gamma-cv4", share, capacity, bursts)
