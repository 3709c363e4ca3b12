"""`nestedfp tune kernels`: times each backend's candidates on this GPU and writes the table dispatch reads.

A table is `{"header": ..., "rows": [...]}`, one row a shape: {mode, dtype, M, N, K, us, config}, the fastest
configuration and its microseconds a call, FP8 with the quantiser. Candidates are the kernel's own and what
the package's table holds already; they are timed roughly, those near the best again, by turns. One that is
wrong or does not run is reported and left out.

They are timed as a server runs them. Of few tokens, Hopper's follow a small kernel of early start, as
torch.compile writes them between products, and ask for the next one's weights, which changes the order: of
those within 1 % of the best, the fastest alone is taken. A `down` layer follows the gated product of its MLP
besides. `us` holds all kernels of such a chain. Of many tokens, each candidate near the best runs alone until
the power limit has set its clock, as in a long prefill.

A run that was cut off goes on where it stopped: what the file holds is kept, unless `--anew`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor
from triton.errors import TritonError

from nestedfp.kernels import contest, gpu, hopper, linear_16bit, linear_fp8, rowfile
from nestedfp.kernels.compile_ahead import Job, compile_ahead
from nestedfp.kernels.contest import Operands
from nestedfp.kernels.dispatch import Backend, Config, Mode, table, table_name
from nestedfp.kernels.hopper.copy_tokens import copy_tokens
from nestedfp.kernels.shapes import DOWN, SHAPES, TOKENS, by_size, parse_shapes, parse_tokens
from nestedfp.kernels.timing import Contender, measure

_KEY = ("mode", "dtype", "M", "N", "K")
Cell = tuple[str, str, int, int, int]
Product = Callable[[Config], Contender]
_GPU_BACKENDS = [str(Backend.HOPPER), str(Backend.PORTABLE)]
# One pass can meet the GPU at a bad moment, and the best of a cell would be lost.
_ROUGH_US, _ROUGH_PASSES = 200.0, 2
# Of these passes, so many candidates within this of the best are timed again, and of these the nearest.
_MOST_NEAR, _NEAR, _NEAREST = 12, 1.08, 1.02
# Of few tokens, those within this of the best are as good.
_TIED = 1.01
# Up to so many tokens a product is timed behind a small kernel.
_FEW_TOKENS = 64
# From so many tokens on a product may reach the power limit, which sets the clock within some milliseconds.
_SETTLED_TOKENS, _SETTLE_US = 1024, 30_000.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = [str(mode) for mode in Mode]
    what = "models, layers, MODEL/LAYER or NxK, comma-separated (default: all)"
    parser.add_argument("--backend", choices=_GPU_BACKENDS, default=str(Backend.HOPPER))
    parser.add_argument("--shapes", type=parse_shapes, default=list(SHAPES), metavar="NAMES", help=what)
    parser.add_argument("--tokens", type=parse_tokens, default=list(TOKENS), metavar="M,M")
    parser.add_argument("--dtypes", nargs="+", choices=list(contest.DTYPES), default=list(contest.DTYPES))
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--passes", type=int, default=3, help="over the candidates near the best")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no cell after so many seconds")
    parser.add_argument("--anew", action="store_true", help="begin the table anew")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: of this tree the table of this device, kernels/tables/BACKEND-smXX*",
    )


def run(args: argparse.Namespace) -> int:
    gpu.require_gpu("nestedfp tune kernels")
    if args.passes < 1:
        raise SystemExit(f"--passes is {args.passes}, expected 1 or more")
    start = time.monotonic()
    out = args.out or default_path(Backend(args.backend))
    header = gpu.describe() | {"method": _method(args.passes)}
    rows = [] if args.anew else rowfile.read_rows(out, header)
    known = {tuple(row[name] for name in _KEY) for row in rows}
    todo = [cell for cell in cells(args) if cell not in known]
    print(f"{len(todo)} cells to tune, {len(known)} in {out}", flush=True)
    backend = import_module(f"nestedfp.kernels.{args.backend}")
    tried = {cell: _candidates(backend, Backend(args.backend), *cell) for cell in todo}
    for complaint in compile_ahead(_jobs(Backend(args.backend), tried)):
        print("compilation:", complaint)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    operands = gate_up = None
    down = {(shape.N, shape.K) for shape in (*SHAPES, *args.shapes) if shape.layer == DOWN}
    with gpu.ClockMonitor() as clocks:
        for mode, dtype, M, N, K in todo:
            if args.time_limit is not None and time.monotonic() - start > args.time_limit:
                print(f"time limit of {args.time_limit:g} s: stopped before {mode} {dtype} {M}x{N}x{K}")
                break
            if operands is None or (operands.N, operands.K, operands.dtype) != (N, K, dtype):
                operands = gate_up = None
                torch.cuda.empty_cache()
                operands = Operands(N, K, dtype, max(args.tokens))
                if (N, K) in down and backend is hopper and min(args.tokens) <= _FEW_TOKENS:
                    gate_up = Operands(2 * K, N, dtype, _FEW_TOKENS)
            configs = tried[mode, dtype, M, N, K]
            served = alone = _products(backend, Mode(mode), operands, partial(operands.x, M=M))
            if M <= _FEW_TOKENS and backend is hopper:
                served = _chained(backend, Mode(mode), operands, M, gate_up)
            best = fastest(served, alone, Mode(mode), configs, operands, M, args.passes)
            if best is None:
                print(f"{mode} {dtype} {M}x{N}x{K}: no candidate runs", flush=True)
                continue
            config, us = best
            row = {"mode": mode, "dtype": dtype, "M": M, "N": N, "K": K, "us": us, "config": dict(config)}
            rows = rowfile.merged(rows, [row], _KEY)
            rowfile.write(out, header | {"clocks": clocks.seen()}, rows)
            print(f"{mode} {dtype} {M}x{N}x{K}: {us:.2f} us of {len(configs)}: {dict(config)}", flush=True)
    print(f"{out}: {len(rows)} rows after {time.monotonic() - start:.0f} s")
    return 0


def default_path(backend: Backend) -> Path:
    """Where `dispatch.table` looks for the table of this device: its architecture's, where that is of this
    device or does not exist, or its own."""
    folder, capability = Path(__file__).parent / "tables", torch.cuda.get_device_capability()
    device = torch.cuda.get_device_name()
    path = folder / table_name(backend, capability)
    if path.is_file() and json.loads(path.read_text())["header"]["device"] != device:
        return folder / table_name(backend, capability, device)
    return path


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """(mode, dtype, M, N, K) to tune; those that share operands follow one another."""
    for N, K in by_size(args.shapes):
        for dtype in args.dtypes:
            for mode in args.modes:
                for M in args.tokens:
                    yield mode, dtype, M, N, K


def _candidates(
    module: ModuleType, backend: Backend, mode: str, dtype: str, M: int, N: int, K: int
) -> list[Config]:
    """The kernel's own, and what the package's table holds for this cell."""
    configs: list[Config] = module.candidates(Mode(mode), M, N, K, dtype)
    known = [
        dict(row.config)
        for row in table(backend, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
        if (row.mode, row.dtype, row.M, row.N, row.K) == (mode, dtype, M, N, K)
    ]
    return configs + [config for config in known if config not in configs]


def _jobs(backend: Backend, tried: Mapping[Cell, list[Config]]) -> list[Job]:
    return [
        Job(backend, Mode(mode), dtype, M, N, K, config)
        for (mode, dtype, M, N, K), configs in tried.items()
        for config in configs
    ]


def fastest(
    served: Product,
    alone: Product,
    mode: Mode,
    configs: list[Config],
    operands: Operands,
    M: int,
    passes: int,
) -> tuple[Config, float] | None:
    """The fastest of `configs` as `served`, or `alone` of those as good, and its microseconds as served. None
    where none runs and is right."""
    contenders: dict[str, Contender] = {}
    for number, config in enumerate(configs):
        contender = served(config)
        try:
            error = contest.error(alone(config), operands, M)
            contender(0)
        # What a launch raises where a configuration does not fit; a faulting one ends the process.
        except (RuntimeError, ValueError, TritonError) as failure:
            print(f"  left out, {failure}: {dict(config)}", flush=True)
            continue
        if error < contest.tolerance(mode, operands.dtype):
            contenders[str(number)] = contender
        else:
            print(f"  WRONG, relative error {error:.2g}: {dict(config)}", flush=True)
    if not contenders:
        return None
    settle_us = _SETTLE_US if M >= _SETTLED_TOKENS else 0.0
    sets = operands.sets
    rough = measure(contenders, sets, passes=_ROUGH_PASSES, repeats=1, graph_us=_ROUGH_US)
    near = _nearest(contenders, rough, _NEAR)
    times = measure(near, sets, passes=1, settle_us=settle_us)
    if passes > 1:
        again = measure(_nearest(near, times, _NEAREST), sets, passes=passes - 1, settle_us=settle_us)
        times = {name: times[name] + taken for name, taken in again.items()}
    order = us = {name: median(taken) for name, taken in times.items()}
    if alone is not served:
        tied = {name: alone(configs[int(name)]) for name in us if us[name] <= _TIED * min(us.values())}
        order = {name: median(taken) for name, taken in measure(tied, sets, passes=passes).items()}
    name = min(order, key=lambda name: order[name])
    return configs[int(name)], round(us[name], 3)


def _nearest(
    contenders: Mapping[str, Contender], times: Mapping[str, list[float]], within: float
) -> dict[str, Contender]:
    """At most `_MOST_NEAR` of the contenders, by each one's best pass: those `within` of the best of all."""
    least = {name: min(taken) for name, taken in times.items()}
    by_time = sorted(least, key=lambda name: least[name])
    most = within * least[by_time[0]]
    return {name: contenders[name] for name in by_time[:_MOST_NEAR] if least[name] <= most}


