"""One run of the benchmark: the engines that live, and what was measured so far."""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nestedfp.kernels.gpu import now
from nestedfp.vllm.bench.grid import CONTENDERS, Cell, warm_up_cell
from nestedfp.vllm.bench.remote import EngineFailedError, Remote, Turn
from nestedfp.vllm.bench.report import rows_of

_OF_ALL = ("device", "driver", "versions")
"""Facts of an engine that are those of all."""
START_LIMIT_S = 400
_CALL_LIMIT_S = 300
_LEAST_CALL_S = 45


class Session:
    """Starts engines, gives them turns, and keeps what they answer. An engine that fails is left out of what
    follows; what it had measured stays, and why it failed is kept."""

    def __init__(self, args: argparse.Namespace, model: Path, scratch: Path) -> None:
        self._args = args
        self._model = model
        self._logs: Path = args.logs or scratch
        self._logs.mkdir(parents=True, exist_ok=True)
        self._turn = Turn(scratch / "turn")
        self._end: float = time.monotonic() + args.time_limit
        self.engines: dict[str, Remote] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.solo: list[dict[str, Any]] = []
        self.passes: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self._parked: str | None = None

    def start(self, names: Iterable[str]) -> None:
        blocks = self._args.blocks
        started = [Remote(self._task(name, blocks), self._turn, self._logs / f"{name}.log") for name in names]
        for remote in started:
            self.engines[remote.name] = remote
        for remote in started:
            try:
                remote.wait_until_ready(min(START_LIMIT_S, self.seconds_left()))
                self.facts[remote.name] = {**remote.facts, "date": now()}
                print(f"{remote.name}: {_start(remote.facts)}", flush=True)
            except EngineFailedError as error:
                self._drop(remote.name, error)

    def check(self) -> None:
        if "nestedfp" not in self.engines:
            return
        try:
            self._take_turn("nestedfp")
            checks = self._call("nestedfp", "check_flips")
            self.facts["nestedfp"]["checks"] = checks
            print(json.dumps(checks), flush=True)
        except EngineFailedError as error:
            self._drop("nestedfp", error)

    def measure(self, cell: Cell, later_s: float = 0.0) -> None:
        """All passes of one cell: contenders in order, in reverse order, and so on; none is begun once only
        `later_s` are left."""
        order = list(CONTENDERS)
        input_len, output_len, batch = cell
        for count in range(self._args.passes + 1):
            for name in order if count % 2 else reversed(order):
                engine, mode = CONTENDERS[name]
                if engine not in self.engines or self.seconds_left() <= later_s:
                    continue
                try:
                    self._take_turn(engine)
                    result = self._call(engine, "pass", mode, cell if count else warm_up_cell(cell))
                except EngineFailedError as error:
                    self._drop(engine, error)
                    continue
                if count:
                    shape = {"input_len": input_len, "output_len": output_len, "batch": batch}
                    self.passes.append({"contender": name, **shape, "date": now(), **result})

    def profile(self) -> None:
        """Where the time of a decode and of a prefill step goes, for each contender."""
        for name, (engine, mode) in CONTENDERS.items():
            if engine in self.engines:
                try:
                    self._take_turn(engine)
                    found = self._call(engine, "profile", mode)
                    self.profiles.append({**self._what(), "contender": name, "date": now(), **found})
                except EngineFailedError as error:
                    self._drop(engine, error)

    def start_alone(self, name: str) -> None:
        """A start with the card to itself, and what it left for the KV cache."""
        remote = Remote(self._task(name, None), None, self._logs / f"{name}-alone.log")
        try:
            remote.wait_until_ready(min(START_LIMIT_S, self.seconds_left()))
            self.solo.append(self._entry({**remote.facts, "date": now()}))
            print(f"{name} alone: {_start(remote.facts)}", flush=True)
        except EngineFailedError as error:
            self._note(f"{name} alone", error)
        remote.stop()

    def stop(self) -> None:
        for remote in self.engines.values():
            remote.stop()
        self.engines.clear()

    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def rows(self, cell: Cell | None = None) -> list[dict[str, Any]]:
        """The rows of one cell, or of all."""
        passes = [
            entry
            for entry in self.passes
            if cell in (None, (entry["input_len"], entry["output_len"], entry["batch"]))
        ]
        return rows_of(self._args.model, self._args.dtype, passes, self.facts)

    def report(self) -> dict[str, Any]:
        """What the file of this run holds, from the first engine's start on."""
        first = next(iter([*self.facts.values(), *self.solo]))
        settings = {
            **first["settings"],
            "passes": self._args.passes,
            "weights": "normal, deviation 0.02",
            "order": "contenders in turn on one device, A-B-B-A",
        }
        return {
            "device": first["device"],
            "driver": first["driver"],
            "versions": first["versions"],
            "date": now(),
            "settings": settings if self.facts else {},
            "engines": [_without(self._entry(facts), "settings") for facts in self.facts.values()],
            "solo": [_without(entry) for entry in self.solo],
            "profiles": self.profiles,
            "failures": self.failures,
            "rows": self.rows(),
        }

    def _take_turn(self, engine: str) -> None:
        """Frees the shared memory that another engine still holds."""
        last, self._parked = self._parked, engine
        if self._args.share_kv and last not in (None, engine) and last in self.engines:
            try:
                self._call(last, "park")
            except EngineFailedError as error:
                self._drop(last, error)

    def _call(self, engine: str, *command: Any) -> dict[str, Any]:
        seconds = min(_CALL_LIMIT_S, max(_LEAST_CALL_S, self.seconds_left()))
        return self.engines[engine].call(*command, seconds=seconds)

    def _drop(self, name: str, error: EngineFailedError) -> None:
        self._note(name, error)
        self.engines.pop(name).stop()

    def _note(self, name: str, error: EngineFailedError) -> None:
        print(error, flush=True)
        self.failures.append({**self._what(), "engine": name, "error": str(error)})

    def _entry(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {**self._what(), **facts}

    def _what(self) -> dict[str, str]:
        return {"model": self._args.model, "dtype": self._args.dtype}

    def _task(self, engine: str, blocks: int | None) -> dict[str, Any]:
        return {
            "engine": engine,
            "model": str(self._model),
            "dtype": self._args.dtype,
            "device": self._args.device,
            "blocks": blocks,
            "max_model_len": self._args.max_model_len,
            "share_kv": self._args.share_kv and blocks is not None,
            "capture_sizes": self._args.capture_sizes,
            "tensor_parallel": self._args.tensor_parallel,
            "fuse_silu": self._args.fuse_silu,
            "spawned_at": time.time(),
        }


def _without(entry: dict[str, Any], *more: str) -> dict[str, Any]:
    """Without what the header of the file says of all."""
    return {key: value for key, value in entry.items() if key not in _OF_ALL and key not in more}


def _start(facts: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in facts.get("phases_s", {}).items())
    kernels = f"; kernels {facts['kernels_s']:.1f}" if "kernels_s" in facts else ""
    return f"ready in {facts['start_s']:.1f} s ({phases}{kernels}), {json.dumps(facts['memory'])}"
