"""Micro-kernels: weights rebuilt in registers, and products of rows with tokens.

    rebuild   16 rows of a slice of K -> a float32 panel
    tile      panel x three tokens: 12 sums of 8 lanes fill AVX2, 7 loads feed 12 multiply-adds
    stream    rows x up to four tokens straight from the bytes, never stored

Roofs: one multiply-add of 8 lanes a sum and step in `tile`; in `stream` the memory, or for weights from a
cache the conversion from float16, 4 cycles for 16 weights on a Zen 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from llvmlite import ir

from nestedfp.kernels.cpu.emit import F16, F32, I8, I16, I64, PTR, Body, define, i64, splat, vector
from nestedfp.kernels.cpu.operands import BLOCK_ROWS, CHUNK, STREAM_TOKENS
from nestedfp.kernels.cpu.tokens import chunk_start

LANES = 8
TILE_ROWS = 4
TILE_TOKENS = (3, 2)
STREAM_ROWS = {1: 4, 2: 4, STREAM_TOKENS: 2}
"""Rows at a time when streaming for so many tokens: enough sums in flight to hide an addition's latency."""

CACHE_LINE = 64
PREFETCH_ROWS = 4

_SHORTS = vector(I16, CHUNK)
_SUMS = vector(F32, LANES)


def define_rebuild(module: ir.Module, fp8: bool, pitch: int) -> ir.Function:
    """Chunks of K in [first, last) of 16 rows as float32, to `panel` [16, pitch], which starts at `first`."""

    def emit(b: Body, a: SimpleNamespace) -> None:
        weight = _Weight(b, fp8, a)
        with b.loop(i64(0), i64(BLOCK_ROWS)) as r:
            row = weight.row(r)
            target = b.address(a.panel, b.ir.sub(b.ir.mul(r, i64(pitch)), a.first), F32)
            with weight.chunks(a.first, a.last, [row]) as k:
                b.store(weight.values(row, k), target, k, F32)

    parameters = _Weight.PARAMETERS | {"first": I64, "last": I64, "panel": PTR}
    return define(module, f"rebuild_{_reading(fp8)}", parameters, emit)


def define_tile(module: ir.Module, tokens: int, pitch: int) -> ir.Function:
    """Adds the products of `k` columns of 16 panel rows with `tokens` tokens to sums [tokens, 16]."""

    def emit(b: Body, a: SimpleNamespace) -> None:
        columns = [b.address(a.x, b.ir.mul(i64(token), a.x_pitch), F32) for token in range(tokens)]
        with b.loop(i64(0), i64(BLOCK_ROWS), TILE_ROWS) as top:
            rows = b.address(a.panel, b.ir.mul(top, i64(pitch)), F32)
            grid = _Grid(b, tokens, TILE_ROWS)
            with b.loop(i64(0), a.k, LANES) as i:
                loaded = [b.load(column, i, F32, LANES) for column in columns]
                for r in range(TILE_ROWS):
                    grid.add_products(r, b.load(b.address(rows, r * pitch, F32), i, F32, LANES), loaded)
            grid.add_to(a.sums, top)

    parameters = {"x": PTR, "x_pitch": I64, "panel": PTR, "k": I64, "sums": PTR}
    return define(module, f"tile_{tokens}", parameters, emit)


def define_stream(module: ir.Module, fp8: bool, tokens: int) -> ir.Function:
    """Adds the products of K in [first, last) of 16 rows with M tokens to sums [tokens, 16].

    Of fewer than `tokens` the last is repeated.
    """
    rows_at_once = STREAM_ROWS[tokens]

    def emit(b: Body, a: SimpleNamespace) -> None:
        weight = _Weight(b, fp8, a)
        last = b.ir.sub(a.M, i64(1))
        columns = [
            b.address(a.x, b.ir.mul(b.minimum(i64(token), last), a.x_pitch), F32) for token in range(tokens)
        ]
        with b.loop(i64(0), i64(BLOCK_ROWS), rows_at_once) as top:
            rows = [weight.row(b.ir.add(top, i64(r))) for r in range(rows_at_once)]
            grid = _Grid(b, tokens, rows_at_once)
            with weight.chunks(a.first, a.last, rows) as k:
                for r, row in enumerate(rows):
                    chunk = weight.values(row, k)
                    for part in range(0, CHUNK, LANES):
                        value = b.shuffle(chunk, chunk, list(range(part, part + LANES)))
                        offset = b.ir.add(k, i64(part))
                        grid.add_products(
                            r, value, [b.load(column, offset, F32, LANES) for column in columns]
                        )
            grid.add_to(a.sums, top)

    parameters = _Weight.PARAMETERS | {
        "first": I64,
        "last": I64,
        "x": PTR,
        "x_pitch": I64,
        "M": I64,
        "sums": PTR,
    }
    return define(module, f"stream_{_reading(fp8)}_{tokens}", parameters, emit)


