"""y [M, N] = (codes * x_scale) (e4m3(upper) * 2^(row_exponent - 8))ᵀ + bias on Hopper: the FP8 mode.

Operands. codes: E4M3 [M, K] and x_scale: float32 [M], from `quantize`, columns in the weight's stored
order (a sum over K does not mind which). upper: [N, K] bytes, read as E4M3. Row pitches are multiples of
16 bytes; nothing else is asked of M, N or K: the copy engine fills what lies outside with zeros.

Pipeline, persistent over output tiles:
* one producer warp streams both operands through `STAGES` shared-memory buffers by TMA;
* one or two warpgroups multiply (wgmma, both operands from shared memory), one step in flight while
  the next is issued, and hand each buffer back as soon as its step has retired;
* the epilogue scales, adds the bias and stores while the producer already fills buffers for the next tile.

The kernel may start before the quantiser has finished (programmatic dependent launch): the producer
requests the first weights, which do not depend on it, and only then waits for the codes.

A wgmma takes 64 tokens. Tiles of fewer load only theirs: the operand is read as 64 rows from the start of
the stage, and what lies behind (the next stages) makes rows of the accumulator that nobody stores.

Roof: one byte a weight over the memory bandwidth for small M, E4M3 tensor-core rate for large M, and
between them L2 bandwidth, K * (M * N) * (1 / BLOCK_M + 1 / BLOCK_N) bytes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nestedfp.kernels.hopper.compat import (
    async_load,
    async_store,
    gdc_launch_dependents,
    gdc_wait,
    store_wait,
)

# Of a multiprocessor; each program also costs 1 KiB that the system keeps.
SHARED_MEMORY = 228 * 1024
_SYSTEM_SHARE = 1024
# Columns of K a stage: one 128-byte row of the swizzle, so that tiles of any height have the same layout.
STEP = 128
_PRODUCER_REGISTERS = 40
# Barriers and scratch.
_SHARED_RESERVE = 768


@dataclass(frozen=True)
class Config:
    """One way to cut the product.

    tokens x rows: the output tile, powers of two from 8. warps: computing, 4, or 8 for 128 tokens and
    more. ctas: programs a multiprocessor. group: tiles along M that run side by side before the next rows
    of the weight, for reuse in the L2.
    """

    tokens: int
    rows: int
    warps: int = 8
    ctas: int = 1
    group: int = 8

    @property
    def parts(self) -> int:
        """Column slices of the epilogue, each staged through shared memory in turn."""
        return max(1, self.rows // 64)

    @property
    def stages(self) -> int:
        output = max(self.tokens, 64) * self.rows // self.parts * 2
        overhang = max(64 - self.tokens, 0) * STEP
        room = SHARED_MEMORY // self.ctas - _SYSTEM_SHARE - output - overhang - _SHARED_RESERVE
        return max(2, min(room // ((self.tokens + self.rows) * STEP), 32))

    @property
    def registers(self) -> int | None:
        """The cap a thread, where more than one program shares a multiprocessor."""
        return None if self.ctas == 1 else 65536 // (self.ctas * (self.warps + 4) * 32) // 8 * 8

    @staticmethod
    def of(values: Mapping[str, int]) -> "Config":
        return Config(**values)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@gluon.jit
def _tile_origin(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    height = gl.minimum(tiles_m - first, GROUP)
    within = tile % per_group
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@gluon.jit
def _producer(
    codes_desc, upper_desc, codes_buffers, upper_buffers, full, empty, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    STAGE_BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K
    steps = gl.cdiv(K, BLOCK_K)
    tile = gl.program_id(0)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    m, n = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)

    early = gl.minimum(steps, STAGES)
    for i in range(early):
        mbarrier.expect(full.index(i), STAGE_BYTES)
        async_load(upper_desc, [n, i * BLOCK_K], full.index(i), upper_buffers.index(i))
    gdc_wait()
    for i in range(early):
        async_load(codes_desc, [m, i * BLOCK_K], full.index(i), codes_buffers.index(i))

    k = early
    count = early
    while tile < tiles:
        m, n = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        while k < steps:
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), STAGE_BYTES)
            async_load(codes_desc, [m, k * BLOCK_K], full.index(stage), codes_buffers.index(stage))
            async_load(upper_desc, [n, k * BLOCK_K], full.index(stage), upper_buffers.index(stage))
            k += 1
            count += 1
        k = 0
        tile += gl.num_programs(0)


@gluon.jit
def _slice_columns(acc, PARTS: gl.constexpr):
    """`acc` [R, C] as a tuple of PARTS equal slices along C; registers are renamed, not moved."""
    if PARTS == 1:
        result = (acc,)
    else:
        left, right = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()
        result = _slice_columns(left, PARTS // 2) + _slice_columns(right, PARTS // 2)
    return result


@gluon.jit
def _store_slice(
    piece, y_desc, y_ptr, out_buffer, x_scale_ptr, row_exponent_ptr, bias_ptr, m, n, M, N, BULK: gl.constexpr
):
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    layout: gl.constexpr = piece.type.layout
    rows = m + gl.arange(0, piece.shape[0], layout=gl.SliceLayout(1, layout))
    columns = n + gl.arange(0, piece.shape[1], layout=gl.SliceLayout(0, layout))
    scale = gl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
    exponent = gl.load(row_exponent_ptr + columns, mask=columns < N, other=0).to(gl.float32)
    out = piece * scale.expand_dims(1) * gl.exp2(exponent - 8.0).expand_dims(0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)
        out += bias.expand_dims(0)
    if BULK:
        store_wait(0)
        out_buffer.store(out.to(dtype))
        fence_async_shared()
        tile = out_buffer._reinterpret(dtype, y_desc.block_shape, y_desc.layout)
        async_store(y_desc, [m, n], tile)
    else:
        inside = (rows < M).expand_dims(1) & (columns < N).expand_dims(0)
        offsets = rows.to(gl.int64).expand_dims(1) * N + columns.expand_dims(0)
        gl.store(y_ptr + offsets, out.to(dtype), mask=inside)


@gluon.jit
def _consumer(
    codes_buffers, upper_buffers, full, empty, out_buffer, y_desc, y_ptr, x_scale_ptr, row_exponent_ptr,
    bias_ptr, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, PARTS: gl.constexpr, BULK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    HEIGHT: gl.constexpr = max(BLOCK_M, 64)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 32]
    )
    steps = gl.cdiv(K, BLOCK_K)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    gdc_wait()
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([HEIGHT, BLOCK_N], gl.float32, layout)
        for k in range(steps):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            a = codes_buffers.index(stage)
            if BLOCK_M < HEIGHT:
                a = a._reinterpret(a.dtype, [HEIGHT, BLOCK_K], codes_buffers.layout)
            b = upper_buffers.index(stage).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=k > 0)
            count += 1
        sums = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
        m, n = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        pieces = _slice_columns(sums, PARTS)
        for part in gl.static_range(PARTS):
            _store_slice(
                pieces[part], y_desc, y_ptr, out_buffer, x_scale_ptr, row_exponent_ptr, bias_ptr,
                m, n + part * (BLOCK_N // PARTS), gl.minimum(M, m + BLOCK_M), N, BULK,
            )  # fmt: skip
    gdc_launch_dependents()
    if BULK:
        store_wait(0)


# Without specialisation a new number of tokens never compiles a new kernel in the middle of serving.
@gluon.jit(
    do_not_specialize=["M", "N", "K"],
    do_not_specialize_on_alignment=["y_ptr", "x_scale_ptr", "row_exponent_ptr", "bias_ptr"],
)
def gemm_fp8_kernel(
    codes_desc, upper_desc, y_desc, y_ptr, x_scale_ptr, row_exponent_ptr, bias_ptr, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, PARTS: gl.constexpr, BULK: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    OVERHANG: gl.constexpr = (max(BLOCK_M, 64) - BLOCK_M) // BLOCK_M
    codes_buffers = gl.allocate_shared_memory(
        codes_desc.dtype, [STAGES + OVERHANG, BLOCK_M, BLOCK_K], codes_desc.layout
    )
    upper_buffers = gl.allocate_shared_memory(upper_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], upper_desc.layout)
    out_buffer = y_ptr
    if BULK:
        out_buffer = gl.allocate_shared_memory(
            y_desc.dtype, [max(BLOCK_M, 64), BLOCK_N // PARTS], y_desc.layout
        )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    codes_buffers, upper_buffers, full, empty, out_buffer, y_desc, y_ptr, x_scale_ptr,
                    row_exponent_ptr, bias_ptr, M, N, K,
                    BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP, PARTS, BULK, num_warps,
                ),
            ),
            (
                _producer,
                (
                    codes_desc, upper_desc, codes_buffers, upper_buffers, full, empty, M, N, K,
                    BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shared_layout(width: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, width * bits // 8), element_bitwidth=bits, rank=2)


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout = _shared_layout(block[1], tensor.element_size() * 8)
    return TensorDescriptor.from_tensor(tensor, block, layout)


def gemm_fp8(
    codes: Tensor,
    x_scale: Tensor,
    upper: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
) -> None:
    """Writes y [M, N], contiguous, from operands laid out as the module says."""
    M, N = y.shape
    K = codes.shape[1]
    bulk = N % 8 == 0
    tiles = triton.cdiv(M, config.tokens) * triton.cdiv(N, config.rows)
    grid = min(tiles, _multiprocessors(y.device) * config.ctas)
    options = {} if config.registers is None else {"maxnreg": config.registers}
    gemm_fp8_kernel[(grid,)](
        _descriptor(codes, [config.tokens, STEP]),
        _descriptor(upper.view(torch.float8_e4m3fn), [config.rows, STEP]),
        _descriptor(y, [config.tokens, config.rows // config.parts]) if bulk else None,
        y,
        x_scale,
        row_exponent,
        bias,
        M,
        N,
        K,
        BLOCK_M=config.tokens,
        BLOCK_N=config.rows,
        BLOCK_K=STEP,
        STAGES=config.stages,
        GROUP=config.group,
        PARTS=config.parts,
        BULK=bulk,
        PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        num_warps=config.warps,
        launch_pdl=True,
        **options,
    )
