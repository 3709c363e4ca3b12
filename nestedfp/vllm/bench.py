"""`nestedfp bench engine`: plain vLLM, vLLM's online FP8 and NestedFP in both modes over one grid.

All engines are started at once, each in a process of its own on the same device, and take turns: within a
cell the contenders run in order, then in reverse order, and so on (A-B-B-A), while the others stand still.
Weights are random, normal with standard deviation 0.02, from a configuration alone, so no checkpoint is
needed. Every contender warms each cell up by a short pass, which is not counted. Cells come in the order of
what they tell, and the file is written after each, so that a run that is cut off is still of use.

The engines share the card: `--blocks` gives each the same KV cache, and with `--share-kv` its memory exists
only for the engine whose turn it is. `--solo` starts each engine once more, alone, with the card to itself:
that gives the start-up time with warm caches and the number of KV-cache blocks at the same memory setting.

The file written holds a header (device, versions, date, settings), `rows` (one a contender and cell:
medians over the passes, with the spread of the throughput), `engines` with start-up and memory and, for
NestedFP engines, `checks`: flips before every step, their cost, and whether greedy tokens in 16 bits were
the same afterwards; `solo`; and, with `--profile`, `profiles`: GPU time by kernel of a decode and a prefill
step of each contender, in microseconds.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

Cell = tuple[int, int, int]

ENGINES = ("vllm-16bit", "nestedfp", "vllm-fp8")

CONTENDERS = {
    "vllm-16bit": ("vllm-16bit", None),
    "nestedfp-16bit": ("nestedfp", "fp16"),
    "nestedfp-fp8": ("nestedfp", "fp8"),
    "vllm-fp8": ("vllm-fp8", None),
}
"""Contender -> its engine, and the target that is set there."""

GRID: list[Cell] = [
    *((128, 128, batch) for batch in (32, 1, 256, 128, 8, 512)),
    *((1024, 64, batch) for batch in (32, 1, 128)),
    *((32, 512, batch) for batch in (32, 256, 1, 128)),
    *((1024, 64, batch) for batch in (8, 256)),
    *((32, 512, batch) for batch in (8, 512)),
    (1024, 64, 512),
]
"""(input length, output length, batch), what tells most first."""

START_LIMIT_S = 400
SOLO_START_S = 55
PROFILE_S = 15
"""Time kept free for what comes after the grid, under a time limit."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-tiny": {
        **_LLAMA,
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
"""Model configurations that need no download; any folder with a config.json serves as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-3.1-8b", help=f"{', '.join(CONFIGURATIONS)}, or a folder")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"some of {', '.join(ENGINES)}")
    parser.add_argument(
        "--cells", type=_cells, default=GRID, help="in/out/batch,... (default: the whole grid)"
    )
    parser.add_argument("--passes", type=int, default=3, help="counted passes a cell")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--blocks", type=int, default=4096, help="KV-cache blocks (of 16 tokens on a GPU) of every engine"
    )
    parser.add_argument(
        "--share-kv", action="store_true", help="KV-cache memory exists only for the engine whose turn it is"
    )
    parser.add_argument(
        "--capture-sizes", type=_sizes, help="batch sizes to capture graphs for (default: vLLM's own list)"
    )
    parser.add_argument(
        "--solo", default="", help="engines to start again alone at the end, on the whole card"
    )
    parser.add_argument("--profile", action="store_true", help="time a decode and a prefill step by kernel")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which to stop")
    parser.add_argument(
        "--wait-for", type=Path, help="time nothing before this file exists (or the time limit is near)"
    )
    parser.add_argument("--out", type=Path, help="default: bench/data/engine-<device>.json")


class EngineFailedError(RuntimeError):
    """An engine's process ended, or did not answer in time."""


class Remote:
    """An engine in a process of its own."""

    def __init__(self, task: dict[str, Any], turn: AbstractContextManager[Any]) -> None:
        from nestedfp.vllm import contender

        self.name: str = task["engine"]
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=contender.serve, args=(task, theirs, turn), name=self.name)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}

    def wait_until_ready(self, seconds: float) -> None:
        self.facts = self._receive(seconds)

    def call(self, *command: Any, seconds: float = 300.0) -> dict[str, Any]:
        """The answer to a command of `contender.serve`."""
        try:
            self._pipe.send(command)
        except OSError as error:
            raise EngineFailedError(f"{self.name}: {error}; its output is above") from error
        return self._receive(seconds)

    def stop(self) -> None:
        """Ends the process; its memory is free when this returns."""
        self._process.kill()
        self._process.join()

    def _receive(self, seconds: float) -> dict[str, Any]:
        try:
            if not self._pipe.poll(max(0.0, seconds)):
                raise EngineFailedError(f"{self.name}: no answer in {seconds:.0f} s")
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineFailedError(f"{self.name}: its process ended; its output is above") from error
        return answer


