"""Per-token dynamic quantisation to E4M3 on Hopper, writing the columns in the weight's stored order.

codes[m, p] = e4m3(x[m, k(p)] * 448 / amax[m]), scale[m] = amax[m] / 448, with k(p) as in `layout`.

One program a token, one pass: a thread reads 16 consecutive columns (two 16-byte loads) and keeps them
in registers while the maximum is found. In `HOPPER` order those 16 columns, one wgmma step j of a group,
end up as four 4-byte words, one for each thread t of a quad; four threads exchange them so that each
writes 16 consecutive bytes. K is a multiple of 16 and rows of x begin on 16-byte boundaries; both reach
the kernel in those units, so that the compiler knows.

Roof: three bytes an element (read two, write one) over the memory bandwidth. The product that follows may
start at once (programmatic dependent launch): it waits for these codes only after asking for weights.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nestedfp.kernels.hopper.compat import gdc_launch_dependents, gdc_wait
from nestedfp.kernels.layout import KOrder

_CHUNK = 16
# At this many tokens every multiprocessor has work, and wider programs no longer hide latency.
_FEW_TOKENS = 264


@gluon.jit(do_not_specialize=["k_chunks", "pitch_octets"])
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, k_chunks, pitch_octets,
    CHUNKS: gl.constexpr, PERMUTE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [num_warps, 1], [1, 0])
    chunks = gl.arange(0, CHUNKS, layout=gl.SliceLayout(1, layout)).expand_dims(1)
    elements = gl.arange(0, 16, layout=gl.SliceLayout(0, layout)).expand_dims(0)
    offsets = chunks * 16 + elements
    inside = chunks < k_chunks
    row = gl.program_id(0).to(gl.int64)
    gdc_launch_dependents()
    gdc_wait()
    x = gl.load(x_ptr + row * pitch_octets * 8 + offsets, mask=inside, other=0.0).to(gl.float32)
    amax = gl.maximum(gl.max(gl.max(gl.abs(x), 1), 0), 2.0**-100)
    codes = (x * gl.div_rn(448.0, amax)).to(gl.float8e4nv)
    if PERMUTE:
        words = codes.to(gl.uint8, bitcast=True).reshape([CHUNKS // 4, 4, 2, 4, 2])
        permuted = words.permute(0, 3, 1, 2, 4).reshape([CHUNKS, 16])
        codes = gl.convert_layout(permuted, layout).to(gl.float8e4nv, bitcast=True)
    gl.store(codes_ptr + row * k_chunks * 16 + offsets, codes, mask=inside)
    gl.store(scale_ptr + row, gl.div_rn(amax, 448.0))


def quantize(x: Tensor, codes: Tensor, scale: Tensor, order: KOrder) -> None:
    """Fills codes [M, K] (float8_e4m3fn, contiguous) and scale [M] (float32) from x [M, K]."""
    M, K = x.shape
    chunks = max(4, triton.next_power_of_2(K // _CHUNK))
    lanes = 32 if M <= _FEW_TOKENS else 64
    warps = min(max(chunks // lanes, 1), 16)
    quantize_kernel[(M,)](
        x,
        codes,
        scale,
        K // _CHUNK,
        x.stride(0) // 8,
        CHUNKS=chunks,
        PERMUTE=order is KOrder.HOPPER,
        num_warps=warps,
        launch_pdl=True,
    )
