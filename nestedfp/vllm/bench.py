"""`nestedfp bench engine`: plain vLLM, vLLM's online FP8 and NestedFP in both modes over one grid.

Every engine runs in a process of its own, one after the other, in the order given (write A,B,B,A to
alternate). Weights are random, normal with standard deviation 0.02, from a configuration alone, so no
checkpoint is needed. Each cell is warmed up by its own first pass, which is not counted.

The file written holds a header (device, driver, versions, date, settings), `rows` (one a contender and
cell: medians over all passes, with the spread of the throughput) and, for NestedFP engines, `checks`:
flips before every step, their cost, and whether greedy tokens in 16 bits were the same afterwards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

CONTENDERS = ("vllm-16bit", "vllm-fp8", "nestedfp")
"""Engines; `nestedfp` gives rows for `nestedfp-16bit` and `nestedfp-fp8`."""

GRID = [(i, o, b) for i, o in ((128, 128), (1024, 64), (32, 512)) for b in (1, 8, 32, 128, 256, 512)]

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
    parser.add_argument(
        "--engines", default="nestedfp,vllm-16bit,vllm-fp8", help="engines in order; a name may come again"
    )
    parser.add_argument(
        "--cells", type=_cells, default=GRID, help="in/out/batch,... (default: the whole grid)"
    )
    parser.add_argument("--passes", type=int, default=3, help="counted passes a cell")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--blocks", type=int, help="the same number of KV-cache blocks for every engine")
    parser.add_argument(
        "--capture-sizes", type=_sizes, help="batch sizes to capture graphs for (default: vLLM's own list)"
    )
    parser.add_argument("--seconds", type=float, help="start no engine after this many seconds")
    parser.add_argument("--out", type=Path, help="default: bench/data/engine-<device>.json")


def run(args: argparse.Namespace) -> int:
    engines = args.engines.split(",")
    if unknown := set(engines) - set(CONTENDERS):
        raise SystemExit(f"--engines: unknown {sorted(unknown)}, expected some of {list(CONTENDERS)}")
    start = time.monotonic()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = _model_folder(args.model, Path(scratch))
        for engine in engines:
            if args.seconds and time.monotonic() - start > args.seconds:
                print(f"no time left for {engine}", flush=True)
                break
            print(f"starting {engine}", flush=True)
            result = _measure(engine, model, args, Path(scratch) / "result.json")
            if result is None:
                continue
            results.append(result)
            out = args.out or Path("bench/data") / f"engine-{_slug(result['device'])}.json"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(_report(args, results), indent=1) + "\n")
            print(f"wrote {out}", flush=True)
    if not results:
        return 1
    print(table(_rows(args, results)))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """One line a cell with tokens/s by contender, then the geometric means of the ratios."""
    cells: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
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


def _measure(engine: str, model: Path, args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """One engine in a process of its own; None, and the reason printed, where it failed."""
    task = {
        "engine": engine,
        "model": str(model),
        "dtype": args.dtype,
        "device": args.device,
        "cells": args.cells,
        "passes": args.passes,
        "blocks": args.blocks,
        "capture_sizes": args.capture_sizes,
        "out": str(out),
    }
    command = [sys.executable, "-m", "nestedfp.vllm.contender", json.dumps(task)]
    code = subprocess.run(command, check=False).returncode
    if code:
        print(f"{engine} failed with exit status {code}; its output is above", flush=True)
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _report(args: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": results[0]["device"],
        "versions": results[0]["versions"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {**results[0]["settings"], "passes": args.passes, "weights": "normal, deviation 0.02"},
        "order": [result["engine"] for result in results],
        "engines": [
            {key: result[key] for key in ("engine", "start_s", "memory", "checks") if key in result}
            for result in results
        ],
        "rows": _rows(args, results),
    }


def _rows(args: argparse.Namespace, results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the passes of all engines of a kind."""
    passes: dict[tuple[str, int, int, int], list[dict[str, float]]] = defaultdict(list)
    memory: dict[str, int] = {}
    for result in results:
        for entry in result["passes"]:
            cell = (entry["contender"], entry["input_len"], entry["output_len"], entry["batch"])
            passes[cell].append(entry)
            memory[entry["contender"]] = result["memory"]["weights_bytes"]
    rows = []
    for (contender, input_len, output_len, batch), entries in passes.items():
        speeds = [entry["tokens_per_s"] for entry in entries]
        rows.append(
            {
                "model": args.model,
                "dtype": args.dtype,
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
                "memory_bytes": memory[contender],
            }
        )
    return rows


def _cells(text: str) -> list[tuple[int, int, int]]:
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
