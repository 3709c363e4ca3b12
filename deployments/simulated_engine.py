"""One vLLM-like engine in real time: the simulator's step loop, told of requests as they come.

Steps are those of `nestedfp.policies.simulation.engine`, compiled, with step times from a latency model; no
model runs and no token has a meaning. The engine's clock is the wall's. A process that is late finds several
steps over at once, so the times of tokens are the steps' own and not those at which anyone looked.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.protocol import AUTO, FP8, FP16
from nestedfp.policies.simulation import engine
from nestedfp.policies.simulation.state import (
    BOUNDS,
    MODES,
    Columns,
    EngineSettings,
    costs_of,
    engines_of,
    requests_of,
)
from nestedfp.policies.steps import LIMIT_NAMES
from nestedfp.vllm.status import EngineStatus

_STEP_TIME_WEIGHT: Final = 0.1
_NONE: Final = -1


class Refused(RuntimeError):
    """The engine does not take this request now; a later try may succeed."""


class NeverFits(ValueError):
    """Prompt and output together exceed the KV cache."""


@dataclass(slots=True)
class FinishedRequest:
    """The facts of a finished request that :class:`~nestedfp.deployments.signals.RequestWindow` reads."""

    mean_time_per_output_token: float
    num_generation_tokens: int


@dataclass(slots=True)
class StepStatistics:
    """One step as vLLM's stat loggers would see it; durations in seconds."""

    num_prompt_tokens: int = 0
    """0: the prompts were counted when they came."""
    time_to_first_tokens_iter: list[float] = field(default_factory=list)
    inter_token_latencies_iter: list[float] = field(default_factory=list)
    finished_requests: list[FinishedRequest] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Generation:
    """A request in the engine; its times are seconds on the engine's clock."""

    row: int
    arrival_s: float
    """At the proxy."""
    queued_s: float
    """At the engine."""
    prompt_tokens: int
    output_tokens: int
    token_s: list[float] = field(default_factory=list)
    token_modes: list[str] = field(default_factory=list)
    """Precision of the step that made each token."""
    tokens: dict[str, int] = field(default_factory=lambda: {FP16: 0, FP8: 0})
    """Executed tokens, prompt included, by precision; complete once it is done."""
    done: bool = False
    wanted: int = 1
    """How many tokens there must be for `changed` to be set."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        if len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


class SimulatedEngine:
    """A single engine; :meth:`run` must run for time to pass.

    `places` is the most requests it holds, its queue included. `stepped` hears of every step, `arrived` of
    every request's prompt tokens.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        places: int,
        seed: int = 0,
        stepped: Callable[[StepStatistics], None] = lambda _: None,
        arrived: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        nothing = np.zeros(places)
        lengths = nothing.astype(np.int32)
        self._requests = requests_of(Columns(nothing, lengths, lengths, nothing.astype(np.bool_)))
        self._engines = engines_of(1, settings.max_sequences)
        self._replica = self._engines.replicas[0]
        self._settings = settings
        self._costs = costs_of(settings)
        self._stepped = stepped
        self._arrived = arrived
        self._clock = clock
        self._origin_s = clock()
        self._free = list(range(places))
        self._live: dict[int, Generation] = {}
        self._wake = asyncio.Event()
        self._target = (FP16, 0, "")
        self._steps = {FP16: 0, FP8: 0}
        self._step_s: dict[str, float | None] = {FP16: None, FP8: None}
        engine.seed(seed)

    @property
    def now(self) -> float:
        """Seconds since the engine was made."""
        return self._clock() - self._origin_s

    async def run(self) -> None:
        """Step for ever."""
        while True:
            end_s = float(self._replica["step_end_s"])
            if math.isinf(end_s):
                self._wake.clear()
                await self._wake.wait()
                continue
            await asyncio.sleep(max(0.0, end_s - self.now))
            self.catch_up()

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, strict: bool, age_s: float = 0.0
    ) -> Generation:
        """Queue a request that arrived `age_s` ago. Raises :class:`Refused` and :class:`NeverFits`."""
        if not self._free:
            raise Refused(f"all {len(self._requests)} places of the engine are taken")
        now = self.catch_up()
        row = self._free.pop()
        request = self._requests[row]
        request["arrival_s"] = now - age_s
        request["prompt"], request["output"], request["strict"] = prompt_tokens, output_tokens, strict
        for column in ("computed", "generated", "fp16", "fp8"):
            request[column] = 0
        request["first_s"] = request["finish_s"] = math.nan
        request["replica"] = request["next"] = _NONE
        replica = engine.arrive(row, self._requests, self._engines, self._costs.kv_tokens)
        if replica < 0:
            self._free.append(row)
            if replica == engine.NEVER_FITS:
                raise NeverFits(f"{prompt_tokens} + {output_tokens} tokens exceed the KV cache")
            raise Refused("the policy bounds the queue: FP8 is not fast enough either")
        if math.isinf(self._replica["step_end_s"]):
            engine.start_step(replica, now, self._requests, self._engines, self._costs)
        generation = self._live[row] = Generation(row, now - age_s, now, prompt_tokens, output_tokens)
        self._arrived(prompt_tokens)
        self._wake.set()
        return generation

    def abort(self, generation: Generation) -> None:
        """Take a request out; one that is done, or was taken out, is left alone."""
        if generation.done or self._live.get(generation.row) is not generation:
            return
        self.catch_up()
        if generation.done:
            return
        if not self._leave_batch(generation.row):
            self._leave_queue(generation.row)
        self._release(generation)

    def set_target(self, mode: str, *, epoch: int, reason: str, limits: Mapping[str, float] | None) -> None:
        """Set the mode from the next step on. Raises :class:`InvalidField` for an unknown mode or limit.

        The costs of a step, which a real engine is told among the limits of `auto`, it knows itself.
        """
        if mode not in MODES:
            raise InvalidField("mode", mode, f"a simulated engine knows {', '.join(MODES)}")
        given = dict(limits or {})
        shed_above = given.pop("waiting_prompt_tokens", math.inf)
        for name in given:
            if name not in LIMIT_NAMES:
                raise InvalidField("limits", name, f"a simulated engine knows {', '.join(LIMIT_NAMES)}")
        self.catch_up()
        self._replica["mode"] = MODES.index(mode)
        self._replica["shed_above"] = shed_above
        for name in BOUNDS:
            self._replica[name] = given.get(name, math.inf)
        self._target = (mode, epoch, reason)

    @property
    def current(self) -> str:
        """The precision in force: the target, or within `auto` that of the step in progress."""
        return MODES[int(self._replica["step_mode"])] if self._target[0] == AUTO else self._target[0]

    def status(self) -> EngineStatus:
        """The state as a real engine reports it; it has no layers."""
        now = self.now
        replica = self._replica
        mode, epoch, reason = self._target
        head = int(replica["head"])
        flips = int(replica["flips"])
        return EngineStatus(
            mode=mode,
            epoch=epoch,
            current=self.current,
            steps=dict(self._steps),
            tokens={FP16: int(replica["fp16"]), FP8: int(replica["fp8"])},
            flips=flips,
            last_flip_seconds=self._settings.flip_s if flips else None,
            last_flip_reason=reason if flips else None,
            mixed_steps=None,
            running=int(replica["running"]),
            waiting=int(replica["waiting"]),
            waiting_prompt_tokens=int(replica["waiting_tokens"]),
            oldest_waiting_s=max(0.0, now - float(self._requests[head]["arrival_s"])) if head >= 0 else 0.0,
            kv_usage=float(replica["kv"]) / self._costs.kv_tokens,
            step_time_s=dict(self._step_s),
            layers={},
            plain_reasons={},
            strict_running=int(replica["strict_running"]),
            at=now,
            context_tokens=int(replica["kv"]),
        )

    def extra_signals(self) -> dict[str, Any]:
        """What a report may say beyond the status: the step in progress, and strict requests in the queue."""
        return {
            "step_time_s": float(self._replica["step_s"]) or None,
            "batch_tokens": int(self._replica["tokens"]),
            "strict_waiting": int(self._replica["strict_waiting"]),
        }

    def catch_up(self) -> float:
        """Finish every step that is over by now, and return that time."""
        now = self.now
        while (end_s := float(self._replica["step_end_s"])) <= now:
            mode = MODES[int(self._replica["step_mode"])]
            seconds = float(self._replica["step_s"])
            engine.advance(end_s, len(self._requests), self._requests, self._engines, self._costs)
            self._credit(end_s, mode, seconds)
        return now

    def _credit(self, end_s: float, mode: str, seconds: float) -> None:
        """Give every request the token it got in the step that ended at `end_s`."""
        self._steps[mode] += 1
        before = self._step_s[mode]
        self._step_s[mode] = seconds if before is None else before + _STEP_TIME_WEIGHT * (seconds - before)
        step = StepStatistics()
        generated = self._requests["generated"]
        for generation in list(self._live.values()):
            if generated[generation.row] == len(generation.token_s):
                continue
            if generation.token_s:
                step.inter_token_latencies_iter.append(end_s - generation.token_s[-1])
            generation.token_s.append(end_s)
            generation.token_modes.append(mode)
            if len(generation.token_s) == 1:
                step.time_to_first_tokens_iter.append(generation.ttft_s)
            if len(generation.token_s) == generation.output_tokens:
                generation.done = True
                finished = FinishedRequest(generation.tpot_s or 0.0, len(generation.token_s))
                step.finished_requests.append(finished)
                self._release(generation)
            if len(generation.token_s) >= generation.wanted:
                generation.changed.set()
        self._stepped(step)

    def _release(self, generation: Generation) -> None:
        request = self._requests[generation.row]
        generation.tokens = {FP16: int(request["fp16"]), FP8: int(request["fp8"])}
        del self._live[generation.row]
        self._free.append(generation.row)

    def _leave_batch(self, row: int) -> bool:
        """Take a running request out of the step in progress; False if it does not run."""
        replica, slots, scheduled = self._replica, self._engines.slots[0], self._engines.scheduled[0]
        running = int(replica["running"])
        places = np.flatnonzero(slots[:running] == row)
        if places.size == 0:
            return False
        place = int(places[0])
        replica["kv"] -= self._requests[row]["computed"] + scheduled[place]
        for column in (slots, scheduled):
            column[place : running - 1] = column[place + 1 : running].copy()
        replica["running"] -= 1
        if self._requests[row]["strict"]:
            replica["strict_running"] -= 1
        return True

    def _leave_queue(self, row: int) -> None:
        replica, following = self._replica, self._requests["next"]
        before = _NONE
        at = int(replica["head"])
        while at != row:
            before, at = at, int(following[at])
        if before == _NONE:
            replica["head"] = following[row]
        else:
            following[before] = following[row]
        if replica["tail"] == row:
            replica["tail"] = before
        request = self._requests[row]
        replica["waiting"] -= 1
        replica["waiting_tokens"] -= request["prompt"] + request["generated"]
        if request["strict"]:
            replica["strict_waiting"] -= 1


def compile_steps() -> None:
    """Compile the step loop, or load it from the disk: a request through an engine of its own."""
    short = SimulatedEngine(EngineSettings(max_sequences=2), places=2)
    generation = short.submit(4, 2, strict=False)
    while not generation.done:
        short.catch_up()
