"""How long an engine step takes, and the TTFT and TPOT that follow from it.

The model of one step, for one precision:

    step = overhead + max(weights, tokens * token) + sequences * sequence + context * context_token + pairs
    * pair

``weights`` is the time to read all weights once (memory-bound floor), ``token`` the compute time of one
batch token in the linear layers, ``context_token`` the time to read one token of KV cache, ``pair`` the
attention compute of one (prompt token, earlier token) pair, ``sequence`` the cost of one request in the
batch. All in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.protocol import FP8, FP16

Quantity = float | NDArray[np.float64]
"""One number, or one a replica."""

_CORRECTION_RANGE: Final = (1e-3, 1e3)
_CORRECTION_WEIGHT: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """The cost terms of a step in one precision, in seconds (see the module's formula)."""

    overhead_s: float
    weights_s: float
    token_s: float
    sequence_s: float = 0.0
    context_token_s: float = 0.0
    pair_s: float = 0.0

    def __post_init__(self) -> None:
        for cost in fields(self):
            checks.number(cost.name, getattr(self, cost.name))

    def step_s(
        self, tokens: Quantity, sequences: Quantity, context: Quantity, pairs: Quantity = 0.0
    ) -> Quantity:
        """Duration of a step of ``tokens`` batch tokens, ``sequences`` requests, ``context`` KV tokens."""
        linear = np.maximum(self.weights_s, tokens * self.token_s)
        rest = sequences * self.sequence_s + context * self.context_token_s + pairs * self.pair_s
        return self.overhead_s + linear + rest

    def steady_step_s(self, load: TokenLoad) -> Quantity:
        """Mean step time once a constant load has settled; infinite where the load exceeds the engine.

        In a step of t seconds the engine serves the tokens that arrive in t, and by Little's law it holds
        ``decode * t`` requests: linear in t. Prompts come in lumps, so a step without one still reads all
        weights and one with a prompt takes ``prompt * token - weights`` longer; the result is the larger of
        this and of the compute-bound step of a saturated engine, where every step is full.
        """
        per_request = self.sequence_s + load.context * self.context_token_s
        shared = load.decode_per_s * per_request + load.prompt_per_s * 0.5 * load.prompt_tokens * self.pair_s
        lump_s = np.maximum(0.0, load.prompt_tokens * self.token_s - self.weights_s)
        lumps = shared + load.prompt_per_s * lump_s / np.maximum(load.prompt_tokens, 1.0)
        compute = shared + (load.decode_per_s + load.prompt_per_s) * self.token_s
        return np.maximum(
            _settled(self.overhead_s + self.weights_s, lumps), _settled(self.overhead_s, compute)
        )

    def scaled(self, factor: float) -> StepCosts:
        """These costs with every term multiplied by ``factor``."""
        return replace(self, **{cost.name: getattr(self, cost.name) * factor for cost in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoad:
    """A constant load on one replica, or on each of several (arrays)."""

    prompt_per_s: Quantity
    """Prompt tokens arriving per second."""
    decode_per_s: Quantity
    """Output tokens demanded per second."""
    context: Quantity = 0.0
    """Mean KV tokens of a running request."""
    prompt_tokens: Quantity = 0.0
    """Mean length of a prompt; 0 for prompts that arrive token by token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What stands before a request that arrives now."""

    waiting_prompt_tokens: float
    running: float
    context: float
    """KV tokens of the running requests together."""


def corrected_factor(before: float, predicted_s: float, measured_s: float) -> float:
    """The factor on step times after one more step, which was predicted with ``before``; times above 0."""
    low, high = _CORRECTION_RANGE
    ratio = min(high, max(low, measured_s / predicted_s))
    after: float = before * ratio**_CORRECTION_WEIGHT
    return min(high, max(low, after))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Step costs by mode, with a correction learned online from the steps that were seen.

    ``chunk_tokens`` is the engine's limit of batch tokens in a step.
    """

    costs: Mapping[str, StepCosts]
    chunk_tokens: int = 2048
    correction: Mapping[str, float] = field(default_factory=dict)
    """Measured over predicted step time by mode; 1 where nothing was seen."""

    def __post_init__(self) -> None:
        for mode in (FP16, FP8):
            if mode not in self.costs:
                raise InvalidField(f"costs.{mode}", None, "give the step costs of fp16 and fp8")
        checks.take_integer(self, "chunk_tokens", minimum=1)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> LatencyModel:
        """Read ``{"chunk_tokens": n, "costs": {"fp16": {"overhead_s": ..., ...}, "fp8": {...}}}``."""
        values = checks.mapping("latency", settings, ("chunk_tokens", "costs"))
        names = [cost.name for cost in fields(StepCosts)]
        given = values.get("costs")
        if not isinstance(given, Mapping):
            raise InvalidField("latency.costs", given, "give the step costs of fp16 and fp8")
        costs: dict[str, StepCosts] = {}
        for mode, terms in given.items():
            known = checks.mapping(f"latency.costs.{mode}", terms, names)
            missing = [name for name in names[:3] if name not in known]
            if missing:
                raise InvalidField(f"latency.costs.{mode}.{missing[0]}", None, "give this cost in seconds")
            checks.name("latency.costs", mode)
            with checks.within(f"latency.costs.{mode}"):
                costs[mode] = StepCosts(**known)
        with checks.within("latency"):
            return cls(costs=costs, chunk_tokens=values.get("chunk_tokens", 2048))

    def of(self, mode: str) -> StepCosts:
        """The corrected costs of ``mode``; a mode without costs counts as 16 bits, the slower."""
        known = mode if mode in self.costs else FP16
        return self.costs[known].scaled(self.correction.get(known, 1.0))

    def ttft_s(self, mode: str, queue: Queue, prompt_tokens: float) -> float:
        """TTFT of a request of ``prompt_tokens`` that arrives behind ``queue`` and is served in ``mode``.

        The queue is prefilled in chunks, each step of which also gives every running request one token.
        """
        costs = self.of(mode)
        room = max(1.0, self.chunk_tokens - queue.running)
        backlog = queue.waiting_prompt_tokens + prompt_tokens
        full_steps, rest = divmod(backlog, room)
        full = costs.step_s(queue.running + room, queue.running + 1, queue.context)
        last = costs.step_s(queue.running + rest, queue.running + 1, queue.context)
        return float(full_steps * full + last)

    def tpot_s(self, mode: str, load: TokenLoad) -> float:
        """Mean TPOT under a constant load: the steady step time."""
        return float(self.of(mode).steady_step_s(load))

    def corrected(self, mode: str, predicted_s: float, measured_s: float) -> LatencyModel:
        """This model after one more step was seen in ``mode``; unusable measurements change nothing.

        ``predicted_s`` is what this model, correction included, said of that step.
        """
        usable = (
            predicted_s > 0 and measured_s > 0 and math.isfinite(predicted_s) and math.isfinite(measured_s)
        )
        if mode not in self.costs or not usable:
            return self
        after = corrected_factor(self.correction.get(mode, 1.0), predicted_s, measured_s)
        return replace(self, correction={**self.correction, mode: after})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """One measured step of an engine profile."""

    tokens: int
    sequences: int
    context: int
    pairs: int
    step_s: float


def fit(samples: Sequence[StepSample], rounds: int = 20) -> StepCosts:
    """Step costs from a profile of one mode, by non-negative least squares on relative errors.

    The maximum in the formula is fitted by alternation: each round assigns every sample to the side that is
    larger under the present costs. Raises :class:`InvalidField` for fewer than eight usable samples, or
    where all have the same number of tokens.
    """
    usable = [sample for sample in samples if sample.step_s > 0 and math.isfinite(sample.step_s)]
    if len(usable) < 8:
        raise InvalidField("samples", len(usable), "give at least 8 steps with a positive finite duration")
    tokens = _column(sample.tokens for sample in usable)
    if float(np.ptp(tokens)) == 0.0:
        raise InvalidField("samples.tokens", float(tokens[0]), "profile steps of different sizes")
    others = np.stack(
        [
            _column(sample.sequences for sample in usable),
            _column(sample.context for sample in usable),
            _column(sample.pairs for sample in usable),
        ],
        axis=1,
    )
    measured = _column(sample.step_s for sample in usable)
    best: tuple[float, StepCosts] | None = None
    for start in np.quantile(tokens, [0.1, 0.3, 0.5, 0.7, 0.9]):
        compute_bound = tokens > start
        for _ in range(rounds):
            costs = _fit_sides(tokens, others, measured, compute_bound)
            again = tokens * costs.token_s > costs.weights_s
            if bool(np.array_equal(again, compute_bound)):
                break
            compute_bound = again
        error = _relative_error(costs, usable)
        if best is None or error < best[0]:
            best = (error, costs)
    assert best is not None
    return best[1]


def _settled(base_s: float, share: Quantity) -> Quantity:
    """The t of ``t = base_s + share * t``; infinite from a share of 1 on."""
    left = np.maximum(1.0 - np.asarray(share), 0.0)
    with np.errstate(divide="ignore"):
        settled: Quantity = np.where(left > 0.0, base_s / left, np.inf)[()]
    return settled


def _column(values: Iterable[float]) -> NDArray[np.float64]:
    return np.fromiter(values, dtype=np.float64)


def _fit_sides(
    tokens: NDArray[np.float64],
    others: NDArray[np.float64],
    measured: NDArray[np.float64],
    compute_bound: NDArray[np.bool_],
) -> StepCosts:
    """Costs for a given assignment of samples to the two sides of the maximum."""
    columns = [np.ones_like(tokens), np.where(compute_bound, 0.0, 1.0), np.where(compute_bound, tokens, 0.0)]
    design = np.column_stack([*columns, others]) / measured[:, None]
    solution = _nonnegative_least_squares(design, np.ones_like(measured))
    overhead, weights, token, sequence, context, pair = (float(value) for value in solution)
    return StepCosts(
        overhead_s=overhead,
        weights_s=weights,
        token_s=token,
        sequence_s=sequence,
        context_token_s=context,
        pair_s=pair,
    )


def _nonnegative_least_squares(
    design: NDArray[np.float64], wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Least squares with non-negative coefficients (the active-set method of Lawson and Hanson)."""
    scale = np.maximum(np.linalg.norm(design, axis=0), 1e-300)
    scaled = design / scale
    solution = np.zeros(design.shape[1])
    passive = np.zeros(design.shape[1], dtype=bool)
    for _ in range(10 * design.shape[1]):
        gradient = scaled.T @ (wanted - scaled @ solution)
        gradient[passive] = -np.inf
        entering = int(np.argmax(gradient))
        if gradient[entering] <= 1e-9:
            break
        passive[entering] = True
        while True:
            trial = np.zeros_like(solution)
            trial[passive] = np.linalg.lstsq(scaled[:, passive], wanted, rcond=None)[0]
            negative = passive & (trial <= 0)
            if not bool(negative.any()):
                solution = trial
                break
            step = np.min(solution[negative] / np.maximum(solution[negative] - trial[negative], 1e-300))
            solution = solution + step * (trial - solution)
            passive &= solution > 1e-12
    result: NDArray[np.float64] = solution / scale
    return result


def _relative_error(costs: StepCosts, samples: Sequence[StepSample]) -> float:
    """Root mean square of the relative errors of ``costs`` on ``samples``."""
    errors = [
        float(costs.step_s(sample.tokens, sample.sequences, sample.context, sample.pairs)) / sample.step_s
        - 1.0
        for sample in samples
    ]
    return math.sqrt(sum(error * error for error in errors) / len(errors))
