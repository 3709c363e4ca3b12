"""Times gated products on this machine's GPU beside products whose SiLU has a kernel of its own.

    python bench/gated.py [--tokens M,M] [--passes N]

Of the gate_up layers of four models. That kernel is what torch.compile makes of silu(gate) * up, started
early as the plugin has it. Writes gated-<device>.json with rows as `nestedfp bench kernels` has them; each
baseline is a product named before the plus sign, and that kernel.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from nestedfp.kernels import contest, gpu, rowfile
from nestedfp.kernels.bench import entry, line
from nestedfp.kernels.compile_ahead import chosen
from nestedfp.kernels.contest import CUBLAS, Operands
from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.gated import silu_and_multiply
from nestedfp.kernels.precompile import Precompiler
from nestedfp.kernels.shapes import GATE_UP, SHAPES, Shape, by_size, parse_tokens
from nestedfp.kernels.timing import Contender, measure

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [1, 16, 64, 128, 256, 512, 1024, 2048, 8192]
OWN, SILU = "own product", " + silu"
_METHOD = (
    "CUDA graphs, random normal data, inputs rotated past the L2, contenders interleaved in one process, "
    "median of {} passes; SiLU by torch.compile with early starts."
)
_TOLERANCE = 1e-2


def silu_and_mul(products: Tensor) -> Tensor:
    """silu of the first half of the columns times the second, as models write it."""
    gate, up = products.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def followed(work: Contender, compiled: Callable[[object], object]) -> Contender:
    """A product and then SiLU's kernel."""
    return lambda i: compiled(work(i))


def error(ours: Contender, plain: Contender) -> float:
    """Relative, in norm, of a gated product beside the one made of plain ones."""
    y, products = ours(0), plain(0)
    assert isinstance(y, Tensor)
    assert isinstance(products, Tensor)
    expected = silu_and_multiply(products)
    return float((y.float() - expected.float()).norm() / expected.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=parse_tokens, default=TOKENS, metavar="M,M")
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    if args.passes < 1:
        parser.error(f"--passes is {args.passes}, expected 1 or more")
    gpu.require_gpu("gated.py")
    torch._inductor.config.triton.enable_pdl = True
    compiled = torch.compile(silu_and_mul, dynamic=True)
    header = gpu.describe() | {"method": _METHOD.format(args.passes)}
    out = ROOT / "bench" / "data" / f"gated-{gpu.slug()}.json"
    rows: list[rowfile.Row] = []
    groups = by_size([shape for shape in SHAPES if shape.layer == GATE_UP])
    kernels = Precompiler(os.cpu_count() or 1)
    for (N, K), dtype, kind in product(groups, contest.DTYPES.values(), (False, True)):
        kernels.add(N, K, dtype, kind)
    for complaint in kernels.wait():
        print("compilation:", complaint)
    with gpu.ClockMonitor() as clocks:
        for ((N, K), shapes), dtype in product(groups.items(), contest.DTYPES):
            operands = Operands(N, K, dtype, max(args.tokens))
            for M in args.tokens:
                rows += cell(shapes, operands, M, partial(followed, compiled=compiled), args.passes)
            rowfile.write(out, header | {"clocks": clocks.seen()}, rows)
            del operands
            torch.cuda.empty_cache()
    print(out)


def cell(
    shapes: Sequence[Shape],
    operands: Operands,
    M: int,
    with_silu: Callable[[Contender], Contender],
    passes: int,
) -> list[rowfile.Row]:
    """Times every contender for M tokens of one weight and dtype, prints a line a mode, returns the rows."""
    contenders = {CUBLAS + SILU: with_silu(contest.cublas(operands, M))}
    against: dict[Mode, dict[str, str]] = {}
    for mode in Mode:
        plain, ours = (contest.product(mode, operands, M, gated) for gated in (False, True))
        # Written so that NaN does not pass.
        if not (found := error(ours, plain)) < _TOLERANCE:
            print(f"WRONG: {mode} {operands.dtype}, {M}x{operands.N}x{operands.K}: {found:.2g}; not timed")
            continue
        contenders |= {str(mode): ours, f"{mode} {OWN}": with_silu(plain)}
        against[mode] = {OWN + SILU: f"{mode} {OWN}", CUBLAS + SILU: CUBLAS + SILU}
    if Mode.FP8 in against:
        for name, baseline in contest.fp8_baselines(operands, M).items():
            contenders[name + SILU] = with_silu(baseline)
            against[Mode.FP8][name + SILU] = name + SILU
    times = measure(contenders, operands.sets, passes=passes)
    rows: list[rowfile.Row] = []
    for mode, baselines in against.items():
        job = chosen(mode, operands.dtype, M, operands.N, operands.K)
        taken = {baseline: times[name] for baseline, name in baselines.items()}
        print(line(job, shapes, times[str(mode)], taken), flush=True)
        rows += [
            entry(job, shape, times[str(mode)], baseline, baseline_times)
            for shape in shapes
            for baseline, baseline_times in taken.items()
        ]
    return rows


if __name__ == "__main__":
    main()
