"""The columns a simulation works on: one row a request, one row a replica.

Named tuples of arrays, so that compiled code takes them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies import checks, roofline
from nestedfp.policies.latency import LatencyModel
from nestedfp.policies.protocol import AUTO, FP8, FP16
from nestedfp.policies.steps import StepBounds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MODES: Final = (FP16, FP8, AUTO)
"""Modes by their number in the columns."""
BOUNDS: Final = StepBounds._fields
"""Bounds of steps that come with a mode; without them ``auto`` runs in 16 bits and no step is cut."""
WINDOW: Final = 256
"""Latest TTFT and TPOT values kept per replica for its percentiles."""


class Workload(Protocol):
    """Requests in order of arrival; the traces of the load tests are such."""

    @property
    def arrival_s(self) -> Floats: ...
    @property
    def prompt_tokens(self) -> NDArray[np.int32]: ...
    @property
    def output_tokens(self) -> NDArray[np.int32]: ...
    @property
    def strict(self) -> Bools: ...


@dataclass(frozen=True, slots=True)
class Columns:
    """A workload made of plain arrays."""

    arrival_s: Floats
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    strict: Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """A vLLM-like engine: its step costs and limits."""

    model: LatencyModel = field(default_factory=roofline.latency_model)
    max_sequences: int = 256
    kv_tokens: int = roofline.KV_CAPACITY_TOKENS
    noise: float = 0.03
    """Standard deviation of the logarithm of step times around the model."""
    flip_s: float = roofline.FLIP_S
    label: str = roofline.LABEL

    def __post_init__(self) -> None:
        checks.integer("max_sequences", self.max_sequences, minimum=1)
        checks.integer("kv_tokens", self.kv_tokens, minimum=1)
        checks.number("noise", self.noise, maximum=1.0)
        checks.number("flip_s", self.flip_s)


REQUEST: Final = np.dtype(
    [
        ("arrival_s", np.float64),
        ("first_s", np.float64),  # time of the first token; NaN before it
        ("finish_s", np.float64),  # time of the last token; NaN before it
        ("prompt", np.int64),
        ("output", np.int64),
        ("computed", np.int64),  # tokens in the KV cache
        ("generated", np.int64),
        ("fp16", np.int64),  # tokens executed in 16-bit steps
        ("fp8", np.int64),
        ("replica", np.int64),  # -1 before arrival, SHED, NEVER_FITS
        ("next", np.int64),  # next in its replica's queue; -1 at the end
        ("strict", np.bool_),
    ]
)
REPLICA: Final = np.dtype(
    [
        ("mode", np.int64),  # mode ordered, an index of MODES
        ("active", np.bool_),  # takes new requests
        *((bound, np.float64) for bound in BOUNDS),
        ("shed_above", np.float64),  # queued prompt tokens above which an arrival is refused
        ("step_end_s", np.float64),  # end of the step in progress; infinite when idle
        ("step_mode", np.int64),  # of the latest step, as are the five that follow
        ("step_s", np.float64),
        ("tokens", np.int64),
        ("sequences", np.int64),
        ("context", np.int64),
        ("pairs", np.float64),
        ("running", np.int64),
        ("head", np.int64),  # of the queue; -1 when empty
        ("tail", np.int64),
        ("waiting", np.int64),
        ("waiting_tokens", np.int64),
        ("strict_running", np.int64),
        ("strict_waiting", np.int64),
        ("kv", np.int64),  # tokens in the KV cache
        ("fp16", np.int64),
        ("fp8", np.int64),
        ("flips", np.int64),
        ("preemptions", np.int64),
        ("arrivals", np.int64),
        ("arrived_tokens", np.int64),
        ("ttft_count", np.int64),
        ("tpot_count", np.int64),
    ]
)
TTFT, TTFT_AT, TPOT, TPOT_AT = range(4)
Requests = np.ndarray[tuple[int], Any]
"""Rows of ``REQUEST``."""


class Engines(NamedTuple):
    """All replicas of a cluster."""

    replicas: np.ndarray[tuple[int], Any]
    """Rows of ``REPLICA``."""
    slots: Ints
    """[replicas, max_sequences] requests in the batch, oldest first."""
    scheduled: Ints
    """[replicas, max_sequences] tokens of each in the step in progress."""
    recent: Floats
    """[replicas, 4, WINDOW] latest TTFT and TPOT values in seconds, each with the time it was seen."""
    tree: Ints
    """Tournament tree over ``step_end_s``: the root, index 1, is the replica whose step ends first.

    Its leaves are the second half; -1 stands beyond the last replica.
    """
    seed: int
    """Of the routing."""


class Costs(NamedTuple):
    """The engine's settings as compiled code takes them; costs are indexed by mode."""

    overhead_s: Floats
    weights_s: Floats
    token_s: Floats
    sequence_s: Floats
    context_token_s: Floats
    pair_s: Floats
    chunk_tokens: int
    kv_tokens: int
    noise: float
    flip_s: float


