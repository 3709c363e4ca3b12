"""Micro-kernels of the CPU products: widen or quantise tokens, rebuild weights, multiply, finish.

All work on float32 in vectors. K is walked in chunks of 16; where 16 does not divide K the last chunk
starts at K - 16 and overlaps the one before, and the staged tokens hold zeros where it does. So no kernel
reads past a row, and none has a scalar tail. K is at least 16.

The E4M3 reading costs nothing extra here: S EEEE MMM shifted to S0EEEEMM M0000000 is the float16 number
e4m3 * 2^-8, and the 16-bit reading only adds what the lower byte says beyond it.
"""

from dataclasses import dataclass

from llvmlite import ir

from nestedfp.kernels.cpu.emit import F16, F32, I8, I16, I32, I64, PTR, Body, define, i64, splat, vector

CHUNK = 16
LANES = 8
"""Lanes of a multiply: with AVX2, 4 rows by 3 tokens of 8 lanes fill 12 of 16 registers."""

BLOCK_ROWS = 16
"""Rows rebuilt at a time."""

TILE_ROWS = 4
TILE_TOKENS = 3

_E4M3_MAX = 448.0
_SMALLEST_AMAX = 2.0**-100
_F16X = vector(F16, CHUNK)
_F32X = vector(F32, CHUNK)
_I16X = vector(I16, CHUNK)
_I32X = vector(I32, CHUNK)


@dataclass(frozen=True)
class Variant:
    """One product: which weights it reads, and whether tokens are bfloat16 rather than float16."""

    fp8: bool
    bfloat16: bool

    @property
    def name(self) -> str:
        return f"{'fp8' if self.fp8 else '16bit'}_{'bfloat16' if self.bfloat16 else 'float16'}"


def define_stage(module: ir.Module, variant: Variant) -> ir.Function:
    """stage(x, stride, staged, pitch, scale, K, first, last): tokens [first, last) to float32 chunks.

    FP8: to their E4M3 values, as float32, and their scales amax / 448 (`kernels.reference.quantize`).
    """

    def emit(
        b: Body,
        x: ir.Value,
        stride: ir.Value,
        staged: ir.Value,
        pitch: ir.Value,
        scale: ir.Value,
        K: ir.Value,
        first: ir.Value,
        last: ir.Value,
    ) -> None:
        with b.loop(first, last) as m:
            source = b.address(x, b.ir.mul(m, stride), I16)
            target = b.address(staged, b.ir.mul(m, pitch), F32)
            inverse = None
            if variant.fp8:
                amax = _amax(b, variant, source, K)
                b.store(b.ir.fdiv(amax, splat(F32, _E4M3_MAX)), scale, m, F32)
                inverse = b.broadcast(b.ir.fdiv(splat(F32, _E4M3_MAX), amax), CHUNK)
            with b.loop(i64(0), K, CHUNK) as k:
                value = _widened(b, variant, source, _chunk_start(b, k, K))
                if inverse is not None:
                    value = _rounded_to_e4m3(b, b.ir.fmul(value, inverse))
                b.store(_without_overlap(b, value, k, K), target, k, F32)

    return define(module, f"stage_{variant.name}", [PTR, I64, PTR, I64, PTR, I64, I64, I64], emit)


def define_rebuild(module: ir.Module, fp8: bool, pitch: int) -> ir.Function:
    """rebuild(upper, lower, K, rows, first, last, panel): chunks of K in [first, last) of 16 rows as float32.

    `panel` [16, pitch] starts at `first`. Where the matrix ends, its last row is repeated.
    """

    def emit(
        b: Body,
        upper: ir.Value,
        lower: ir.Value,
        K: ir.Value,
        rows: ir.Value,
        first: ir.Value,
        last: ir.Value,
        panel: ir.Value,
    ) -> None:
        with b.loop(i64(0), i64(BLOCK_ROWS)) as r:
            row = b.ir.mul(b.minimum(r, b.ir.sub(rows, i64(1))), K)
            target = b.address(panel, b.ir.sub(b.ir.mul(r, i64(pitch)), first), F32)
            with b.loop(first, last, CHUNK) as k:
                offset = b.ir.add(row, _chunk_start(b, k, K))
                b.store(weights(b, fp8, upper, lower, offset), target, k, F32)

    return define(module, f"rebuild_{'fp8' if fp8 else '16bit'}", [PTR, PTR, I64, I64, I64, I64, PTR], emit)