class Session:
    """One run of the benchmark: the engines that live, and what was measured so far."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self._args = args
        self._model = model
        self._end: float = time.monotonic() + args.time_limit
        self.engines: dict[str, Remote] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.solo: list[dict[str, Any]] = []
        self.passes: list[dict[str, Any]] = []
        self.profiles: dict[str, dict[str, Any]] = {}
        self._parked: str | None = None

    def start(self, names: Iterable[str]) -> None:
        turn = multiprocessing.get_context("spawn").Lock()
        started = [Remote(self._task(name, self._args.blocks), turn) for name in names]
        for remote in started:
            self.engines[remote.name] = remote
        for remote in started:
            try:
                remote.wait_until_ready(min(START_LIMIT_S, self.seconds_left()))
                self.facts[remote.name] = remote.facts
                print(f"{remote.name}: ready in {remote.facts['start_s']:.1f} s", flush=True)
            except EngineFailedError as error:
                self._drop(remote.name, error)

    def check(self) -> None:
        if "nestedfp" not in self.engines:
            return
        self._take_turn("nestedfp")
        try:
            checks = self.engines["nestedfp"].call("check_flips")
            self.facts["nestedfp"]["checks"] = checks
            print(json.dumps(checks), flush=True)
        except EngineFailedError as error:
            self._drop("nestedfp", error)

    def measure(self, cell: Cell) -> None:
        """All passes of one cell: contenders in order, in reverse order, and so on."""
        from nestedfp.vllm.contender import WARM_UP_TOKENS

        order = list(CONTENDERS)
        input_len, output_len, batch = cell
        warm_up = (input_len, min(output_len, WARM_UP_TOKENS), batch)
        for count in range(self._args.passes + 1):
            for name in order if count % 2 else reversed(order):
                engine, mode = CONTENDERS[name]
                if engine not in self.engines or self.seconds_left() <= 0:
                    continue
                self._take_turn(engine)
                try:
                    result = self.engines[engine].call("pass", mode, cell if count else warm_up)
                except EngineFailedError as error:
                    self._drop(engine, error)
                    continue
                if count:
                    shape = {"input_len": input_len, "output_len": output_len, "batch": batch}
                    self.passes.append({"contender": name, **shape, **result})

    def profile(self) -> None:
        """Where the time of a decode and of a prefill step goes, for each contender."""
        for name, (engine, mode) in CONTENDERS.items():
            if engine in self.engines:
                self._take_turn(engine)
                try:
                    self.profiles[name] = self.engines[engine].call("profile", mode)
                except EngineFailedError as error:
                    self._drop(engine, error)

    def start_alone(self, name: str) -> None:
        remote = Remote(self._task(name, None), nullcontext())
        try:
            remote.wait_until_ready(min(START_LIMIT_S, self.seconds_left()))
            found = {"engine": name, "start_s": remote.facts["start_s"], "memory": remote.facts["memory"]}
            self.solo.append(found)
            print(f"{name} alone: {json.dumps(found)}", flush=True)
        except EngineFailedError as error:
            print(error, flush=True)
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
        first = next(iter(self.facts.values()))
        shown = ("engine", "start_s", "memory", "checks")
        return {
            "device": first["device"],
            "versions": first["versions"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": {
                **first["settings"],
                "passes": self._args.passes,
                "weights": "normal, deviation 0.02",
                "order": "contenders in turn on one device, A-B-B-A",
            },
            "engines": [{key: facts[key] for key in shown if key in facts} for facts in self.facts.values()],
            "solo": self.solo,
            "profiles": self.profiles,
            "rows": self.rows(),
        }

    def _take_turn(self, engine: str) -> None:
        """Frees the shared memory that another engine still holds."""
        last, self._parked = self._parked, engine
        if self._args.share_kv and last not in (None, engine) and last in self.engines:
            self.engines[last].call("park")

    def _drop(self, name: str, error: EngineFailedError) -> None:
        print(error, flush=True)
        self.engines.pop(name).stop()

    def _task(self, engine: str, blocks: int | None) -> dict[str, Any]:
        return {
            "engine": engine,
            "model": str(self._model),
            "dtype": self._args.dtype,
            "device": self._args.device,
            "blocks": blocks,
            "share_kv": self._args.share_kv and blocks is not None,
            "capture_sizes": self._args.capture_sizes,
        }


def run(args: argparse.Namespace) -> int:
    engines, solo = args.engines.split(","), [name for name in args.solo.split(",") if name]
    if unknown := {*engines, *solo} - set(ENGINES):
        raise SystemExit(f"--engines, --solo: unknown {sorted(unknown)}, expected some of {list(ENGINES)}")
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(args, _model_folder(args.model, Path(scratch)))
        try:
            session.start(engines)
            while args.wait_for and not args.wait_for.exists() and session.seconds_left() > 60:
                time.sleep(1)
            session.check()
            later_s = SOLO_START_S * len(solo) + PROFILE_S * args.profile
            for cell in args.cells:
                if not session.engines or session.seconds_left() <= later_s:
                    break
                session.measure(cell)
                if not session.rows(cell):
                    continue
                _write(args, session)
                print(table(session.rows(cell)), flush=True)
            if args.profile:
                session.profile()
            session.stop()
            for name in solo:
                if session.seconds_left() > 0:
                    session.start_alone(name)
        finally:
            session.stop()
        if not session.passes:
            return 1
        _write(args, session)
        print(table(session.rows()))
    return 0


def _write(args: argparse.Namespace, session: Session) -> None:
    report = session.report()
    out: Path = args.out or Path("bench/data") / f"engine-{_slug(report['device'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """One line a cell with tokens/s by contender, then the geometric means of the ratios."""
    cells: dict[Cell, dict[str, float]] = defaultdict(dict)
    for row in rows:
        cells[row["input_len"], row["output_len"], row["batch"]][row["contender"]] = row["tokens_per_s"]
    names = sorted({row["contender"] for row in rows})
    lines = ["in/out/batch".ljust(16) + "".join(name.rjust(16) for name in names)]
    for cell, by_name in cells.items():
        values = "".join(f"{by_name[name]:16.1f}" if name in by_name else " " * 16 for name in names)
        lines.append("/".join(map(str, cell)).ljust(16) + values)
    for ours, theirs in (
        ("nestedfp-16bit", "vllm-16bit"),
        ("nestedfp-fp8", "vllm-fp8"),
        ("nestedfp-fp8", "vllm-16bit"),
        ("nestedfp-fp8", "nestedfp-16bit"),
    ):
        ratios = [by[ours] / by[theirs] for by in cells.values() if ours in by and theirs in by]
        if ratios:
            lines.append(
                f"{ours} / {theirs}: geometric mean {geometric_mean(ratios):.3f}, worst {min(ratios):.3f}"
            )
    return "\n".join(lines)


def rows_of(
    model: str, dtype: str, passes: Iterable[dict[str, Any]], facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Medians over the passes of each contender and cell; `facts` are those of the engines by name."""
    cells: dict[tuple[int, int, int, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in passes:
        cells[entry["input_len"], entry["output_len"], entry["batch"], entry["contender"]].append(entry)
    rows = []
    for (input_len, output_len, batch, contender), entries in cells.items():
        speeds = [entry["tokens_per_s"] for entry in entries]
        rows.append(
            {
                "model": model,
                "dtype": dtype,
                "contender": contender,
                "input_len": input_len,
                "output_len": output_len,
                "batch": batch,
                "tokens_per_s": median(speeds),
                "tokens_per_s_min": min(speeds),
                "tokens_per_s_max": max(speeds),
                "passes": len(speeds),
                "ttft_ms": median(entry["ttft_ms"] for entry in entries),
                "tpot_ms": median(entry["tpot_ms"] for entry in entries),
                "memory_bytes": facts[CONTENDERS[contender][0]]["memory"]["weights_bytes"],
            }
        )
    return rows


def _cells(text: str) -> list[Cell]:
    try:
        cells = [tuple(int(part) for part in cell.split("/")) for cell in text.split(",")]
        return [(i, o, b) for i, o, b in cells]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected in/out/batch such as 128/128/32") from error


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected sizes such as 1,8,32") from error


def _model_folder(model: str, scratch: Path) -> Path:
    if model not in CONFIGURATIONS:
        if not (Path(model) / "config.json").is_file():
            raise SystemExit(
                f"--model: {model!r} is neither one of {list(CONFIGURATIONS)} nor a model folder"
            )
        return Path(model)
    folder = scratch / model
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGURATIONS[model]))
    return folder


def _slug(device: str) -> str:
    return "-".join(device.lower().replace("(r)", "").split())
