"""Sixteen-bit weights from their two bytes, in registers (the contract is in `nestedfp.format`).

Four weights at a time, in byte lanes. Only bits 6..1 and the sign of the upper byte survive, and for those
`upper - (lower >> 7)` equals `upper - borrow`: the two differ only where `upper` is odd and not rounded, and
there the shift drops the difference. It cannot wrap, since `lower >> 7` = 1 means the code before rounding
was odd, so `upper` is at least 1.

A thread's bytes of a 64-wide step are 16 consecutive ones of a row in the stored order `KOrder.HOPPER`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Eight instructions: the borrow (shift, mask, subtract), the high byte (shift, mask, merge), two permutes.
_FLOAT16 = gl.constexpr("""{
    .reg .b32 high, part;
    shr.b32 part, $3, 7;
    and.b32 part, part, 0x01010101;
    sub.u32 high, $2, part;
    shr.b32 part, high, 1;
    and.b32 part, part, 0x3F3F3F3F;
    lop3.b32 high, high, 0x80808080, part, 0xEA;
    prmt.b32 $0, $3, high, 0x5140;
    prmt.b32 $1, $3, high, 0x7362;
}""")

# Magnitudes times 2^14 are normal float16 numbers even where the weight is subnormal, and, since the weight
# was bfloat16, their three lowest mantissa bits are zero: a shift by three is then exact and makes them
# bfloat16 numbers whose exponent lacks 127 - 15 - 14, less the sign, which is merged in. Multiplying with
# 2^98 restores the exponent and keeps zero zero. The multiplications run beside the integer instructions.
_BFLOAT16 = gl.constexpr("""{
    .reg .b32 high, part, first, second, normal, exponent;
    mov.b32 normal, 0x74007400;
    mov.b32 exponent, 0x70807080;
    shr.b32 part, $3, 7;
    and.b32 part, part, 0x01010101;
    sub.u32 high, $2, part;
    shr.b32 high, high, 1;
    and.b32 high, high, 0x3F3F3F3F;
    prmt.b32 first, $3, high, 0x5140;
    prmt.b32 second, $3, high, 0x7362;
    mul.rn.f16x2 first, first, normal;
    mul.rn.f16x2 second, second, normal;
    shr.b32 first, first, 3;
    shr.b32 second, second, 3;
    prmt.b32 part, $2, 0, 0x1404;
    lop3.b32 first, part, 0x80008000, first, 0xEA;
    prmt.b32 part, $2, 0, 0x3424;
    lop3.b32 second, part, 0x80008000, second, 0xEA;
    mul.rn.bf16x2 $0, first, exponent;
    mul.rn.bf16x2 $1, second, exponent;
}""")


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
    if dtype == gl.float16:
        w = gl.inline_asm_elementwise(
            _FLOAT16, "=r,=r,r,r", [upper, lower], dtype=gl.float16, is_pure=True, pack=4
        )
    else:
        w = gl.inline_asm_elementwise(
            _BFLOAT16, "=r,=r,r,r", [upper, lower], dtype=gl.bfloat16, is_pure=True, pack=4
        )
    ROWS: gl.constexpr = upper.shape[0]
    w = w.reshape([ROWS, 4, 4, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([ROWS, 64])
    return gl.convert_layout(w, operand, assert_trivial=True)