def define_tile(module: ir.Module, tokens: int, pitch: int) -> ir.Function:
    """tile(x, x_pitch, panel, k, sums): adds the products of 16 rows with `tokens` tokens to sums [tokens, 16]."""

    def emit(b: Body, x: ir.Value, x_pitch: ir.Value, panel: ir.Value, k: ir.Value, sums: ir.Value) -> None:
        zero = splat(vector(F32, LANES), 0.0)
        with b.loop(i64(0), i64(BLOCK_ROWS), TILE_ROWS) as first:
            w = b.address(panel, b.ir.mul(first, i64(pitch)), F32)
            slots = [[b.local(zero.type) for _ in range(TILE_ROWS)] for _ in range(tokens)]
            for slot in (slot for row in slots for slot in row):
                b.ir.store(zero, slot)
            with b.loop(i64(0), k, LANES) as i:
                columns = [b.load(b.address(x, b.ir.mul(i64(c), x_pitch), F32), i, F32, LANES) for c in range(tokens)]
                for r in range(TILE_ROWS):
                    row = b.load(b.address(w, r * pitch, F32), i, F32, LANES)
                    for c in range(tokens):
                        slot = slots[c][r]
                        b.ir.store(b.fma(row, columns[c], b.ir.load(slot, typ=zero.type)), slot)
            for c in range(tokens):
                total = _transposed_sum(b, [b.ir.load(slot, typ=zero.type) for slot in slots[c]])
                offset = b.ir.add(first, i64(c * BLOCK_ROWS))
                b.store(b.ir.fadd(b.load(sums, offset, F32, TILE_ROWS), total), sums, offset, F32)

    return define(module, f"tile_{tokens}", [PTR, I64, PTR, I64, PTR], emit)


def define_stream(module: ir.Module, fp8: bool) -> ir.Function:
    """stream(x, upper, lower, K, rows, sums): sums [16] of 16 rows with one token, rebuilt in registers."""

    def emit(
        b: Body,
        x: ir.Value,
        upper: ir.Value,
        lower: ir.Value,
        K: ir.Value,
        rows: ir.Value,
        sums: ir.Value,
    ) -> None:
        with b.loop(i64(0), i64(BLOCK_ROWS), TILE_ROWS) as first:
            starts = [
                b.ir.mul(b.minimum(b.ir.add(first, i64(r)), b.ir.sub(rows, i64(1))), K) for r in range(TILE_ROWS)
            ]
            slots = [b.local(_F32X) for _ in range(TILE_ROWS)]
            for slot in slots:
                b.ir.store(splat(_F32X, 0.0), slot)
            with b.loop(i64(0), K, CHUNK) as k:
                start = _chunk_start(b, k, K)
                column = b.load(x, k, F32, CHUNK)
                for slot, row in zip(slots, starts, strict=True):
                    value = weights(b, fp8, upper, lower, b.ir.add(row, start))
                    b.ir.store(b.fma(value, column, b.ir.load(slot, typ=_F32X)), slot)
            b.store(_transposed_sum(b, [b.ir.load(slot, typ=_F32X) for slot in slots]), sums, first, F32)

    return define(module, f"stream_{'fp8' if fp8 else '16bit'}", [PTR, PTR, PTR, I64, I64, PTR], emit)


