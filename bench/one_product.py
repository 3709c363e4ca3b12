"""Runs one product a few times and nothing else: what a profiler is pointed at.

    ncu --set full --clock-control none -k regex:gemm -s 2 -c 1 python bench/one_product.py fp8 256 4096 14336

Prints the relative error of the product, so that a profile of a wrong kernel is noticed.
"""

import argparse

import torch

from nestedfp.kernels import contest, gpu
from nestedfp.kernels.dispatch import Mode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=[*map(str, Mode), "cublas"])
    for size in ("M", "N", "K"):
        parser.add_argument(size, type=int)
    parser.add_argument("--dtype", choices=list(contest.DTYPES), default="float16")
    parser.add_argument("--calls", type=int, default=4)
    args = parser.parse_args()
    gpu.require_gpu("one_product")
    operands = contest.Operands(args.N, args.K, args.dtype, args.M)
    if args.mode == "cublas":
        contender = contest.cublas(operands, args.M)
    else:
        contender = contest.product(Mode(args.mode), operands, args.M)
    for call in range(args.calls):
        contender(call % operands.sets)
    torch.cuda.synchronize()
    print(f"relative error {contest.error(contender, operands, args.M):.2g}")


if __name__ == "__main__":
    main()
