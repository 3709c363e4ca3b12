"""Both products in plain Triton: any M, N, K, any strides of x, either stored order of K.

y[m, n] = column_scale[n] * row_scale[m] * sum over p of a[m, k(p)] * w[n, p] + bias[n], where p walks the
stored columns of the weight and k(p) is the column of x that belongs to position p (`layout`): the order is
undone by addressing x, so no weight is moved. One program computes one tile; masks cover the ragged edges.

* 16-bit mode: a is x, w is rebuilt from both bytes (the contract is in `nestedfp.format`). Without bfloat16
  tensor cores (and in the interpreter, which multiplies bfloat16 wrongly) `WIDE` multiplies in float32.
* FP8 mode: a is x rounded to E4M3 values, already in stored order, with one scale a token; w is the upper
  byte. With E4M3 tensor cores (`NATIVE`) both are E4M3; elsewhere a holds the same values in float16, and the
  byte widens to float16 by shifts: half the bytes are read, the arithmetic is 16-bit.

Roof: the weight's bytes over the memory bandwidth for few tokens. For many, plain `tl.dot` leaves a part of
the tensor cores' rate unused; architectures that matter have kernels of their own.
"""

import triton
import triton.language as tl


@triton.jit
def stored_column(position):
    """k(p) of `KOrder.HOPPER`: position t*32 + s*16 + j*4 + h*2 + b holds s*64 + j*16 + h*8 + t*2 + b."""
    t = position // 32 % 4
    sj = position // 4 % 8
    h = position // 2 % 2
    return position // 128 * 128 + sj * 16 + h * 8 + t * 2 + position % 2


@triton.jit
def rebuild(upper, lower):
    """float16 weights from their bytes, before the row exponent."""
    high = upper.to(tl.int32)
    low = lower.to(tl.int32)
    bits = (high & 0x80) << 8 | (((high + 1) & 0x7E) << 7 | low) - 191
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def widen(upper):
    """float16 numbers e4m3(upper) * 2^-8: the same bits, since the exponents' biases differ by eight."""
    code = upper.to(tl.int32)
    return ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def round_to_e4m3(x):
    """float32 x, |x| <= 448, to the nearest E4M3 number, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    # Three mantissa bits stay of 23. Below 2^-6 the grid is 2^-9 wide, float32's own at 1.5 * 2^14.
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0
    return tl.where(x == x, tl.where(tl.abs(x) < 2.0**-6, small, rounded), x)


@triton.jit
def gemm_kernel(
    a_ptr, upper_ptr, lower_ptr, y_ptr, row_exponent_ptr, row_scale_ptr, bias_ptr,
    M, N, K, a_stride_m, a_stride_k,
    FP8: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr, PERMUTED: tl.constexpr,
    PANELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < M
    column_in = columns < N

    a_rows = a_ptr + rows.to(tl.int64)[:, None] * a_stride_m
    w_rows = columns.to(tl.int64)[None, :] * (128 if PANELS else K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        inside = position < K
        k = stored_column(position) if PERMUTED else position
        a_at = a_rows + k.to(tl.int64)[None, :] * a_stride_k
        a = tl.load(a_at, mask=row_in[:, None] & inside[None, :], other=0.0)
        w = (
            w_rows
            + (position.to(tl.int64) // 128 * 128 * N + position % 128 if PANELS else position)[:, None]
        )
        w_mask = inside[:, None] & column_in[None, :]
        upper = tl.load(upper_ptr + w, mask=w_mask, other=0)
        if NATIVE:
            acc = tl.dot(a, upper.to(tl.float8e4nv, bitcast=True), acc)
        elif FP8:
            acc = tl.dot(a, widen(upper), acc)
        else:
            # 191 beside an upper byte of 0 is a weight of zero.
            lower = tl.load(lower_ptr + w, mask=w_mask, other=191)
            # With bfloat16 activations the weight was bfloat16 too: the conversion rounds nothing away.
            weights = rebuild(upper, lower).to(tl.float32)
            if WIDE:
                acc = tl.dot(a.to(tl.float32), weights, acc, input_precision="ieee")
            else:
                acc = tl.dot(a, weights.to(a.dtype), acc)

    exponent = tl.load(row_exponent_ptr + columns, mask=column_in, other=0).to(tl.float32)
    if NATIVE:
        exponent -= 8.0
    if FP8:
        acc *= tl.load(row_scale_ptr + rows, mask=row_in, other=0.0)[:, None]
    acc *= tl.exp2(exponent)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, K, x_stride_m, x_stride_k, PERMUTED: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program a token: amax over K, then x * 448 / amax rounded to E4M3, in stored order."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride_m
    largest = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + k.to(tl.int64) * x_stride_k, mask=k < K, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    amax = tl.maximum(tl.max(largest, 0), 2.0**-100)
    factor = tl.div_rn(448.0, amax)
    for start in range(0, K, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        k = stored_column(position) if PERMUTED else position
        x = tl.load(x_row + k.to(tl.int64) * x_stride_k, mask=position < K, other=0.0).to(tl.float32)
        code = round_to_e4m3(x * factor).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * K + position, code, mask=position < K)
    tl.store(scale_ptr + row, tl.div_rn(amax, 448.0))