class _Weight:
    """A block of a nested weight: both bytes [rows, K], the upper one alone in FP8."""

    PARAMETERS = {"upper": PTR, "lower": PTR, "K": I64, "rows": I64}  # noqa: RUF012

    def __init__(self, b: Body, fp8: bool, arguments: SimpleNamespace) -> None:
        self._b = b
        self._fp8 = fp8
        self._upper = arguments.upper
        self._lower = arguments.lower
        self._K = arguments.K
        self._rows = arguments.rows

    def row(self, index: ir.Value) -> ir.Value:
        """Where row `index` starts; beyond the end of the matrix, its last row."""
        b = self._b
        return b.ir.mul(b.minimum(index, b.ir.sub(self._rows, i64(1))), self._K)

    @contextmanager
    def chunks(self, first: ir.Value, last: ir.Value, rows: list[ir.Value]) -> Iterator[ir.Value]:
        """Walks [first, last) in chunks, asking memory for the same columns of the rows that come next.

        Hardware prefetchers lose their way at the end of each short row. One request a cache line is
        enough, and one beyond the matrix does no harm.
        """
        b = self._b
        ahead = b.ir.mul(self._K, i64(PREFETCH_ROWS))
        with b.loop(first, last, CACHE_LINE) as line:
            for row in rows:
                offset = b.ir.add(b.ir.add(row, line), ahead)
                for byte in (self._upper,) if self._fp8 else (self._upper, self._lower):
                    b.prefetch(b.address(byte, offset, I8))
            with b.loop(line, b.minimum(last, b.ir.add(line, i64(CACHE_LINE))), CHUNK) as k:
                yield k

    def values(self, row: ir.Value, k: ir.Value) -> ir.Value:
        """Sixteen weights as float32: rebuilt from both bytes, or e4m3(upper) * 2^-8.

        The E4M3 code S EEEE MMM, its sign kept in place and the rest moved to bits 13 to 7, is the float16
        number e4m3 * 2^-8. In 16 bits the code is rounded up to an even one; `lower` - 191 makes up the rest.
        """
        b = self._b
        offset = b.ir.add(row, chunk_start(b, k, self._K))
        upper = b.load(self._upper, offset, I8, CHUNK)
        bits = b.ir.shl(b.ir.sext(upper, _SHORTS), splat(_SHORTS, 7))
        if self._fp8:
            bits = b.ir.and_(bits, splat(_SHORTS, ~0x4000))
        else:
            bits = b.ir.and_(b.ir.add(bits, splat(_SHORTS, 0x80)), splat(_SHORTS, ~0x4080))
            lower = b.ir.zext(b.load(self._lower, offset, I8, CHUNK), _SHORTS)
            bits = b.ir.sub(b.ir.add(bits, lower), splat(_SHORTS, 191))
        return b.ir.fpext(b.ir.bitcast(bits, vector(F16, CHUNK)), vector(F32, CHUNK))


class _Grid:
    """Running products of some tokens with some rows: a sum of 8 lanes for each pair."""

    def __init__(self, b: Body, tokens: int, rows: int) -> None:
        self._b = b
        self._slots = [[b.local(_SUMS, splat(_SUMS, 0.0)) for _ in range(rows)] for _ in range(tokens)]

    def add_products(self, row: int, value: ir.Value, columns: list[ir.Value]) -> None:
        """One row at a time, so that no more than one value of a weight needs a register."""
        b = self._b
        for slots, column in zip(self._slots, columns, strict=True):
            total = b.ir.load(slots[row], typ=_SUMS)
            b.ir.store(b.intrinsic("fma", value, column, total), slots[row])

    def add_to(self, sums: ir.Value, top: ir.Value) -> None:
        """Adds the lane sums to sums [tokens, 16] of a block, from row `top`."""
        b = self._b
        for token, slots in enumerate(self._slots):
            total = _lane_sums(b, [b.ir.load(slot, typ=_SUMS) for slot in slots])
            offset = b.ir.add(top, i64(token * BLOCK_ROWS))
            b.store(b.ir.fadd(b.load(sums, offset, F32, len(slots)), total), sums, offset, F32)


def _lane_sums(b: Body, vectors: list[ir.Value]) -> ir.Value:
    """The lane sums of two or four vectors, as one vector. Either way each is added up in the same order."""
    left, *right = [_neighbour_sums(b, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    quads = _neighbour_sums(b, left, right[0] if right else left)
    low, high = (b.shuffle(quads, quads, list(range(half, half + len(vectors)))) for half in (0, LANES // 2))
    return b.ir.fadd(low, high)


def _neighbour_sums(b: Body, left: ir.Value, right: ir.Value) -> ir.Value:
    """In each group of four lanes: the sums of two pairs of neighbours of `left`, then of `right`."""
    even, odd = (
        [group + lane for group in range(0, LANES, 4) for lane in (s, s + 2, LANES + s, LANES + s + 2)]
        for s in (0, 1)
    )
    return b.ir.fadd(b.shuffle(left, right, even), b.shuffle(left, right, odd))


def _reading(fp8: bool) -> str:
    return "fp8" if fp8 else "16bit"