def define_finish(module: ir.Module, variant: Variant) -> ir.Function:
    """finish(sums, scale, exponents, bias, y, N, M, rows): sums [M, 16] scaled, biased and rounded into y.

    y [M, N], `exponents` and `bias` (or null) start at the block's first row, of which `rows` exist.
    """

    def emit(
        b: Body,
        sums: ir.Value,
        scale: ir.Value,
        exponents: ir.Value,
        bias: ir.Value,
        y: ir.Value,
        N: ir.Value,
        M: ir.Value,
        rows: ir.Value,
    ) -> None:
        has_bias = b.ir.icmp_unsigned("!=", bias, ir.Constant(PTR, None))

        def finish(first: ir.Value, lanes: int) -> None:
            biased = b.local(vector(F32, lanes) if lanes > 1 else F32)
            b.ir.store(splat(biased.allocated_type, 0.0), biased)
            with b.ir.if_then(has_bias):
                b.ir.store(_wide(b, variant, b.load(bias, first, I16, lanes)), biased)
            addend = b.ir.load(biased, typ=biased.allocated_type)
            power = _power_of_two(b, b.load(exponents, first, I8, lanes))
            with b.loop(i64(0), M) as m:
                total = b.load(sums, b.ir.add(b.ir.mul(m, i64(BLOCK_ROWS)), first), F32, lanes)
                if variant.fp8:
                    token = b.load(scale, m, F32)
                    total = b.ir.fmul(total, b.broadcast(token, lanes) if lanes > 1 else token)
                total = b.ir.fadd(b.ir.fmul(total, power), addend)
                b.store(_narrow(b, variant, total), y, b.ir.add(b.ir.mul(m, N), first), I16)

        whole = b.ir.icmp_signed("==", rows, i64(BLOCK_ROWS))
        with b.ir.if_else(whole) as (then, otherwise):
            with then:
                finish(i64(0), BLOCK_ROWS)
            with otherwise, b.loop(i64(0), rows) as row:
                finish(row, 1)

    return define(module, f"finish_{variant.name}", [PTR, PTR, PTR, PTR, PTR, I64, I64, I64], emit)


def weights(b: Body, fp8: bool, upper: ir.Value, lower: ir.Value, offset: ir.Value) -> ir.Value:
    """Sixteen weights at `offset` as float32: rebuilt from both bytes, or e4m3(upper) * 2^-8.

    With u the upper byte without its sign, the low fifteen bits of w are (u << 7) + d: upper was rounded from
    them, so d is between -64 and 127, and d = lower - (u << 7) modulo 256. That is `lower` with its top bit
    flipped where u is odd, read as a signed byte: the borrow of the format's contract without a branch.
    """
    high = b.load(upper, offset, I8, CHUNK)
    bits = b.ir.and_(b.ir.shl(b.ir.sext(high, _I16X), splat(_I16X, 7)), splat(_I16X, -0x4001))
    if not fp8:
        odd = b.ir.shl(high, splat(high.type, 7))
        rest = b.ir.xor(b.load(lower, offset, I8, CHUNK), odd)
        bits = b.ir.add(bits, b.ir.sext(rest, _I16X))
    return b.ir.fpext(b.ir.bitcast(bits, _F16X), _F32X)


def _chunk_start(b: Body, k: ir.Value, K: ir.Value) -> ir.Value:
    return b.minimum(k, b.ir.sub(K, i64(CHUNK)))


def _without_overlap(b: Body, value: ir.Value, k: ir.Value, K: ir.Value) -> ir.Value:
    """`value`, a chunk read at min(k, K - 16), with zeros in the lanes before k."""
    lane = ir.Constant(_I32X, list(range(CHUNK)))
    repeated = b.broadcast(b.ir.trunc(b.ir.sub(k, _chunk_start(b, k, K)), I32), CHUNK)
    return b.ir.select(b.ir.icmp_signed(">=", lane, repeated), value, splat(_F32X, 0.0))


def _widened(b: Body, variant: Variant, x: ir.Value, offset: ir.Value) -> ir.Value:
    return _wide(b, variant, b.load(x, offset, I16, CHUNK))


def _wide(b: Body, variant: Variant, bits: ir.Value) -> ir.Value:
    """The float32 values of 16-bit floats given as integers."""
    lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 1
    half, wide, full = (vector(t, lanes) if lanes > 1 else t for t in (F16, I32, F32))
    if variant.bfloat16:
        return b.ir.bitcast(b.ir.shl(b.ir.zext(bits, wide), splat(wide, 16)), full)
    return b.ir.fpext(b.ir.bitcast(bits, half), full)


