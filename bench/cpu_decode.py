"""End-to-end speed on a CPU: plain vLLM against NestedFP in both precisions, turn by turn.

Two engines stay loaded, each in a process of its own with one thread; in every round each contender runs the
same requests once, in an order that rotates. Writes bench/data/cpu-decode-<machine>.json.

    python bench/cpu_decode.py [--model PATH] [--rounds 7]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nestedfp.kernels.cpu.machine import describe, slug

CONTENDERS = {"plain": ("plain", ""), "fp16": ("nested", "fp16"), "fp8": ("nested", "fp8")}
BATCHES = (1, 8)
OUTPUT_TOKENS = 32
PROMPT_TOKENS = 256
DATA = Path(__file__).parent / "data"

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Contestant:
    """An engine in a child process that answers one JSON line with another."""

    def __init__(self, kind: str, model: str) -> None:
        command = [sys.executable, __file__, "--serve", kind, "--model", model]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"the engine's process ended with {self._process.wait()}")

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


async def serve(kind: str, model: str) -> None:
    """Answers the parent's questions until it closes the pipe."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from nestedfp.vllm import engine_arguments
    from nestedfp.vllm.control import EngineControl

    arguments = engine_arguments("cpu") if kind == "nested" else {}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype="float16",
            max_model_len=1024,
            max_num_seqs=max(BATCHES),
            enforce_eager=True,
            enable_prefix_caching=False,
            **arguments,
        )
    )
    control = EngineControl(engine)
    epoch = 0
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            question = json.loads(line)
            if question["mode"]:
                epoch += 1
                await control.set_target(question["mode"], epoch=epoch, reason="benchmark")
            print(
                json.dumps(await _measure(engine, question["batch"], question["prompt"], epoch)), flush=True
            )
    finally:
        engine.shutdown()


async def _measure(engine: Any, batch: int, prompt: int, epoch: int) -> dict[str, float]:
    """Tokens a second of a batch that decodes together, and of its prefill."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    start = time.perf_counter()

    async def one(index: int) -> tuple[float, float]:
        tokens = {"prompt_token_ids": [1 + (7 * index + i) % 4000 for i in range(prompt)]}
        first = 0.0
        async for _ in engine.generate(tokens, sampling, f"{start}-{epoch}-{index}"):
            first = first or time.perf_counter()
        return first, time.perf_counter()

    times = await asyncio.gather(*(one(index) for index in range(batch)))
    first, last = max(t[0] for t in times), max(t[1] for t in times)
    return {
        "prefill_tokens_per_s": batch * prompt / (first - start),
        "decode_tokens_per_s": batch * (OUTPUT_TOKENS - 1) / (last - first),
    }


def run(model: str, rounds: int) -> dict[str, Any]:
    processes = {kind: Contestant(kind, model) for kind in ("plain", "nested")}
    try:
        cases = [{"batch": batch, "prompt": 8} for batch in BATCHES] + [{"batch": 1, "prompt": PROMPT_TOKENS}]
        names = list(CONTENDERS)
        for kind, mode in CONTENDERS.values():
            processes[kind].ask(mode=mode, batch=2, prompt=8)
        samples: list[dict[str, list[dict[str, Any]]]] = [{name: [] for name in names} for _ in cases]
        for turn in range(rounds):
            for case, seen in zip(cases, samples, strict=True):
                for name in names[turn % 3 :] + names[: turn % 3]:
                    kind, mode = CONTENDERS[name]
                    seen[name].append(processes[kind].ask(mode=mode, **case))
                latest = {name: round(seen[name][-1][_metric(case)], 1) for name in names}
                print(f"round {turn + 1} of {rounds}: {case} {latest}", file=sys.stderr, flush=True)
    finally:
        for process in processes.values():
            process.close()
    return {
        "machine": describe(),
        "engine_threads": 1,
        "model": Path(model).name,
        "rounds": rounds,
        "cases": [_summary(case, seen) for case, seen in zip(cases, samples, strict=True)],
    }


def _summary(case: dict[str, int], seen: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and spread, and the medians of the ratios that were taken within one round."""
    metric = _metric(case)
    rates = {name: [sample[metric] for sample in samples] for name, samples in seen.items()}

    def ratio(one: str, other: str) -> dict[str, float]:
        return _spread([a / b for a, b in zip(rates[one], rates[other], strict=True)])

    return {
        **case,
        "metric": metric,
        "tokens_per_s": {name: _spread(values) for name, values in rates.items()},
        "fp16_over_plain": ratio("fp16", "plain"),
        "fp8_over_plain": ratio("fp8", "plain"),
        "fp8_over_fp16": ratio("fp8", "fp16"),
    }


def _metric(case: dict[str, int]) -> str:
    return "prefill_tokens_per_s" if case["prompt"] == PROMPT_TOKENS else "decode_tokens_per_s"


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a checkpoint; the demonstration model by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=("plain", "nested"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.model))
        return
    from nestedfp.models import demo_model

    result = run(options.model or str(demo_model()), options.rounds)
    DATA.mkdir(exist_ok=True)
    path = DATA / f"cpu-decode-{slug()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["cases"]:
        rates = "  ".join(f"{name} {rate['median']:7.1f}" for name, rate in case["tokens_per_s"].items())
        ratios = "  ".join(
            f"{name} {case[name]['median']:.2f}"
            for name in ("fp16_over_plain", "fp8_over_plain", "fp8_over_fp16")
        )
        print(f"batch {case['batch']}, prompt {case['prompt']:3}: {case['metric']}  {rates}  {ratios}")
    print(path)


if __name__ == "__main__":
    main()
