"""`nestedfp bench kernels`: both products beside cuBLAS and the FP8 products of torch and vLLM.

Times are taken under CUDA graphs (`timing`): inputs rotated past the L2 cache, all contenders of a cell in
one process by turns, the median of the passes. Each product is checked before it is timed.

Writes `{"header": ..., "rows": [...]}`; a row is one product beside one baseline:
{mode, dtype, model, layer, M, N, K, us, us_min, us_max, baseline, baseline_us, baseline_us_min,
baseline_us_max, ratio, ratio_min, ratio_max, passes, backend, config, date}; `ratio` is us / baseline_us,
its spread that of the ratios within a pass. config null: the kernel's own rule.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from nestedfp.kernels import contest, gpu, rowfile
from nestedfp.kernels.compile_ahead import Job, chosen, compile_ahead
from nestedfp.kernels.contest import CUBLAS, CUTLASS, SCALED_MM, Operands
from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.shapes import (
    SHAPES,
    TOKEN_GROUPS,
    TOKENS,
    Shape,
    by_size,
    parse_shapes,
    parse_tokens,
    traffic,
)
from nestedfp.kernels.timing import Contender, measure

_KEY = ("mode", "dtype", "model", "layer", "M", "N", "K", "baseline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = [str(mode) for mode in Mode]
    what = "models, layers, MODEL/LAYER or NxK, comma-separated (default: all)"
    parser.add_argument("--shapes", type=parse_shapes, default=list(SHAPES), metavar="NAMES", help=what)
    parser.add_argument("--tokens", type=parse_tokens, default=list(TOKENS), metavar="M,M")
    parser.add_argument("--dtypes", nargs="+", choices=list(contest.DTYPES), default=list(contest.DTYPES))
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no cell after so many seconds")
    parser.add_argument("--append", action="store_true", help="keep the file's rows of other cells")
    parser.add_argument("--out", type=Path, help="default: bench/data/kernels-DEVICE.json")


def run(args: argparse.Namespace) -> int:
    gpu.require_gpu("nestedfp bench kernels")
    if args.passes < 1:
        raise SystemExit(f"--passes is {args.passes}, expected 1 or more")
    start = time.monotonic()
    out = args.out or Path("bench/data") / f"kernels-{gpu.slug()}.json"
    header = gpu.describe() | {"method": _method(args.passes)}
    old = rowfile.read_rows(out, header) if args.append else []
    modes = [Mode(mode) for mode in args.modes]
    groups = by_size(args.shapes)
    jobs = [
        chosen(mode, dtype, M, N, K)
        for mode in modes for dtype in args.dtypes for N, K in groups for M in args.tokens
    ]  # fmt: skip
    for complaint in compile_ahead(jobs):
        print("compilation:", complaint)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    header["ceilings"] = gpu.ceilings()
    print("ceilings:", header["ceilings"], flush=True)
    rows: list[rowfile.Row] = []
    with gpu.ClockMonitor() as clocks:
        for (N, K), shapes in groups.items():
            if _over(start, args.time_limit):
                print(f"time limit of {args.time_limit:g} s: {N}x{K} and what follows not timed")
                break
            operands = {dtype: Operands(N, K, dtype, max(args.tokens)) for dtype in args.dtypes}
            for M in args.tokens:
                if _over(start, args.time_limit):
                    print(f"time limit of {args.time_limit:g} s: {N}x{K} not timed from M = {M} on")
                    break
                rows += cell(shapes, M, modes, operands, args.passes)
            rowfile.write(out, header | {"clocks": clocks.seen()}, rowfile.merged(old, rows, _KEY))
            print(f"-- {N}x{K} done after {time.monotonic() - start:.0f} s", flush=True)
            del operands
            torch.cuda.empty_cache()
    print(summary(rows))
    print(out)
    return 0


def _over(start: float, limit: float | None) -> bool:
    return limit is not None and time.monotonic() - start > limit


def _method(passes: int) -> str:
    quantiser = "scaled_fp8_quant of vLLM" if contest.vllm_quantiser() else "our own quantiser (no vLLM here)"
    return (
        "CUDA graphs, random normal data, inputs rotated past the L2, contenders interleaved in one process, "
        f"median of {passes} passes. FP8 baselines are fed by {quantiser}; row-wise torch._scaled_mm gives "
        "bfloat16 whatever the tokens' type."
    )


def cell(
    shapes: Sequence[Shape], M: int, modes: Sequence[Mode], operands: Mapping[str, Operands], passes: int
) -> list[rowfile.Row]:
    """Times every contender for M tokens of one [N, K], prints a line a product, returns the rows."""
    contenders: dict[str, Contender] = {}
    pairs: list[tuple[Mode, str, str, list[str]]] = []
    for dtype, inputs in operands.items():
        contenders[f"{CUBLAS} {dtype}"] = contest.cublas(inputs, M)
        for mode in modes:
            name = f"{mode} {dtype}"
            contenders[name] = contest.product(mode, inputs, M)
            error = contest.error(contenders[name], inputs, M)
            # Written so that NaN does not pass.
            if not error < contest.tolerance(mode, dtype):
                print(f"WRONG: {name}, {M}x{inputs.N}x{inputs.K}: relative error {error:.2g}; not timed")
                del contenders[name]
                continue
            baselines = contest.fp8_baselines(inputs, M) if mode is Mode.FP8 else {}
            contenders |= {f"{baseline} {dtype}": work for baseline, work in baselines.items()}
            pairs.append((mode, dtype, name, [CUBLAS, *baselines]))
    sets = next(iter(operands.values())).sets
    times = measure(contenders, sets, passes=passes)
    rows: list[rowfile.Row] = []
    for mode, dtype, name, baselines_of in pairs:
        job = chosen(mode, dtype, M, shapes[0].N, shapes[0].K)
        against = {baseline: times[f"{baseline} {dtype}"] for baseline in baselines_of}
        print(line(job, shapes, times[name], against), flush=True)
        rows += [
            entry(job, shape, times[name], baseline, taken)
            for shape in shapes
            for baseline, taken in against.items()
        ]
    return rows


def entry(
    job: Job, shape: Shape, times: Sequence[float], baseline: str, baseline_times: Sequence[float]
) -> rowfile.Row:
    """A row of the file; times in microseconds, one a pass."""
    ratios = [ours / theirs for ours, theirs in zip(times, baseline_times, strict=True)]
    us, baseline_us = median(times), median(baseline_times)
    return {
        "mode": str(job.mode), "dtype": job.dtype, "model": shape.model, "layer": shape.layer,
        "M": job.M, "N": job.N, "K": job.K,
        "us": round(us, 3), "us_min": round(min(times), 3), "us_max": round(max(times), 3),
        "baseline": baseline, "baseline_us": round(baseline_us, 3),
        "baseline_us_min": round(min(baseline_times), 3), "baseline_us_max": round(max(baseline_times), 3),
        "ratio": round(us / baseline_us, 4),
        "ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4), "passes": len(times),
        "backend": str(job.backend), "config": None if job.config is None else dict(job.config),
        "date": gpu.now(),
    }  # fmt: skip


def line(
    job: Job, shapes: Sequence[Shape], times: Sequence[float], against: Mapping[str, Sequence[float]]
) -> str:
    """One product in words: us, TFLOP/s, TB/s, time over each baseline, configuration."""
    us = median(times)
    bytes_moved = traffic(job.mode, job.M, job.N, job.K)
    ratios = " ".join(f"{name} {us / median(taken):.3f}" for name, taken in against.items())
    config = "rule" if job.config is None else " ".join(f"{k}={v}" for k, v in job.config.items())
    name = "+".join(f"{shape.model}/{shape.layer}" for shape in shapes)
    return (
        f"{job.mode:6} {job.dtype:8} {name} {job.N}x{job.K} M={job.M}: {us:.2f} us "
        f"{2 * job.M * job.N * job.K / us / 1e6:.0f} TFLOP/s {bytes_moved / us / 1e6:.2f} TB/s  "
        f"over {ratios}  [{job.backend} {config}]"
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Geometric mean (worst) of the ratios, by mode, dtype and baseline, over each group of M."""
    lines = [f"{'time over':44}" + "".join(f"{group:>20}" for group in TOKEN_GROUPS)]
    for mode in Mode:
        for dtype in contest.DTYPES:
            for baseline in (CUBLAS, SCALED_MM, CUTLASS):
                cells = []
                for group in TOKEN_GROUPS.values():
                    ratios = [
                        row["ratio"] for row in rows
                        if (row["mode"], row["dtype"], row["baseline"]) == (mode, dtype, baseline)
                        and row["M"] in group
                    ]  # fmt: skip
                    cells.append(f"{geometric_mean(ratios):.3f} ({max(ratios):.3f})" if ratios else "")
                if any(cells):
                    lines.append(f"{f'{mode} {dtype} / {baseline}':44}" + "".join(f"{c:>20}" for c in cells))
    return "\n".join(lines)
