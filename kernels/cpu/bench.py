"""Times the CPU products beside torch's own linear, which is what vLLM runs on a CPU without AVX-512.

Contenders take turns within each round and walk over enough copies of the weight to come from memory, as in
a model. One thread is timed by the processor time it used, so that other programs on the machine count less;
more are timed by the clock. Ratios are medians of the ratios within a round. Prints a table, writes JSON.

    python -m nestedfp.kernels.cpu.bench [--threads 1 2] [--rounds 9] [--out FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestedfp.kernels import cpu
from nestedfp.kernels.cpu.machine import describe, slug

SHAPES = {
    "SmolLM2-135M qkv": (960, 576),
    "SmolLM2-135M o": (576, 576),
    "SmolLM2-135M gate_up": (3072, 576),
    "SmolLM2-135M down": (576, 1536),
    "square": (4096, 4096),
}
TOKENS = (1, 4, 8, 16, 64, 256)
COLD_BYTES = 96 << 20
"""Weights walked over in turn when few tokens leave a product bound by memory: more than an L3 holds."""

COLD_TOKENS = 16

Product = Callable[[int], Tensor]


def contenders(M: int, N: int, K: int) -> tuple[dict[str, Product], int]:
    """Products of the i-th copy of a random weight with the same tokens, and the number of copies."""
    copies = max(2, -(-COLD_BYTES // (2 * N * K))) if M <= COLD_TOKENS else 2
    x = torch.randn(M, K, dtype=torch.float16)
    wide = x.float()
    plain = [torch.randn(N, K, dtype=torch.float16) * 0.1 for _ in range(copies)]
    single = [plain[0].float() for _ in range(max(2, copies // 2))]
    # Random bytes: codes that are NaN are left out, and so is 0, to which most lower bytes do not belong.
    upper = [torch.randint(1, 0x7F, (N, K), dtype=torch.uint8) for _ in range(copies)]
    lower = [torch.randint(0, 0x100, (N, K), dtype=torch.uint8) for _ in range(copies)]
    exponents = torch.zeros(N, dtype=torch.int8)
    return {
        "torch float16": lambda i: torch.nn.functional.linear(x, plain[i]),
        "torch float32": lambda i: torch.nn.functional.linear(wide, single[i % len(single)]),
        "16bit": lambda i: cpu.linear_16bit(x, upper[i], lower[i], exponents),
        "fp8": lambda i: cpu.linear_fp8(x, upper[i], exponents),
    }, copies


def measure(M: int, N: int, K: int, rounds: int) -> dict[str, Any]:
    products, copies = contenders(M, N, K)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(rounds + 1):
        for name, product in products.items():
            start = clock()
            for i in range(copies):
                product(i)
            if turn:
                seconds[name].append((clock() - start) / copies)
    return {
        "M": M,
        "N": N,
        "K": K,
        "copies": copies,
        "microseconds": {name: _spread([1e6 * s for s in times], 1) for name, times in seconds.items()},
        "16bit_over_torch": _ratio(seconds["torch float16"], seconds["16bit"]),
        "fp8_over_torch": _ratio(seconds["torch float16"], seconds["fp8"]),
        "fp8_over_16bit": _ratio(seconds["16bit"], seconds["fp8"]),
    }


def _line(entry: dict[str, Any]) -> str:
    times = {name: spread["median"] for name, spread in entry["microseconds"].items()}
    ratios = {
        name: entry[name]["median"] for name in ("16bit_over_torch", "fp8_over_torch", "fp8_over_16bit")
    }
    return (
        f"{entry['threads']} threads  {entry['layer']:21} {entry['N']:5} x {entry['K']:5}  M {entry['M']:3}"
        f"  16bit {times['16bit']:8.0f} us  fp8 {times['fp8']:8.0f} us  "
        + "  ".join(f"{name} {ratio:5.2f}" for name, ratio in ratios.items())
    )


def _ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    return _spread([a / b for a, b in zip(slow, fast, strict=True)], 3)


def _spread(values: list[float], digits: int) -> dict[str, float]:
    chosen = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in chosen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench/data") / f"cpu-{slug()}.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": describe(), "rounds": options.rounds, "runs": []}
    result["warm_up_seconds"] = round(cpu.warm_up(), 2)
    print("speed over torch float16, and FP8 over 16 bits: median of ratios within a round")
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for label, (N, K) in SHAPES.items():
            for M in TOKENS:
                entry = {"layer": label, "threads": threads, **measure(M, N, K, options.rounds)}
                result["runs"].append(entry)
                print(_line(entry), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
