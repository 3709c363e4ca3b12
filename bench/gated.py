"""Times gated products on this machine's GPU beside products whose SiLU has a kernel of its own.

    python bench/gated.py [--tokens M,M] [--passes N]

Of the gate_up layers of four models. That kernel is what torch.compile makes of silu(gate) * up, started
early as the plugin has it. Writes gated-<device>.json with rows as `nestedfp bench kernels` has them; each
baseline is a product named before the plus sign, and that kernel.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nestedfp.kernels import contest, gpu, linear_16bit, linear_fp8, rowfile
from nestedfp.kernels.bench import entry, line
from nestedfp.kernels.compile_ahead import chosen
from nestedfp.kernels.contest import CUBLAS, Operands
from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.gated import silu_and_multiply
from nestedfp.kernels.shapes import SHAPES, Shape, by_size, parse_tokens
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


def gated(mode: Mode, operands: Operands, M: int) -> Contender:
    """The gated product; which rows are whose does not change its time."""

    def bits16(i: int) -> Tensor:
        w = operands.nested(i)
        return linear_16bit(operands.x(i, M), w.upper, w.lower, w.row_exponent, order=w.order, gated=True)

    def fp8(i: int) -> Tensor:
        w = operands.nested(i)
        return linear_fp8(operands.x(i, M), w.upper, w.row_exponent, order=w.order, gated=True)

    return fp8 if mode is Mode.FP8 else bits16


def followed(product: Contender, compiled: Contender) -> Contender:
    """`product` and then SiLU's kernel."""
    return lambda i: compiled(product(i))


def check(ours: Contender, product: Contender) -> None:
    """Raises RuntimeError where a gated product is not that of `product`."""
    y, expected = ours(0), silu_and_multiply(product(0))
    error = float((y.float() - expected.float()).norm() / expected.float().norm())
    if not error < _TOLERANCE:
        raise RuntimeError(f"gated product: relative error {error:.2g}, expected less than {_TOLERANCE}")


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
    rows: list[rowfile.Row] = []
    layers = [shape for shape in SHAPES if shape.layer == "gate_up"]
    with gpu.ClockMonitor() as clocks:
        for (N, K), shapes in by_size(layers).items():
            for dtype in contest.DTYPES:
                operands = Operands(N, K, dtype, max(args.tokens))
                for M in args.tokens:
                    rows += cell(shapes, operands, M, partial(followed, compiled=compiled), args.passes)
                del operands
                torch.cuda.empty_cache()
    out = ROOT / "bench" / "data" / f"gated-{gpu.slug()}.json"
    rowfile.write(out, header | {"clocks": clocks.seen()}, rows)
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
        product = contest.product(mode, operands, M)
        contenders[str(mode)] = gated(mode, operands, M)
        check(contenders[str(mode)], product)
        contenders[f"{mode} {OWN}"] = with_silu(product)
        against[mode] = {OWN + SILU: f"{mode} {OWN}", CUBLAS + SILU: CUBLAS + SILU}
    for name, product in contest.fp8_baselines(operands, M).items():
        contenders[name + SILU] = with_silu(product)
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
