"""One product as its threads run it: the caches it blocks for and the OpenMP pool it borrows.

    threads   stage a share of the tokens each | barrier | take a share of the 16-row blocks each
    a block   for each slice of K: rebuild 16 rows into an L1-resident float32 panel, once,
              then multiply it with three tokens at a time; finish: scale, bias, round

One token streams instead: weights are rebuilt in registers and never stored. Roofs: memory bandwidth up to
a handful of tokens (two bytes a weight, in FP8 one), the float32 multiply-add rate beyond.
"""

from dataclasses import dataclass
from enum import IntEnum

from llvmlite import ir

from nestedfp.kernels.cpu import micro
from nestedfp.kernels.cpu.emit import F32, I1, I8, I16, I32, I64, PTR, VOID, Body, declare, define, i64
from nestedfp.kernels.cpu.micro import BLOCK_ROWS, TILE_TOKENS, Variant

PANEL_PITCH = 640
"""Columns of the panel: 16 rows of 640 floats are 40 KiB, at home in an L2 and mostly in an L1."""

VARIANTS = tuple(Variant(fp8, bfloat16) for fp8 in (False, True) for bfloat16 in (False, True))


class Field(IntEnum):
    """The operands of a product: positions in an array of 64-bit integers, addresses among them."""

    X = 0
    X_STRIDE = 1
    UPPER = 2
    LOWER = 3
    EXPONENTS = 4
    BIAS = 5
    Y = 6
    M = 7
    N = 8
    K = 9
    STAGED = 10
    SCALE = 11
    SUMS = 12
    THREADS = 13


@dataclass(frozen=True)
class _Kernels:
    stage: ir.Function
    rebuild: ir.Function
    stream: ir.Function
    finish: ir.Function
    tiles: dict[int, ir.Function]


def build_module() -> ir.Module:
    """A module with one function `linear_<variant>(fields)` for each of `VARIANTS`."""
    module = ir.Module("nestedfp_cpu")
    tiles = {tokens: micro.define_tile(module, tokens, PANEL_PITCH) for tokens in range(1, TILE_TOKENS + 1)}
    rebuild = {fp8: micro.define_rebuild(module, fp8, PANEL_PITCH) for fp8 in (False, True)}
    stream = {fp8: micro.define_stream(module, fp8) for fp8 in (False, True)}
    for variant in VARIANTS:
        stage, finish = micro.define_stage(module, variant), micro.define_finish(module, variant)
        kernels = _Kernels(stage, rebuild[variant.fp8], stream[variant.fp8], finish, tiles)
        region = define(
            module, f"region_{variant.name}", [PTR], lambda b, fields, k=kernels: _emit_region(b, fields, k)
        )
        define(
            module,
            f"linear_{variant.name}",
            [PTR],
            lambda b, fields, r=region: _emit_entry(b, fields, r),
            public=True,
        )
    return module


def _emit_entry(b: Body, fields: ir.Value, region: ir.Function) -> None:
    threads = b.load(fields, Field.THREADS, I64)
    fork = declare(b.module, "GOMP_parallel", ir.FunctionType(VOID, [PTR, PTR, I32, I32]))
    with b.ir.if_else(b.ir.icmp_signed(">", threads, i64(1))) as (many, one):
        with many:
            b.ir.call(fork, [region, fields, b.ir.trunc(threads, I32), ir.Constant(I32, 0)])
        with one:
            b.ir.call(region, [fields])