Planes = Callable[[int], tuple[Tensor, ...]]


def _chained(
    backend: ModuleType, mode: Mode, operands: Operands, M: int, gate_up: Operands | None
) -> Product:
    """Of tokens that a small kernel writes each time, or, with `gate_up`, that kernel and then the gated
    product; each product asks for the weights of the next."""
    own = partial(_planes, mode, operands)
    if gate_up is None:
        return _products(backend, mode, operands, _copied_tokens(operands, M), lambda i: own(i + 1))
    first, hidden = partial(_planes, mode, gate_up), _copied_tokens(gate_up, M)
    linear: Callable[..., Tensor] = linear_fp8 if mode is Mode.FP8 else linear_16bit

    def gated(i: int) -> Tensor:
        w = gate_up.nested(i % gate_up.sets)
        return linear(hidden(i), *first(i), w.row_exponent, order=w.order, ahead=own(i), gated=True)

    return _products(backend, mode, operands, gated, lambda i: first(i + 1))


def _planes(mode: Mode, operands: Operands, i: int) -> tuple[Tensor, ...]:
    """What a product of the mode reads of a weight; the sets go round."""
    w = operands.nested(i % operands.sets)
    return (w.upper,) if mode is Mode.FP8 else (w.upper, w.lower)


def _products(
    backend: ModuleType,
    mode: Mode,
    operands: Operands,
    tokens: Callable[[int], Tensor],
    next_planes: Planes | None = None,
) -> Product:
    """Of the tokens of a set; with `next_planes`, which is Hopper's, each asks for those."""
    linear: Callable[..., Tensor] = backend.linear_fp8 if mode is Mode.FP8 else backend.linear_16bit

    def call(config: Config, i: int) -> Tensor:
        w = operands.nested(i)
        more = {} if next_planes is None else {"ahead": next_planes(i)}
        planes = _planes(mode, operands, i)
        return linear(tokens(i), *planes, w.row_exponent, order=w.order, config=config, **more)

    return lambda config: partial(call, config)


def _copied_tokens(operands: Operands, M: int) -> Callable[[int], Tensor]:
    """The tokens of a set, written each time by a small kernel; the sets go round."""
    copies = [torch.empty_like(operands.x(i, M)) for i in range(operands.sets)]

    def copied(i: int) -> Tensor:
        at = i % operands.sets
        copy_tokens(operands.x(at, M), copies[at])
        return copies[at]

    return copied


def _method(passes: int) -> str:
    return (
        "CUDA graphs, random normal data, inputs rotated past the L2, candidates by turns; up to "
        f"M = {_FEW_TOKENS} behind a small kernel of early start and with it, `{DOWN}` behind that and the "
        "gated product of its MLP and with both, and of those within "
        f"{_TIED - 1:.0%} of the best the fastest alone; from M = {_SETTLED_TOKENS} on each at the clock "
        f"that the power limit leaves it after {_SETTLE_US / 1000:g} ms; us is the median of {passes} "
        "passes, FP8 with the quantiser"
    )
