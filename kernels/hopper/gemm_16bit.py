"""y [M, N] = x [M, K] wᵀ * 2^row_exponent (+ bias), w [N, K] rebuilt exactly in registers, on Hopper.

Operands: x float16 or bfloat16, columns adjacent, row pitch and base in multiples of 16 bytes; `upper` and
`lower` contiguous uint8 [N, K] in `KOrder.HOPPER`, so K % 64 == 0; row_exponent int8 [N]; bias [N] in x's
dtype. Accumulation in float32, row exponents as powers of two in the epilogue: exact.

Pipeline. A tile of the output is `rows` * `consumers` weight rows by `columns` tokens, computed transposed:
so the weights are wgmma's A operand, which may come from registers.
- one producer warp fills a ring of shared memory by bulk copies, a 64-wide step of K a stage;
- each consumer owns `rows` of them: it loads its bytes (16 a load, no bank conflicts), rebuilds them and
  issues wgmma; while one step multiplies, the next is loaded and rebuilt into the other set of registers;
- CTAs are persistent; `schedule` splits K where whole tiles would leave multiprocessors idle. Parts of a
  split tile go to a float32 workspace, and whoever arrives last at the tile's counter sums all parts in
  the order of K: the result does not depend on who that is.
Consumers share stages but no barrier, so one stores its tile while another still multiplies.

Roof: for few tokens the 2 N K bytes of the weight over memory bandwidth; for many, 2 M N K operations over
the tensor cores' rate under the power limit. In between the 7 (bfloat16: 13) instructions that rebuild four
weights take issue slots: a ninth (a fifth) of them at 256 tokens a tile, twice that at 128. 5 (7) of them
run on the integer pipe, which starts one every other cycle: busy for a sixth (two ninths) of the time, or
twice that.

Consecutive products overlap by programmatic dependent launch: the next one's weights are fetched before the
previous one ends. The kernel launched just before a product must therefore not write its weight.
"""

from collections.abc import Mapping
from functools import cache

import torch
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

from nestedfp.kernels.hopper import compat
from nestedfp.kernels.hopper.choose_16bit import Config16, rule, share
from nestedfp.kernels.hopper.rebuild import byte_layout, rebuild
from nestedfp.kernels.hopper.schedule import run_owner, run_start, segment, segment_count, tile_position
from nestedfp.kernels.hopper.workspace import workspace

STEP = gl.constexpr(64)
UNIT_STEPS = gl.constexpr(2)
PRODUCER_REGISTERS = gl.constexpr(24)
# Two consumer partitions get no more than an even share of the registers: where registers move between
# partitions, ptxas (12.9) runs the wgmma of a second one one at a time.
EVEN_REGISTERS = gl.constexpr(168)


@gluon.constexpr_function
def accumulator_layout(rows, columns):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[rows // 16, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _load_weights(upper, lower, upper_ring, lower_ring, full, stage, row, k, K, CONSUMERS: gl.constexpr):
    """Past K, where x is zero, the last step again: the zeros that bulk copies fill in rebuild to NaN."""
    ROWS: gl.constexpr = upper.block_shape[0]
    k = gl.minimum(k, K - STEP)
    for consumer in gl.static_range(CONSUMERS):
        slot = stage * CONSUMERS + consumer
        compat.async_load(upper, [row + consumer * ROWS, k], full.index(stage), upper_ring.index(slot))
        compat.async_load(lower, [row + consumer * ROWS, k], full.index(stage), lower_ring.index(slot))


@gluon.jit
def _produce(
    x, upper, lower, ring, work, K,
    CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    x_ring, upper_ring, lower_ring, full, empty = ring
    grid, tiles, stream_tiles, tile_units, row_tiles, token_tiles = work
    ROWS: gl.constexpr = upper.block_shape[0]
    STAGE_BYTES: gl.constexpr = STEP * (2 * COLUMNS + 2 * ROWS * CONSUMERS)
    cta = gl.program_id(0)
    streamed, count = segment_count(cta, grid, tiles, stream_tiles, tile_units)

    # The weights of the first stages do not depend on the kernel before this one; x does.
    tile, first, last = segment(0, streamed, cta, grid, stream_tiles, tile_units)
    row_tile, token_tile = tile_position(tile, row_tiles, token_tiles, GROUP)
    early = gl.minimum((last - first) * UNIT_STEPS, STAGES)
    if count == 0:
        early = 0
    for step in range(early):
        mbarrier.expect(full.index(step), STAGE_BYTES)
        k = (first * UNIT_STEPS + step) * STEP
        _load_weights(
            upper, lower, upper_ring, lower_ring, full, step, row_tile * (ROWS * CONSUMERS), k, K, CONSUMERS
        )
    compat.gdc_wait()
    for step in range(early):
        k = (first * UNIT_STEPS + step) * STEP
        compat.async_load(x, [token_tile * COLUMNS, k], full.index(step), x_ring.index(step))

    stage = early % STAGES
    phase = early // STAGES
    for index in range(count):
        done = gl.where(index == 0, early, 0)
        tile, first, last = segment(index, streamed, cta, grid, stream_tiles, tile_units)
        row_tile, token_tile = tile_position(tile, row_tiles, token_tiles, GROUP)
        row = row_tile * (ROWS * CONSUMERS)
        for step in range(first * UNIT_STEPS + done, last * UNIT_STEPS):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), STAGE_BYTES)
            k = step * STEP
            _load_weights(upper, lower, upper_ring, lower_ring, full, stage, row, k, K, CONSUMERS)
            compat.async_load(x, [token_tile * COLUMNS, k], full.index(stage), x_ring.index(stage))
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _weights(upper_ring, lower_ring, slot, dtype: gl.constexpr, operand: gl.constexpr):
    layout: gl.constexpr = byte_layout(upper_ring.shape[1])
    return rebuild(upper_ring.index(slot).load(layout), lower_ring.index(slot).load(layout), dtype, operand)


