"""Tokens on their way in and out: 16-bit floats to float32, or to E4M3 values, and sums back to 16 bits.

K is walked in chunks of 16. Where 16 does not divide K the last chunk starts at K - 16 and overlaps the one
before, and the staged tokens hold zeros where it does: no kernel reads past a row, and none has a scalar
tail. K is at least 16.
"""

from types import SimpleNamespace

from llvmlite import ir

from nestedfp.kernels.cpu.emit import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    NULL,
    PTR,
    Body,
    define,
    i64,
    lanes_of,
    splat,
    vector,
)
from nestedfp.kernels.cpu.operands import BLOCK_ROWS, CHUNK, Variant

_E4M3_MAX = 448.0
_SMALLEST_AMAX = 2.0**-100
_FLOATS = vector(F32, CHUNK)
_INTEGERS = vector(I32, CHUNK)


def chunk_start(b: Body, k: ir.Value, K: ir.Value) -> ir.Value:
    return b.minimum(k, b.ir.sub(K, i64(CHUNK)))


def define_stage(module: ir.Module, variant: Variant) -> ir.Function:
    """Tokens [first, last) of x, `stride` elements apart, to float32 chunks `pitch` floats apart in `staged`.

    FP8: to their E4M3 values, still as float32, and their scales amax / 448, as `kernels.reference.quantize`.
    """

    def emit(b: Body, a: SimpleNamespace) -> None:
        with b.loop(a.first, a.last) as m:
            source = b.address(a.x, b.ir.mul(m, a.stride), I16)
            target = b.address(a.staged, b.ir.mul(m, a.pitch), F32)
            inverse = None
            if variant.fp8:
                amax = _amax(b, variant, source, a.K)
                b.store(b.ir.fdiv(amax, splat(F32, _E4M3_MAX)), a.scale, m, F32)
                inverse = b.broadcast(b.ir.fdiv(splat(F32, _E4M3_MAX), amax), CHUNK)
            with b.loop(i64(0), a.K, CHUNK) as k:
                value = _widened(b, variant, b.load(source, chunk_start(b, k, a.K), I16, CHUNK))
                if inverse is not None:
                    value = _rounded_to_e4m3(b, b.ir.fmul(value, inverse))
                b.store(_without_overlap(b, value, k, a.K), target, k, F32)

    parameters = {
        "x": PTR,
        "stride": I64,
        "staged": PTR,
        "pitch": I64,
        "scale": PTR,
        "K": I64,
        "first": I64,
        "last": I64,
    }
    return define(module, f"stage_{variant.name}", parameters, emit)


def define_finish(module: ir.Module, variant: Variant) -> ir.Function:
    """Sums [M, 16], times token scales and row powers of two, plus bias (or null), rounded into y [M, N].

    `exponents`, `bias` and `y` start at the block's first row, of which `rows` exist.
    """

    def emit(b: Body, a: SimpleNamespace) -> None:
        def finish(row: ir.Value, lanes: int) -> None:
            addend = b.local(vector(F32, lanes), splat(vector(F32, lanes), 0.0))
            with b.ir.if_then(b.ir.icmp_unsigned("!=", a.bias, NULL)):
                b.ir.store(_widened(b, variant, b.load(a.bias, row, I16, lanes)), addend)
            bias = b.ir.load(addend, typ=vector(F32, lanes))
            power = _power_of_two(b, b.load(a.exponents, row, I8, lanes))
            with b.loop(i64(0), a.M) as m:
                total = b.load(a.sums, b.ir.add(b.ir.mul(m, i64(BLOCK_ROWS)), row), F32, lanes)
                if variant.fp8:
                    total = b.ir.fmul(total, b.broadcast(b.load(a.scale, m, F32), lanes))
                total = b.ir.fadd(b.ir.fmul(total, power), bias)
                b.store(_narrowed(b, variant, total), a.y, b.ir.add(b.ir.mul(m, a.N), row), I16)

        with b.ir.if_else(b.ir.icmp_signed("==", a.rows, i64(BLOCK_ROWS))) as (whole, cut):
            with whole:
                finish(i64(0), BLOCK_ROWS)
            with cut, b.loop(i64(0), a.rows) as row:
                finish(row, 1)

    parameters = {
        "sums": PTR,
        "scale": PTR,
        "exponents": PTR,
        "bias": PTR,
        "y": PTR,
        "M": I64,
        "N": I64,
        "rows": I64,
    }
    return define(module, f"finish_{variant.name}", parameters, emit)


