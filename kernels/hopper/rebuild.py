"""Sixteen-bit weights from their two bytes, in registers (the contract is in `nestedfp.format`).

Four weights at a time: their high bytes, each the sign, a zero and six bits of the code, are made in byte
lanes; two permutes set the lower bytes beside them; one subtraction a pair takes off the offset.

A thread's bytes of a 64-wide step are 16 consecutive ones of a row in the stored order `KOrder.HOPPER`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Five instructions of the integer pipe (shift, mask, merge, two permutes), and beside it two multiply-adds,
# which take 64 off each half. $4 is 1, unknown to ptxas: subtractions it puts on the integer pipe as well.
_FLOAT16 = gl.constexpr("""{
    .reg .b32 high;
    shr.b32 high, $2, 1;
    and.b32 high, high, 0x3F3F3F3F;
    lop3.b32 high, $2, 0x80808080, high, 0xEA;
    prmt.b32 $0, $3, high, 0x5140;
    prmt.b32 $1, $3, high, 0x7362;
    mad.lo.u32 $0, $0, $4, 0xFFBFFFC0;
    mad.lo.u32 $1, $1, $4, 0xFFBFFFC0;
}""")

# The same, then each weight is widened to float32, exactly, subnormals included; where it was bfloat16 the
# lower half is zero. Conversions run as half-precision additions, beside the integer pipe, which merges the
# upper halves of two weights by one permute.
_BFLOAT16 = gl.constexpr("""{
    .reg .b32 high, pair, even, odd;
    .reg .b16 first, second;
    shr.b32 high, $2, 1;
    and.b32 high, high, 0x3F3F3F3F;
    lop3.b32 high, $2, 0x80808080, high, 0xEA;
    prmt.b32 pair, $3, high, 0x5140;
    mad.lo.u32 pair, pair, $4, 0xFFBFFFC0;
    mov.b32 {first, second}, pair;
    cvt.f32.f16 even, first;
    cvt.f32.f16 odd, second;
    prmt.b32 $0, even, odd, 0x7632;
    prmt.b32 pair, $3, high, 0x7362;
    mad.lo.u32 pair, pair, $4, 0xFFBFFFC0;
    mov.b32 {first, second}, pair;
    cvt.f32.f16 even, first;
    cvt.f32.f16 odd, second;
    prmt.b32 $1, even, odd, 0x7632;
}""")

# Two pairs of weights from four bytes of each plane, and the 1 of each of the four.
_OPERANDS = gl.constexpr("=&r,=&r,r,r,r,r,r,r")


@gluon.constexpr_function
def byte_layout(rows):
    """Sixteen consecutive bytes a thread and row; a warp holds rows r and r + 8 of 16, four threads a row."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << bit, 0] for bit in range((rows // 16).bit_length() - 1)],
        block_bases=[],
        shape=[rows, 64],
    )


@gluon.jit
def rebuild(upper, lower, dtype: gl.constexpr, operand: gl.constexpr):
    """Bytes [rows, 64] in `byte_layout`, K in stored order, to `dtype` in wgmma's operand layout, natural K.

    No data moves between threads.
    """
    # The grid is flat, which the host knows and the compiler does not.
    one = gl.full(upper.shape, gl.num_programs(1), gl.int32, upper.type.layout)
    operands = [upper, lower, one]
    if dtype == gl.float16:
        w = gl.inline_asm_elementwise(_FLOAT16, _OPERANDS, operands, dtype=gl.float16, is_pure=True, pack=4)
    else:
        w = gl.inline_asm_elementwise(_BFLOAT16, _OPERANDS, operands, dtype=gl.bfloat16, is_pure=True, pack=4)
    ROWS: gl.constexpr = upper.shape[0]
    w = w.reshape([ROWS, 4, 4, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([ROWS, 64])
    return gl.convert_layout(w, operand, assert_trivial=True)