def _emit_region(b: Body, fields: ir.Value, kernels: _Kernels) -> None:
    x, upper, lower, exponents, bias, y, staged, scale, sums = (
        b.load(fields, field, PTR)
        for field in (
            Field.X,
            Field.UPPER,
            Field.LOWER,
            Field.EXPONENTS,
            Field.BIAS,
            Field.Y,
            Field.STAGED,
            Field.SCALE,
            Field.SUMS,
        )
    )
    M, N, K, stride = (b.load(fields, field, I64) for field in (Field.M, Field.N, Field.K, Field.X_STRIDE))
    pitch = _up(b, K, micro.CHUNK)
    thread, threads = (
        b.ir.sext(b.ir.call(declare(b.module, name, ir.FunctionType(I32, [])), []), I64)
        for name in ("omp_get_thread_num", "omp_get_num_threads")
    )
    sums = b.address(sums, b.ir.mul(thread, b.ir.mul(M, i64(BLOCK_ROWS))), F32)
    panel = b.local(ir.ArrayType(F32, BLOCK_ROWS * PANEL_PITCH))
    panel.align = 64

    b.ir.call(kernels.stage, [x, stride, staged, pitch, scale, K, *_share(b, M, thread, threads)])
    b.ir.call(declare(b.module, "GOMP_barrier", ir.FunctionType(VOID, [])), [])

    blocks = b.ir.sdiv(_up(b, N, BLOCK_ROWS), i64(BLOCK_ROWS))
    with b.loop(*_share(b, blocks, thread, threads)) as block:
        first = b.ir.mul(block, i64(BLOCK_ROWS))
        rows = b.minimum(b.ir.sub(N, first), i64(BLOCK_ROWS))
        upper_rows, lower_rows = (b.address(byte, b.ir.mul(first, K), I8) for byte in (upper, lower))
        with b.ir.if_else(b.ir.icmp_signed("==", M, i64(1))) as (one, many):
            with one:
                b.ir.call(kernels.stream, [staged, upper_rows, lower_rows, K, rows, sums])
            with many:
                count = b.ir.mul(M, i64(4 * BLOCK_ROWS))
                zero, plain = ir.Constant(I8, 0), ir.Constant(I1, 0)
                clear = declare(b.module, "llvm.memset.p0.i64", ir.FunctionType(VOID, [PTR, I8, I64, I1]))
                b.ir.call(clear, [sums, zero, count, plain])
                with b.loop(i64(0), pitch, PANEL_PITCH) as k:
                    end = b.minimum(pitch, b.ir.add(k, i64(PANEL_PITCH)))
                    b.ir.call(kernels.rebuild, [upper_rows, lower_rows, K, rows, k, end, panel])
                    _emit_tiles(b, kernels.tiles, b.address(staged, k, F32), pitch, panel, b.ir.sub(end, k), sums, M)
        bias_rows = b.ir.select(
            b.ir.icmp_unsigned("==", bias, ir.Constant(PTR, None)), bias, b.address(bias, first, I16)
        )
        operands = [sums, scale, b.address(exponents, first, I8), bias_rows, b.address(y, first, I16), N, M, rows]
        b.ir.call(kernels.finish, operands)


def _emit_tiles(
    b: Body,
    tiles: dict[int, ir.Function],
    x: ir.Value,
    pitch: ir.Value,
    panel: ir.Value,
    k: ir.Value,
    sums: ir.Value,
    M: ir.Value,
) -> None:
    """All M tokens in tiles of three, the rest in twos: a tile of one would wait for its own additions."""

    def run(tokens: int, first: ir.Value, last: ir.Value) -> None:
        with b.loop(first, last, tokens) as m:
            target = b.address(sums, b.ir.mul(m, i64(BLOCK_ROWS)), F32)
            b.ir.call(tiles[tokens], [b.address(x, b.ir.mul(m, pitch), F32), pitch, panel, k, target])

    left = b.ir.srem(M, i64(TILE_TOKENS))
    spare = b.ir.and_(b.ir.icmp_signed("==", left, i64(1)), b.ir.icmp_signed(">", M, i64(1)))
    threes = b.ir.sub(b.ir.sub(M, left), b.ir.select(spare, i64(TILE_TOKENS), i64(0)))
    run(TILE_TOKENS, i64(0), threes)
    twos = b.ir.sub(M, b.ir.srem(b.ir.sub(M, threes), i64(2)))
    run(2, threes, twos)
    run(1, twos, M)


def _share(b: Body, count: ir.Value, thread: ir.Value, threads: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The part of range(count) that falls to `thread`."""
    first, last = (
        b.ir.sdiv(b.ir.mul(count, index), threads) for index in (thread, b.ir.add(thread, i64(1)))
    )
    return first, last


def _up(b: Body, count: ir.Value, step: int) -> ir.Value:
    """`count` rounded up to a multiple of the power of two `step`."""
    return b.ir.and_(b.ir.add(count, i64(step - 1)), i64(-step))