@gluon.jit
def _accumulate(
    steps, stage, phase, ring,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum over one segment, [64, COLUMNS] float32, and the ring's position after it."""
    x_ring, upper_ring, lower_ring, full, empty = ring
    dtype: gl.constexpr = x_ring.dtype
    ROWS: gl.constexpr = upper_ring.shape[1]
    layout: gl.constexpr = accumulator_layout(ROWS, COLUMNS)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    odd = gl.zeros([ROWS, STEP], dtype, operand)
    before = stage
    for unit in range(steps // UNIT_STEPS):
        mbarrier.wait(full.index(stage), phase)
        even = _weights(upper_ring, lower_ring, stage * CONSUMERS + CONSUMER, dtype, operand)
        acc = warpgroup_mma(even, x_ring.index(stage).permute((1, 0)), acc, is_async=True)
        # The product of the step before has read its weights and its stage once this one alone is left.
        acc, odd = warpgroup_mma_wait(1, deps=[acc, odd])
        mbarrier.arrive(empty.index(before), count=1, pred=unit > 0)
        before = stage
        stage, phase = _advance(stage, phase, STAGES)

        mbarrier.wait(full.index(stage), phase)
        odd = _weights(upper_ring, lower_ring, stage * CONSUMERS + CONSUMER, dtype, operand)
        acc = warpgroup_mma(odd, x_ring.index(stage).permute((1, 0)), acc, is_async=True)
        acc, even = warpgroup_mma_wait(1, deps=[acc, even])
        mbarrier.arrive(empty.index(before), count=1)
        before = stage
        stage, phase = _advance(stage, phase, STAGES)
    acc, odd = warpgroup_mma_wait(0, deps=[acc, odd])
    mbarrier.arrive(empty.index(before), count=1)
    return acc, stage, phase


@gluon.constexpr_function
def partial_layout(rows, columns):
    """`accumulator_layout`, columns renamed inside groups of 16: four adjacent ones a thread, 16 bytes."""
    wide = [[0, 1 << bit] for bit in range(4, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *wide],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << bit, 0] for bit in range((rows // 16).bit_length() - 1)],
        block_bases=[],
        shape=[rows, columns],
    )


@gluon.jit
def _swap_pairs(part, OUTER: gl.constexpr, INNER: gl.constexpr, layout: gl.constexpr):
    """Renames columns inside groups of 16, from (OUTER, INNER, pair) to (INNER, OUTER, pair)."""
    ROWS: gl.constexpr = part.shape[0]
    COLUMNS: gl.constexpr = part.shape[1]
    part = part.reshape([ROWS, COLUMNS // 16, OUTER, INNER, 2]).permute([0, 1, 3, 2, 4])
    return gl.convert_layout(part.reshape([ROWS, COLUMNS]), layout, assert_trivial=True)


@gluon.jit
def _partial_offsets(ROWS: gl.constexpr, CHUNK: gl.constexpr):
    layout: gl.constexpr = partial_layout(ROWS, CHUNK)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    return rows[:, None] * CHUNK + columns[None, :]


@gluon.jit
def _chunks(acc, CHUNK: gl.constexpr):
    """The column blocks of `acc`, `CHUNK` wide each, as a tuple."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS == CHUNK:
        return (acc,)
    else:  # noqa: RET505, both branches must be visible to the compiler
        low, high = acc.reshape([ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]).split()
        layout: gl.constexpr = accumulator_layout(ROWS, COLUMNS // 2)
        low = gl.convert_layout(low, layout, assert_trivial=True)
        high = gl.convert_layout(high, layout, assert_trivial=True)
        return _chunks(low, CHUNK) + _chunks(high, CHUNK)


@gluon.jit
def _store_chunk(
    chunk, scale, shift, out_ring, y, row, token, M, N, y_pitch,
    INDEX: gl.constexpr, CONSUMER: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """Writes `chunk` [64 rows, CHUNK tokens], scaled and shifted, to y[token :, row :]."""
    ROWS: gl.constexpr = chunk.shape[0]
    CHUNK: gl.constexpr = chunk.shape[1]
    buffer = out_ring.index(CONSUMER * 2 + INDEX % 2)
    values = (chunk * scale[:, None] + shift[:, None]).to(out_ring.dtype)
    if BULK_STORE:
        compat.store_wait(1)
        buffer.permute((1, 0)).store(values)
        fence_async_shared()
        compat.async_store(y, [token, row], buffer)
    else:
        buffer.permute((1, 0)).store(values)
        layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [ROWS // 16, 1], [1, 0])
        tokens = token + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
        inside = (tokens < M)[:, None] & (rows < N)[None, :]
        addresses = y + tokens.to(gl.int64)[:, None] * y_pitch + rows[None, :]
        gl.store(addresses, buffer.load(layout), mask=inside)


@gluon.jit
def _consume(
    ring, output, parts, work,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    grid, tiles, stream_tiles, tile_units, row_tiles, token_tiles = work
    out_ring, y, y_pitch, row_exponent, bias, M, N = output
    partials, counters = parts
    CHUNK: gl.constexpr = out_ring.shape[1]
    ROWS: gl.constexpr = out_ring.shape[2]
    CHUNKS: gl.constexpr = COLUMNS // CHUNK
    layout: gl.constexpr = accumulator_layout(ROWS, CHUNK)
    cta = gl.program_id(0)
    streamed, count = segment_count(cta, grid, tiles, stream_tiles, tile_units)
    units = stream_tiles * tile_units
    stage = 0
    phase = 0
    compat.gdc_wait()
    for index in range(count):
        tile, first, last = segment(index, streamed, cta, grid, stream_tiles, tile_units)
        row_tile, token_tile = tile_position(tile, row_tiles, token_tiles, GROUP)
        row = row_tile * (ROWS * CONSUMERS) + CONSUMER * ROWS
        token = token_tile * COLUMNS
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        exponent = gl.load(row_exponent + rows, mask=rows < N, other=0).to(gl.int32)
        scale = ((exponent + 127) << 23).to(gl.float32, bitcast=True)
        shift = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        if bias is not None:
            shift = gl.load(bias + rows, mask=rows < N, other=0.0).to(gl.float32)

        acc, stage, phase = _accumulate(
            (last - first) * UNIT_STEPS, stage, phase, ring, CONSUMER, CONSUMERS, COLUMNS, STAGES
        )
        chunks = _chunks(acc, CHUNK)
        if last - first == tile_units:
            for c in gl.static_range(CHUNKS):
                _store_chunk(
                    chunks[c], scale, shift, out_ring, y, row, token + c * CHUNK, M, N, y_pitch,
                    c, CONSUMER, BULK_STORE,
                )  # fmt: skip
        else:
            offsets = _partial_offsets(ROWS, CHUNK)
            PART: gl.constexpr = ROWS * CHUNK
            begin = tile * tile_units
            slot = 2 * cta + (index > 0).to(gl.int32)
            mine = partials + (slot * CONSUMERS + CONSUMER) * (CHUNKS * PART)
            for c in gl.static_range(CHUNKS):
                gl.store(mine + c * PART + offsets, _swap_pairs(chunks[c], 2, 4, partial_layout(ROWS, CHUNK)))
            compat.thread_barrier()
            counter = counters + tile * CONSUMERS + CONSUMER
            arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            first_owner = run_owner(begin, grid, units)
            last_owner = run_owner(begin + tile_units - 1, grid, units)
            if arrived == last_owner - first_owner:
                gl.store(counter, 0)
                for c in gl.static_range(CHUNKS):
                    total = gl.zeros([ROWS, CHUNK], gl.float32, partial_layout(ROWS, CHUNK))
                    for owner in range(first_owner, last_owner + 1):
                        slot = 2 * owner + (run_start(owner, grid, units) < begin).to(gl.int32)
                        part = partials + (slot * CONSUMERS + CONSUMER) * (CHUNKS * PART)
                        total += gl.load(part + c * PART + offsets, cache_modifier=".cg")
                    _store_chunk(
                        _swap_pairs(total, 4, 2, layout), scale, shift, out_ring, y, row, token + c * CHUNK,
                        M, N, y_pitch, c, CONSUMER, BULK_STORE,
                    )  # fmt: skip
    compat.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "y_pitch", "stream_tiles"])
def gemm_16bit_kernel(
    x, upper, lower, y, row_exponent, bias, partials, counters, M, N, K, y_pitch, stream_tiles,
    CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    CHUNK: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x.dtype
    ROWS: gl.constexpr = upper.block_shape[0]
    compat.gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, STEP], x.layout)
    upper_ring = gl.allocate_shared_memory(gl.uint8, [STAGES * CONSUMERS, ROWS, STEP], upper.layout)
    lower_ring = gl.allocate_shared_memory(gl.uint8, [STAGES * CONSUMERS, ROWS, STEP], lower.layout)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    out_ring = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, CHUNK, ROWS], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    row_tiles = gl.cdiv(N, ROWS * CONSUMERS)
    token_tiles = gl.cdiv(M, COLUMNS)
    tile_units = gl.cdiv(K, STEP * UNIT_STEPS)
    work = (gl.num_programs(0), row_tiles * token_tiles, stream_tiles, tile_units, row_tiles, token_tiles)
    ring = (x_ring, upper_ring, lower_ring, full, empty)
    output = (out_ring, y, y_pitch, row_exponent, bias, M, N)
    parts = (partials, counters)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (ring, output, parts, work, 0, CONSUMERS, COLUMNS, STAGES, GROUP, BULK_STORE)),
                (_produce, (x, upper, lower, ring, work, K, CONSUMERS, COLUMNS, STAGES, GROUP)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, output, parts, work, 0, CONSUMERS, COLUMNS, STAGES, GROUP, BULK_STORE)),
                (_consume, (ring, output, parts, work, 1, CONSUMERS, COLUMNS, STAGES, GROUP, BULK_STORE)),
                (_produce, (x, upper, lower, ring, work, K, CONSUMERS, COLUMNS, STAGES, GROUP)),
            ],
            [4, 1],
            [EVEN_REGISTERS, EVEN_REGISTERS],
        )


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors `device` has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Mapping[str, int] | None = None,
) -> None:
    """Writes `out` [M, N], contiguous; operands as the module says. `config` None takes the rule's choice."""
    if config is None:
        dtype = str(x.dtype).removeprefix("torch.")
        chosen = rule(x.shape[0], upper.shape[0], x.shape[1], dtype)
    else:
        chosen = Config16.from_mapping(config)
    run(chosen, x, upper, lower, row_exponent, bias, out)


def run(
    config: Config16,
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    row_exponent: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """`product` with a configuration as it is."""
    M, K = x.shape
    N = upper.shape[0]
    partials, counters = workspace(x.device)
    work = share(config, M, N, K, multiprocessors(x.device))
    bulk_store = N % 8 == 0
    weight_box, weight_layout = [config.rows, 64], gl.NVMMASharedLayout(64, 8, 2)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    pitch = x.stride(0) if M > 1 else K
    gemm_16bit_kernel[(work.grid,)](
        TensorDescriptor(x, [M, K], [pitch, 1], [config.columns, 64], layout),
        TensorDescriptor(upper, [N, K], [K, 1], weight_box, weight_layout),
        TensorDescriptor(lower, [N, K], [K, 1], weight_box, weight_layout),
        TensorDescriptor(out, [M, N], [N, 1], [config.chunk, config.rows], layout) if bulk_store else out,
        row_exponent, bias, partials, counters, M, N, K, N, work.stream_tiles,
        CONSUMERS=config.consumers, COLUMNS=config.columns, STAGES=config.stages, GROUP=config.group,
        CHUNK=config.chunk, BULK_STORE=bulk_store,
        num_warps=config.rows // 16, launch_pdl=True, maxnreg=128 if config.occupancy == 2 else None,
    )  # fmt: skip
