"""One product as its threads run it: the caches it is blocked for and the OpenMP pool it borrows.

    threads   stage a share of the tokens each | barrier | take a share of the blocks of 16 rows each
    a block   for each slice of K: rebuild 16 rows into a float32 panel, once, and multiply it with three
              tokens at a time; then finish: scale, bias, round

Up to four tokens stream instead: their weights are rebuilt in registers and never stored. Roofs: memory
bandwidth up to a handful of tokens (two bytes a weight, in FP8 one), the float32 multiply-add rate beyond.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from llvmlite import ir

from nestedfp.kernels.cpu import micro, tokens
from nestedfp.kernels.cpu.emit import F32, I8, I16, I32, I64, NULL, PTR, VOID, Body, define, i64
from nestedfp.kernels.cpu.micro import STREAM_ROWS, TILE_TOKENS
from nestedfp.kernels.cpu.operands import BLOCK_ROWS, CHUNK, STREAM_TOKENS, Field, Variant

PANEL_PITCH = 640
"""Columns of the panel: 16 rows of 640 floats are 40 KiB, at home in an L2 and mostly in an L1."""

VARIANTS = tuple(Variant(fp8, bfloat16) for fp8 in (False, True) for bfloat16 in (False, True))


@dataclass(frozen=True)
class _Kernels:
    stage: ir.Function
    rebuild: ir.Function
    finish: ir.Function
    streams: dict[int, ir.Function]
    tiles: dict[int, ir.Function]


class _Slice(NamedTuple):
    """The columns [first, last) of K."""

    first: ir.Value
    last: ir.Value


def build_module() -> ir.Module:
    """A module with one function `linear_<variant>(fields)` for each of `VARIANTS`."""
    module = ir.Module("nestedfp_cpu")
    tiles = {count: micro.define_tile(module, count, PANEL_PITCH) for count in TILE_TOKENS}
    for fp8 in (False, True):
        rebuild = micro.define_rebuild(module, fp8, PANEL_PITCH)
        streams = {count: micro.define_stream(module, fp8, count) for count in STREAM_ROWS}
        for variant in (variant for variant in VARIANTS if variant.fp8 == fp8):
            stage, finish = tokens.define_stage(module, variant), tokens.define_finish(module, variant)
            _define_linear(module, variant, _Kernels(stage, rebuild, finish, streams, tiles))
    return module


def _define_linear(module: ir.Module, variant: Variant, kernels: _Kernels) -> None:
    def emit_region(b: Body, a: SimpleNamespace) -> None:
        _emit_region(b, _operands(b, a.fields), kernels)

    region = define(module, f"region_{variant.name}", {"fields": PTR}, emit_region)

    def emit(b: Body, a: SimpleNamespace) -> None:
        threads = b.load(a.fields, Field.THREADS, I64)
        with b.ir.if_else(b.ir.icmp_signed(">", threads, i64(1))) as (many, one):
            with many:
                count, no_flags = b.ir.trunc(threads, I32), ir.Constant(I32, 0)
                b.call("GOMP_parallel", VOID, region, a.fields, count, no_flags)
            with one:
                b.ir.call(region, [a.fields])

    define(module, f"linear_{variant.name}", {"fields": PTR}, emit, public=True)


def _operands(b: Body, fields: ir.Value) -> SimpleNamespace:
    """The fields by their names in lower case, and where this thread stands."""
    pointers = {Field.X, Field.UPPER, Field.LOWER, Field.EXPONENTS, Field.BIAS, Field.Y}
    pointers |= {Field.STAGED, Field.SCALE, Field.SUMS}
    values = {
        field.name.lower(): b.load(fields, field, PTR if field in pointers else I64)
        for field in Field
        if field is not Field.THREADS
    }
    # The pool may grant fewer threads than were asked for.
    thread, threads = (
        b.ir.sext(b.call(f"omp_get_{name}", I32), I64) for name in ("thread_num", "num_threads")
    )
    return SimpleNamespace(**values, thread=thread, threads=threads, pitch=_rounded_up(b, values["k"], CHUNK))


def _emit_region(b: Body, o: SimpleNamespace, kernels: _Kernels) -> None:
    sums = b.address(o.sums, b.ir.mul(o.thread, o.sums_pitch), F32)
    share = _share(b, o.m, o.thread, o.threads)
    b.ir.call(kernels.stage, [o.x, o.x_stride, o.staged, o.pitch, o.scale, o.k, *share])
    b.call("GOMP_barrier", VOID)

    blocks = b.ir.sdiv(_rounded_up(b, o.n, BLOCK_ROWS), i64(BLOCK_ROWS))
    with b.loop(*_share(b, blocks, o.thread, o.threads)) as block:
        first = b.ir.mul(block, i64(BLOCK_ROWS))
        rows = b.minimum(b.ir.sub(o.n, first), i64(BLOCK_ROWS))
        upper, lower = (b.address(byte, b.ir.mul(first, o.k), I8) for byte in (o.upper, o.lower))
        weight = [upper, lower, o.k, rows]
        b.clear(sums, b.ir.mul(o.sums_pitch, i64(4)))
        # Few tokens and many walk the same slices, so that a token's sums do not depend on its company.
        with b.loop(i64(0), o.pitch, PANEL_PITCH) as k:
            part = _Slice(k, b.minimum(o.pitch, b.ir.add(k, i64(PANEL_PITCH))))
            with b.ir.if_else(b.ir.icmp_signed("<=", o.m, i64(STREAM_TOKENS))) as (few, many):
                with few:
                    _emit_stream(b, o, kernels, weight, part, sums)
                with many:
                    _emit_panel(b, o, kernels, weight, part, sums)
        bias = b.ir.select(b.ir.icmp_unsigned("==", o.bias, NULL), o.bias, b.address(o.bias, first, I16))
        exponents, y = b.address(o.exponents, first, I8), b.address(o.y, first, I16)
        b.ir.call(kernels.finish, [sums, o.scale, exponents, bias, y, o.m, o.n, rows])


def _emit_stream(
    b: Body, o: SimpleNamespace, kernels: _Kernels, weight: list[ir.Value], part: _Slice, sums: ir.Value
) -> None:
    """By the smallest streaming kernel that holds all tokens."""
    least = 1
    for count, stream in kernels.streams.items():
        enough = b.ir.icmp_signed("<=", o.m, i64(count))
        with b.ir.if_then(b.ir.and_(b.ir.icmp_signed(">=", o.m, i64(least)), enough)):
            b.ir.call(stream, [*weight, part.first, part.last, o.staged, o.pitch, o.m, sums])
        least = count + 1


def _emit_panel(
    b: Body, o: SimpleNamespace, kernels: _Kernels, weight: list[ir.Value], part: _Slice, sums: ir.Value
) -> None:
    """The slice is rebuilt once and meets all tokens."""
    panel = b.local(ir.ArrayType(F32, BLOCK_ROWS * PANEL_PITCH))
    b.ir.call(kernels.rebuild, [*weight, part.first, part.last, panel])
    width = b.ir.sub(part.last, part.first)
    for count, first, last in _token_tiles(b, o.m):
        with b.loop(first, last, count) as m:
            x = b.address(b.address(o.staged, b.ir.mul(m, o.pitch), F32), part.first, F32)
            target = b.address(sums, b.ir.mul(m, i64(BLOCK_ROWS)), F32)
            b.ir.call(kernels.tiles[count], [x, o.pitch, panel, width, target])


def _token_tiles(b: Body, M: ir.Value) -> list[tuple[int, ir.Value, ir.Value]]:
    """Tile sizes, each with the tokens [first, last) it walks, for M of four or more.

    Threes, and twos for the last two or four: a lone token's few sums would wait for their own additions.
    """
    left = b.ir.srem(M, i64(3))
    spared = b.ir.select(b.ir.icmp_signed("==", left, i64(1)), i64(3), i64(0))
    threes = b.ir.sub(b.ir.sub(M, left), spared)
    return [(3, i64(0), threes), (2, threes, M)]


def _share(b: Body, count: ir.Value, thread: ir.Value, threads: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The part of range(count) that falls to `thread`."""
    first = b.ir.sdiv(b.ir.mul(count, thread), threads)
    last = b.ir.sdiv(b.ir.mul(count, b.ir.add(thread, i64(1))), threads)
    return first, last


def _rounded_up(b: Body, count: ir.Value, step: int) -> ir.Value:
    """`count` rounded up to a multiple of the power of two `step`."""
    return b.ir.and_(b.ir.add(count, i64(step - 1)), i64(-step))
