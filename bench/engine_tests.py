"""Runs the engine's tests on this machine's GPUs and records what they found in bench/data.

    python bench/engine_tests.py [--model llama-3.1-8b] [--only NAME,...] [--out FILE]

One pytest process for each runner of vLLM and dtype, all at once; with two GPUs, those of tensor parallelism
instead. `--only text` compares a real model's tokens with plain vLLM's; it needs the demonstration model in
the cache. Writes vllm-tests-<device>.json: device, versions, and for each run its date, the counts of
outcomes, the names of failures and the figures that its tests recorded; what was not run again stays in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from nestedfp.kernels import gpu, rowfile
from nestedfp.models import DEMO_MODEL

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "vllm"
SMALL = "llama-tiny"
TEXT = "text"
LIMIT_S = 540


def runs(model: str, devices: int) -> dict[str, dict[str, Any]]:
    """By name, what is run: the test file, the model, the dtype and the runner."""
    if devices > 1:
        file = "test_tensor_parallel_gpu.py"
        return {"tp2": {"file": file, "model": SMALL, "dtype": "float16", "runner": 2}}
    file = "test_engine_gpu.py"
    return {
        "float16-v2": {"file": file, "model": model, "dtype": "float16", "runner": 2},
        "float16-v1": {"file": file, "model": SMALL, "dtype": "float16", "runner": 1},
        "bfloat16-v2": {"file": file, "model": SMALL, "dtype": "bfloat16", "runner": 2},
        "bfloat16-v1": {"file": file, "model": SMALL, "dtype": "bfloat16", "runner": 1},
        TEXT: {"file": "test_model_gpu.py", "model": DEMO_MODEL, "dtype": "float16", "runner": 2},
    }


class Run:
    """A pytest process."""

    def __init__(self, name: str, what: dict[str, Any], folder: Path) -> None:
        self.name, self.what = name, what
        self._xml, self.log = folder / f"{name}.xml", folder / f"{name}.log"
        self._start = time.monotonic()
        environment = {
            **os.environ,
            "NESTEDFP_TEST_MODEL": what["model"],
            "NESTEDFP_TEST_DTYPE": what["dtype"],
            "VLLM_USE_V2_MODEL_RUNNER": str(what["runner"] - 1),
        }
        command = [sys.executable, "-m", "pytest", "--rootdir", str(ROOT), "-q", "-m", "gpu"]
        command += [f"--junitxml={self._xml}", str(TESTS / what["file"])]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)

    def result(self, seconds: float) -> dict[str, Any]:
        """What it found; an unfinished run is ended and counts as failed."""
        try:
            self._process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
        took = round(time.monotonic() - self._start, 1)
        found = read(self._xml) if self._xml.is_file() else {"complete": False}
        return {"name": self.name, "date": gpu.now(), **self.what, "seconds": took, **found}


def read(xml: Path) -> dict[str, Any]:
    """Outcomes, failures and recorded figures of pytest's XML report."""
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    figures: dict[str, float] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        found = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = found[0].tag if found else "passed"
        outcomes[{"failure": "failed", "error": "failed"}.get(outcome, outcome)] += 1
        if outcome in ("failure", "error"):
            failures[case.get("name", "")] = found[0].get("message", "")[:300]
        for entry in case.iter("property"):
            figures[entry.get("name", "")] = float(entry.get("value", "nan"))
    return {"complete": True, "outcomes": dict(outcomes), "failures": failures, "figures": figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMALL, help="for the run in float16 on the newer runner")
    parser.add_argument("--only", default="", help="names of runs")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all")
    parser.add_argument("--logs", type=Path, help="folder for the output of the tests (default: not kept)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    gpu.require_gpu("engine_tests")
    devices = torch.cuda.device_count()
    known = runs(args.model, devices)
    names = args.only.split(",") if args.only else [name for name in known if name != TEXT]
    if unknown := set(names) - known.keys():
        raise SystemExit(f"--only: unknown {sorted(unknown)}, expected some of {list(known)}")
    chosen = {name: known[name] for name in names}
    deadline = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = args.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        started = [Run(name, what, folder) for name, what in chosen.items()]
        results = [run.result(deadline - time.monotonic()) for run in started]
        for run, result in zip(started, results, strict=True):
            print(json.dumps(result))
            if result.get("failures") or not result["complete"]:
                print(f"--- {run.name}\n{run.log.read_text()[-2500:]}")
    several = f"{devices}x-" if devices > 1 else ""
    out = args.out or ROOT / "bench" / "data" / f"vllm-tests-{several}{gpu.slug()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text())["runs"] if out.is_file() else []
    made = rowfile.merged(before, results, ("name", "model"))
    report = {"header": {**gpu.describe(), "devices": devices}, "runs": made}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(out)
    return int(any(result.get("failures") or not result["complete"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