def _widened(b: Body, variant: Variant, bits: ir.Value) -> ir.Value:
    """The float32 values of 16-bit floats given as integers."""
    half, wide, full = (vector(element, lanes_of(bits.type)) for element in (F16, I32, F32))
    if variant.bfloat16:
        return b.ir.bitcast(b.ir.shl(b.ir.zext(bits, wide), splat(wide, 16)), full)
    return b.ir.fpext(b.ir.bitcast(bits, half), full)


def _narrowed(b: Body, variant: Variant, value: ir.Value) -> ir.Value:
    """float32 rounded to the nearest 16-bit float, ties to even, as integers."""
    half, short, wide = (vector(element, lanes_of(value.type)) for element in (F16, I16, I32))
    if not variant.bfloat16:
        return b.ir.bitcast(b.ir.fptrunc(value, half), short)
    bits = b.ir.bitcast(value, wide)
    odd = b.ir.and_(b.ir.lshr(bits, splat(wide, 16)), splat(wide, 1))
    rounded = b.ir.add(b.ir.add(bits, splat(wide, 0x7FFF)), odd)
    # Rounding could carry a NaN into an infinity or a number: make it quiet instead.
    quiet = b.ir.or_(bits, splat(wide, 0x400000))
    chosen = b.ir.select(b.ir.fcmp_unordered("uno", value, value), quiet, rounded)
    return b.ir.trunc(b.ir.lshr(chosen, splat(wide, 16)), short)


def _power_of_two(b: Body, exponents: ir.Value) -> ir.Value:
    """2^e as float32 for signed bytes e above -127, by building the exponent field."""
    wide, full = (vector(element, lanes_of(exponents.type)) for element in (I32, F32))
    biased = b.ir.add(b.ir.sext(exponents, wide), splat(wide, 127))
    return b.ir.bitcast(b.ir.shl(biased, splat(wide, 23)), full)


def _without_overlap(b: Body, value: ir.Value, k: ir.Value, K: ir.Value) -> ir.Value:
    """`value`, a chunk read at min(k, K - 16), with zeros in the lanes before k."""
    lane = ir.Constant(_INTEGERS, list(range(CHUNK)))
    overlap = b.broadcast(b.ir.trunc(b.ir.sub(k, chunk_start(b, k, K)), I32), CHUNK)
    return b.ir.select(b.ir.icmp_signed(">=", lane, overlap), value, splat(_FLOATS, 0.0))


def _amax(b: Body, variant: Variant, x: ir.Value, K: ir.Value) -> ir.Value:
    """The largest magnitude of a token, at least 2^-100."""
    slot = b.local(_FLOATS, splat(_FLOATS, _SMALLEST_AMAX))
    with b.loop(i64(0), K, CHUNK) as k:
        value = b.intrinsic("fabs", _widened(b, variant, b.load(x, chunk_start(b, k, K), I16, CHUNK)))
        known = b.ir.load(slot, typ=_FLOATS)
        b.ir.store(b.ir.select(b.ir.fcmp_ordered(">", value, known), value, known), slot)
    return b.intrinsic("vector.reduce.fmax", b.ir.load(slot, typ=_FLOATS), result=F32)


def _rounded_to_e4m3(b: Body, value: ir.Value) -> ir.Value:
    """`value`, at most 448 in magnitude, rounded to the nearest E4M3 number, ties to even; still float32.

    E4M3 numbers of exponent e are multiples of 2^(e-3), and of 2^-9 below 2^-6. Adding 2^(e+20), whose
    float32 neighbours are that far apart, rounds to such a multiple; subtracting it again is exact.
    """
    magnitude = b.intrinsic("fabs", value)
    exponent = b.ir.and_(b.ir.bitcast(magnitude, _INTEGERS), splat(_INTEGERS, 0x7F800000))
    smallest = splat(_INTEGERS, (127 - 6) << 23)
    exponent = b.ir.select(b.ir.icmp_signed(">", exponent, smallest), exponent, smallest)
    magic = b.ir.bitcast(b.ir.add(exponent, splat(_INTEGERS, 20 << 23)), _FLOATS)
    return b.intrinsic("copysign", b.ir.fsub(b.ir.fadd(magnitude, magic), magic), value)