def _narrow(b: Body, variant: Variant, value: ir.Value) -> ir.Value:
    """float32 rounded to the nearest 16-bit float, ties to even, as integers."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
    half, short, wide = (vector(t, lanes) if lanes > 1 else t for t in (F16, I16, I32))
    if not variant.bfloat16:
        return b.ir.bitcast(b.ir.fptrunc(value, half), short)
    bits = b.ir.bitcast(value, wide)
    odd = b.ir.and_(b.ir.lshr(bits, splat(wide, 16)), splat(wide, 1))
    rounded = b.ir.add(b.ir.add(bits, splat(wide, 0x7FFF)), odd)
    # A NaN must not be carried into a number or an infinity.
    unordered = b.ir.fcmp_unordered("uno", value, value)
    chosen = b.ir.select(unordered, b.ir.or_(bits, splat(wide, 0x400000)), rounded)
    return b.ir.trunc(b.ir.lshr(chosen, splat(wide, 16)), short)


def _power_of_two(b: Body, exponents: ir.Value) -> ir.Value:
    """2^e as float32 for signed bytes e, by building the exponent field."""
    lanes = exponents.type.count if isinstance(exponents.type, ir.VectorType) else 1
    wide, full = (vector(t, lanes) if lanes > 1 else t for t in (I32, F32))
    biased = b.ir.add(b.ir.sext(exponents, wide), splat(wide, 127))
    return b.ir.bitcast(b.ir.shl(biased, splat(wide, 23)), full)


def _magnitude(b: Body, value: ir.Value) -> ir.Value:
    return b.intrinsic(f"llvm.fabs.v{CHUNK}f32", _F32X, value)


def _amax(b: Body, variant: Variant, x: ir.Value, K: ir.Value) -> ir.Value:
    """The largest magnitude of a token, at least 2^-100."""
    slot = b.local(_F32X)
    b.ir.store(splat(_F32X, _SMALLEST_AMAX), slot)
    with b.loop(i64(0), K, CHUNK) as k:
        value = _magnitude(b, _widened(b, variant, x, _chunk_start(b, k, K)))
        known = b.ir.load(slot, typ=_F32X)
        b.ir.store(b.ir.select(b.ir.fcmp_ordered(">", value, known), value, known), slot)
    return b.intrinsic(f"llvm.vector.reduce.fmax.v{CHUNK}f32", F32, b.ir.load(slot, typ=_F32X))


def _rounded_to_e4m3(b: Body, value: ir.Value) -> ir.Value:
    """`value`, at most 448 in magnitude, rounded to the nearest E4M3 number, ties to even; still float32.

    E4M3 numbers of exponent e are multiples of 2^(e-3), and below 2^-6 of 2^-9. Adding 2^(e+20), whose float32
    neighbours are that far apart, rounds to such a multiple; subtracting it again is exact.
    """
    magnitude = _magnitude(b, value)
    exponent = b.ir.and_(b.ir.bitcast(magnitude, _I32X), splat(_I32X, 0x7F800000))
    smallest = splat(_I32X, (127 - 6) << 23)
    exponent = b.ir.select(b.ir.icmp_signed(">", exponent, smallest), exponent, smallest)
    magic = b.ir.bitcast(b.ir.add(exponent, splat(_I32X, 20 << 23)), _F32X)
    rounded = b.ir.fsub(b.ir.fadd(magnitude, magic), magic)
    return b.intrinsic(f"llvm.copysign.v{CHUNK}f32", _F32X, rounded, value)


def _transposed_sum(b: Body, vectors: list[ir.Value]) -> ir.Value:
    """The vector of the lane sums of `vectors`: pairs are interleaved and added until one is left."""
    while len(vectors) > 1:
        lanes = vectors[0].type.count
        vectors = [_pair_sum(b, left, right, lanes) for left, right in zip(vectors[::2], vectors[1::2], strict=True)]
    total = vectors[0]
    while total.type.count > TILE_ROWS:
        half = total.type.count // 2
        low, high = (b.shuffle(total, total, list(range(s, s + half))) for s in (0, half))
        total = b.ir.fadd(low, high)
    return total


def _pair_sum(b: Body, left: ir.Value, right: ir.Value, lanes: int) -> ir.Value:
    """In each group of four lanes: the sums of two pairs of `left`, then of `right`."""
    even, odd = ([q + s for q in range(0, lanes, 4) for s in _pair_lanes(o, lanes)] for o in (0, 1))
    return b.ir.fadd(b.shuffle(left, right, even), b.shuffle(left, right, odd))


def _pair_lanes(odd: int, lanes: int) -> list[int]:
    return [odd, odd + 2, lanes + odd, lanes + odd + 2]
