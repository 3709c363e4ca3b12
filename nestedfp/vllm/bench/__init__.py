"""`nestedfp bench engine`: plain vLLM, vLLM's online FP8 and NestedFP in both modes over one grid.

All engines are started at once, each in a process of its own on the same device, and take turns: within a
cell the contenders run in order, then in reverse order, and so on (A-B-B-A), while the others stand still.
Weights are random, normal with standard deviation 0.02, from a configuration alone, so no checkpoint is
needed. Every contender warms each cell up by a short pass, which is not counted. Cells come in the order of
what they tell, and the file is written after each, so that a run that is cut off is still of use. An engine
that fails is dropped, with the end of its output kept under `failures`; the others go on.

The engines share the card: `--blocks` gives each the same KV cache, and with `--share-kv` its memory exists
only for the engine whose turn it is. `--solo` starts each engine once more, alone, with the card to itself:
that gives the start-up time with warm caches and the number of KV-cache blocks at the same memory setting.

The file written holds a header (device, driver, versions, date of the last run, settings), `rows` (one a
contender and cell: medians over the passes, with the spread of the throughput, and the date of the last of
them), `engines` with start-up and memory and, for
NestedFP engines, `checks`: flips before every step, their cost, and whether greedy tokens in 16 bits were
the same afterwards; `solo`; `failures`; and, with `--profile`, `profiles`: what each kernel adds to decode
and prefill steps of each contender, in microseconds. With `--keep` it also holds what an earlier run on such
a device found for other cells, dtypes and models.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from nestedfp.vllm.bench.grid import ENGINES, GRID, parse_cells, parse_sizes
from nestedfp.vllm.bench.models import CONFIGURATIONS, model_folder
from nestedfp.vllm.bench.report import merged, slug, table
from nestedfp.vllm.bench.session import Session

SOLO_START_S = 60
"""Time kept free for each start after the grid, under a time limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-3.1-8b", help=f"{', '.join(CONFIGURATIONS)}, or a folder")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"some of {', '.join(ENGINES)}, or none")
    parser.add_argument(
        "--cells", type=parse_cells, default=GRID, help="in/out/batch,... (default: the whole grid)"
    )
    parser.add_argument("--passes", type=int, default=3, help="counted passes a cell")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="GPUs of one host that each engine is spread over"
    )
    parser.add_argument(
        "--blocks", type=int, default=4096, help="KV-cache blocks (of 16 tokens on a GPU) of every engine"
    )
    parser.add_argument(
        "--max-model-len", type=int, default=2048, help="of every engine: more, for cells of longer prompts"
    )
    parser.add_argument(
        "--share-kv", action="store_true", help="KV-cache memory exists only for the engine whose turn it is"
    )
    parser.add_argument(
        "--capture-sizes", type=parse_sizes, help="batch sizes to capture graphs for (default: vLLM's list)"
    )
    parser.add_argument(
        "--solo", default="", help="engines to start again alone at the end, on the whole card"
    )
    parser.add_argument(
        "--fuse-silu",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether NestedFP's MLPs compute their activation in the product before it",
    )
    parser.add_argument(
        "--profile", action="store_true", help="time decode and prefill steps by kernel, before the grid"
    )
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which to stop")
    parser.add_argument(
        "--wait-for", type=Path, help="time nothing before this file exists (or the time limit is near)"
    )
    parser.add_argument("--logs", type=Path, help="folder for the engines' output (default: not kept)")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: bench/data/engine-<device>.json, or tensor-parallel-<GPUs>-<device>.json",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep what the file holds of other cells, dtypes and models"
    )


def run(args: argparse.Namespace) -> int:
    engines, solo = ([name for name in names.split(",") if name] for names in (args.engines, args.solo))
    if unknown := {*engines, *solo} - set(ENGINES):
        raise SystemExit(f"--engines, --solo: unknown {sorted(unknown)}, expected some of {list(ENGINES)}")
    if args.share_kv and args.tensor_parallel > 1:
        raise SystemExit("--share-kv: the workers must live in the engines' processes; drop it")
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(args, model_folder(args.model, Path(scratch)), Path(scratch))
        try:
            session.start(engines)
            while args.wait_for and not args.wait_for.exists() and session.seconds_left() > 60:
                time.sleep(1)
            session.check()
            if args.profile:
                session.profile()
                _write(args, session)
            later_s = SOLO_START_S * len(solo)
            for cell in args.cells:
                if not session.engines or session.seconds_left() <= later_s:
                    break
                session.measure(cell, later_s)
                if not session.rows(cell):
                    continue
                _write(args, session)
                print(table(session.rows(cell)), flush=True)
            session.stop()
            for name in solo:
                if session.seconds_left() > 0:
                    session.start_alone(name)
        finally:
            session.stop()
        if not session.passes and not session.solo:
            return 1
        _write(args, session)
        print(table(session.rows()))
    return 0


def _write(args: argparse.Namespace, session: Session) -> None:
    report = session.report()
    kind = f"tensor-parallel-{args.tensor_parallel}" if args.tensor_parallel > 1 else "engine"
    out: Path = args.out or Path("bench/data") / f"{kind}-{slug(report['device'])}.json"
    if args.keep and out.is_file():
        report = merged(json.loads(out.read_text()), report)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
