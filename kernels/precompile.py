"""`nestedfp compile kernels`: machine code of the CUDA C++ kernels before it is needed, without a GPU.

What a weight needs is every configuration that the tables hold for it, and that the kernels' rules choose
for other numbers of tokens. Threads compile side by side, since NVRTC does not hold Python's lock, and leave
their work in the cache that products look into; a product that meets one under way waits for it.
"""

import argparse
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from nestedfp.kernels.dispatch import TABLES, Backend, Capability, Mode, rows_of, table_name
from nestedfp.kernels.gated import TURN
from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8
from nestedfp.kernels.hopper.cuda.compile import cache_folder
from nestedfp.kernels.hopper.fp8 import RULE as RULE_FP8
from nestedfp.kernels.hopper.linear_16bit import RULE as RULE_16BIT
from nestedfp.kernels.shapes import GATE_UP, SHAPES, Shape, parse_shapes

log = logging.getLogger("vllm.nestedfp")

HOPPER: Capability = (9, 0)
_MOST_THREADS = 16
# Of a step. Products of more find what they need among the same.
_MOST_TOKENS = 8192
AnyConfig = gemm_16bit.Config | gemm_fp8.Config


class Recipe(NamedTuple):
    """One piece of machine code. `macros` tells pieces apart: configurations that differ in how a launch is
    cut share one. gated: as `nestedfp.kernels.gated` has it."""

    mode: Mode
    dtype: torch.dtype
    config: AnyConfig
    gated: bool = False

    @property
    def macros(self) -> tuple[object, ...]:
        return self.mode, self.dtype, *sorted(self.config.defines(self.dtype, self.gated).items())

    def compile(self) -> None:
        """Leaves the machine code in the cache."""
        if isinstance(self.config, gemm_fp8.Config):
            gemm_fp8.code(self.config, self.dtype, self.gated)
        else:
            gemm_16bit.code(self.config, self.dtype, self.gated)


def recipes(N: int, K: int, dtype: torch.dtype, gated: bool = False, device: str = "") -> list[Recipe]:
    """What products of a weight [N, K] can need on Hopper, gated ones or others, each once. device: whose own
    table counts, too."""
    found: dict[tuple[object, ...], Recipe] = {}
    name = str(dtype).removeprefix("torch.")

    def add(mode: Mode, config: AnyConfig) -> None:
        recipe = Recipe(mode, dtype, config, gated)
        found.setdefault(recipe.macros, recipe)

    for mode, kind, configs in (
        (Mode.BITS16, gemm_16bit.Config, RULE_16BIT.all(_MOST_TOKENS, N, K)),
        (Mode.FP8, gemm_fp8.Config, RULE_FP8.all(_MOST_TOKENS, N, K)),
    ):
        for row in rows_of(Backend.HOPPER, HOPPER, mode, name, N, K, device):
            add(mode, kind(**row.config))
        for config in configs:
            add(mode, config)
    return list(found.values())


class Precompiler:
    """Compiles in the background what weights need on a device, each piece once."""

    def __init__(self, threads: int, device: str = "") -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nestedfp-compile")
        self._known: dict[tuple[object, ...], Future[None]] = {}
        self._weights: set[tuple[int, int, torch.dtype, bool]] = set()

    def add(self, N: int, K: int, dtype: torch.dtype, gated: bool = False) -> None:
        if (N, K, dtype, gated) in self._weights:
            return
        self._weights.add((N, K, dtype, gated))
        for recipe in recipes(N, K, dtype, gated, self._device):
            if recipe.macros not in self._known:
                self._known[recipe.macros] = self._pool.submit(recipe.compile)

    def wait(self) -> list[str]:
        """Waits for everything added so far; returns the complaints of what failed, which the product that
        needs it will raise."""
        errors = [future.exception() for future in self._known.values()]
        return [str(error) for error in errors if error is not None]

    def __len__(self) -> int:
        return len(self._known)


def threads_beside_other_work() -> int:
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 2) // 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=parse_shapes, default=list(SHAPES), help="models, layers, MODEL/LAYER or NxK, ..."
    )
    parser.add_argument("--dtype", default="float16,bfloat16", help="some of float16,bfloat16")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="also for weights cut in so many parts"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--device", default="", help="as torch names it, if it has a table of its own, 'NVIDIA H200'"
    )


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    for name in ("tensor_parallel", "threads"):
        if (value := getattr(args, name)) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    if args.device and not (TABLES / (name := table_name(Backend.HOPPER, HOPPER, args.device))).is_file():
        raise SystemExit(f"--device is {args.device!r}, which has no table of its own ({name}); leave it out")
    precompiler = Precompiler(args.threads, args.device)
    for dtype in args.dtype.split(","):
        if dtype not in ("float16", "bfloat16"):
            raise SystemExit(f"--dtype: {dtype!r}, expected some of float16,bfloat16")
        for N, K, gated in needed(args.shapes, args.tensor_parallel):
            precompiler.add(N, K, getattr(torch, dtype), gated)
    complaints = precompiler.wait()
    for complaint in complaints:
        print(complaint)
    made = len(precompiler) - len(complaints)
    print(f"{made} kernels in {cache_folder()}, {time.monotonic() - start:.0f} s")
    return 1 if complaints else 0


def needed(shapes: Iterable[Shape], ways: int) -> set[tuple[int, int, bool]]:
    """(N, K, gated) of the products that engines run of `shapes`, whole and in `ways` parts.

    Engines gate the layers named gate_up. Of a weight that is named by its size either may be wanted.
    """
    found: set[tuple[int, int, bool]] = set()
    for shape in shapes:
        size = (shape.N, shape.K)
        by_size = shape.layer == f"{shape.N}x{shape.K}"
        for N, K in {size, *_parts([size], ways)}:
            if shape.layer != GATE_UP:
                found.add((N, K, False))
            if (shape.layer == GATE_UP or by_size) and N % (2 * TURN) == 0:
                found.add((N, K, True))
    return found


def _parts(sizes: Iterable[tuple[int, int]], ways: int) -> Iterable[tuple[int, int]]:
    """A layer is cut along N or along K, where that leaves equal parts."""
    for N, K in sizes:
        if N % ways == 0:
            yield N // ways, K
        if K % ways == 0:
            yield N, K // ways