def rescaled(workload: Workload, rate: float) -> Columns:
    """The workload with its arrival times stretched to a mean of ``rate`` requests per second."""
    checks.number("rate", rate, above=0.0)
    arrival_s = np.asarray(workload.arrival_s, dtype=np.float64)
    factor = len(arrival_s) / max(float(arrival_s[-1]), 1e-9) / rate
    return Columns(arrival_s * factor, workload.prompt_tokens, workload.output_tokens, workload.strict)


def thickened(workload: Workload, copies: int, spread_s: float, seed: int) -> Columns:
    """Every request ``copies`` times, all but the first up to ``spread_s`` later: larger bursts."""
    checks.integer("copies", copies, minimum=1)
    checks.number("spread_s", spread_s)
    count = len(workload.arrival_s)
    later = np.random.default_rng(seed).uniform(0.0, spread_s, (copies, count))
    later[0] = 0.0
    arrival_s = (np.asarray(workload.arrival_s, dtype=np.float64) + later).ravel()
    order = np.argsort(arrival_s, kind="stable")
    drawn = order % count
    return Columns(
        arrival_s[order],
        np.asarray(workload.prompt_tokens)[drawn],
        np.asarray(workload.output_tokens)[drawn],
        np.asarray(workload.strict)[drawn],
    )


def thinned(workload: Workload, share: float, seed: int) -> Columns:
    """Each request kept with probability ``share``."""
    checks.number("share", share, above=0.0, maximum=1.0)
    kept = np.random.default_rng(seed).random(len(workload.arrival_s)) < share
    return Columns(
        np.asarray(workload.arrival_s)[kept],
        np.asarray(workload.prompt_tokens)[kept],
        np.asarray(workload.output_tokens)[kept],
        np.asarray(workload.strict)[kept],
    )


def poisson(lengths: Workload, rate: float, seconds: float, seed: int) -> Columns:
    """Poisson arrivals at ``rate`` per second, each with the lengths of a request drawn from ``lengths``."""
    checks.number("rate", rate, above=0.0)
    random = np.random.default_rng(seed)
    count = max(1, int(rate * seconds))
    drawn = random.integers(0, len(lengths.arrival_s), count)
    return Columns(
        np.cumsum(random.exponential(1.0 / rate, count)),
        np.asarray(lengths.prompt_tokens)[drawn],
        np.asarray(lengths.output_tokens)[drawn],
        np.asarray(lengths.strict)[drawn],
    )


def requests_of(workload: Workload) -> Requests:
    """Fresh request rows."""
    requests = np.zeros(len(workload.arrival_s), dtype=REQUEST)
    requests["arrival_s"] = workload.arrival_s
    requests["prompt"] = workload.prompt_tokens
    requests["output"] = workload.output_tokens
    requests["strict"] = workload.strict
    for column in ("first_s", "finish_s"):
        requests[column] = np.nan
    for column in ("replica", "next"):
        requests[column] = -1
    return requests


def engines_of(count: int, max_sequences: int, seed: int = 0) -> Engines:
    """``count`` fresh replicas, all idle in 16 bits and taking requests."""
    replicas = np.zeros(count, dtype=REPLICA)
    replicas["active"] = True
    for column in ("shed_above", "step_end_s", *BOUNDS):
        replicas[column] = np.inf
    for column in ("head", "tail"):
        replicas[column] = -1
    leaves = 1 << max(0, count - 1).bit_length()
    tree = np.full(2 * leaves, -1, dtype=np.int64)
    tree[leaves : leaves + count] = np.arange(count)
    for node in range(leaves - 1, 0, -1):
        tree[node] = tree[2 * node]
    recent = np.full((count, 4, WINDOW), -np.inf)
    slots = np.zeros((count, max_sequences), dtype=np.int64)
    return Engines(replicas, slots, np.zeros_like(slots), recent, tree, seed)


def costs_of(settings: EngineSettings) -> Costs:
    """The settings of an engine as compiled code takes them."""
    by_mode = [settings.model.of(mode) for mode in MODES]

    def column(name: str) -> Floats:
        return np.array([getattr(costs, name) for costs in by_mode], dtype=np.float64)

    return Costs(
        overhead_s=column("overhead_s"),
        weights_s=column("weights_s"),
        token_s=column("token_s"),
        sequence_s=column("sequence_s"),
        context_token_s=column("context_token_s"),
        pair_s=column("pair_s"),
        chunk_tokens=settings.model.chunk_tokens,
        kv_tokens=settings.kv_tokens,
        noise=settings.noise,
        flip_s=settings.flip_s,
    )
