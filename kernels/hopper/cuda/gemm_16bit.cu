// y [M, N] = x [M, K] w^T * 2^row_exponent (+ bias), w [N, K] rebuilt exactly in registers, on Hopper. With GATED y is
// [M, N / 2]: gate.cuh.
//
// Operands. x: 16-bit floats, rows on 16-byte boundaries; upper, lower: bytes in the stored order of `KOrder.HOPPER`,
// panels of N rows by 128 of K one after another, so K is a multiple of 128. M and N are free. Fewer tokens than a
// tile's are copied alone, `x_bytes` a stage, and what stays in the buffer behind them is multiplied in vain; weight
// rows past N belong to the next panel. Nothing of either is stored.
// partials, counters: scratch for tiles whose K is cut; counters are zero before and after. Products that share
// scratch run one after another.
//
// A tile is CONSUMERS / SLICED_K * 64 weight rows by TOKENS tokens, computed transposed: the weights are wgmma's A
// operand, which may come from registers, and its N side takes any multiple of 8 tokens up to 256, of which MMAS share a
// tile's, so that tiles can fill whole waves.
// * one thread streams both byte planes, 128 of K a stage, another x, 64 of K a stage: rows of 128 bytes either way,
//   since the copy engine takes its time by rows. CTAs of a cluster that share a panel each fetch a part of it and
//   multicast it: without that, small tiles wait for the L2;
// * CONSUMERS warpgroups own 64 rows each. A thread's share of 128 of K of one row is 32 adjacent bytes of each plane.
//   With SLICED_K = 2 two of them have the same rows and take turns in K, 64 each: one rebuilds while the other
//   multiplies. At the end either gives the sums of half of the tokens to the other. Tiles are then half as tall for
//   as many tokens, which fills more waves, and each weight is rebuilt for as many tokens as one warpgroup holds.
//   With SETS = 2 sets of registers a warpgroup rebuilds one step while its step before multiplies; with one set,
//   which leaves room for more warpgroups, it rebuilds while the others multiply. AHEAD it loads the bytes of the
//   next 128 of K before it multiplies the last of these, which pays where one warpgroup multiplies few tokens;
// * with CLUSTER_K = 2 the two halves of a cluster have half of K each of a tile, or of a few that share panels, which
//   lets tiles be large where there are few (exchange_16bit.cuh);
// * a warpgroup scales, adds the bias and stores by itself, or has the copy engine store (output_16bit.cuh), while the
//   producers fill buffers for the next tile.
// schedule.cuh says how tiles are shared and why gathering the parts of a tile cannot deadlock.
//
// Roof: two bytes a weight over the memory bandwidth for few tokens, the tensor cores' rate for many. Between them, up
// to some 180 tokens a tile, the rebuild: its instructions, six for four weights, are more than a multiprocessor
// issues beside the products of 128 tokens, in whatever order warpgroups take turns.
#include "ahead.cuh"
#include "exchange_16bit.cuh"
#include "layout_16bit.cuh"
#include "multiply_16bit.cuh"
#include "output_16bit.cuh"
#include "panels_16bit.cuh"
#include "ptx.cuh"
#include "rebuild.cuh"
#include "ring.cuh"
#include "schedule.cuh"

namespace {

// The tile of one CTA: its first row and token, and how many slices of it belong to the tile before.
struct Corner {
  int row, token, skip;
};

}  // namespace

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, CTAS)
    gemm_16bit(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap upper_map,
               const __grid_constant__ TensorMap lower_map, const __grid_constant__ TensorMap y_map, u16* y,
               const signed char* row_exponent, const u16* bias, float* partials, u32* counters, int M, int N, int K,
               int group, int cut, int parts, int x_bytes, int stores, const Ahead ahead) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const u32 rank = CLUSTER == 1 ? 0 : ptx::cluster_rank();
  const Panels panels(base, rank);
  const int row_tiles = (N + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS);
  const int token_tiles = (M + TOKENS * CLUSTER_TOKENS - 1) / (TOKENS * CLUSTER_TOKENS);
  const int last_token = max((M + SLICE - 1) / SLICE * SLICE - TOKENS, 0);
  const Schedule schedule(blockIdx.x / WORKER, gridDim.x / WORKER, row_tiles * token_tiles, cut, parts, K / UNIT);
  const u32 warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  const u32 thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    panels.init_barriers();
    if constexpr (CLUSTER_K > 1) Pair::init(base);
    ptx::barrier_init_fence();
  }
  ptx::meet<CLUSTER, !MEET_LATE>();

  // The copy engine is slow where a box reaches past the last token, so the last tile begins where it ends there.
  auto corner = [&](int tile) -> Corner {
    const Position at = position(tile, row_tiles, token_tiles, group);
    const int token = (at.token * CLUSTER_TOKENS + panels.rank_token) * TOKENS;
    const int from = min(token, last_token);
    return {(at.row * CLUSTER_ROWS + int(panels.rank_row)) * ROWS, from, (token - from) / SLICE};
  };

  if (warpgroup == CONSUMERS) {
#if PRODUCER_REGISTERS
    ptx::registers_less<PRODUCER_REGISTERS>();
#endif
    if (thread == 0) {
      // Weights depend on nothing: they are asked for before the kernel before this one has ended.
      Ring<WEIGHT_STAGES> ring;
      u32 last_full = panels.weight_full(0), last_parity = 0;
      for (int index = 0; index < schedule.count; ++index) {
        if constexpr (CLUSTER_K > 1) Pair::await_taken(base, index - schedule.whole_count);
        const Segment segment = schedule.segment(index);
        const int row = corner(segment.tile).row + panels.own_row();
        for (int unit = segment.first; unit < segment.last; ++unit) {
          ptx::barrier_wait(panels.weight_empty(ring.stage), ring.parity ^ 1);
          ptx::barrier_expect(panels.weight_full(ring.stage), 2 * PLANE_BYTES);
          panels.load_weights(&upper_map, 0, unit * N + row, ring.stage);
          panels.load_weights(&lower_map, 1, unit * N + row, ring.stage);
          last_full = panels.weight_full(ring.stage), last_parity = ring.parity;
          ring.advance();
        }
      }
      // A CTA whose cluster has but one whole tile may have nothing to do.
      if (schedule.count > 0) ptx::barrier_wait(last_full, last_parity);
      ask_ahead(ahead);
    } else if (thread == 32) {
      ptx::wait_for_previous_kernel();
      ptx::let_next_kernel_start();
      Ring<X_STAGES> ring;
      for (int index = 0; index < schedule.count; ++index) {
        if constexpr (CLUSTER_K > 1) Pair::await_taken(base, index - schedule.whole_count);
        const Segment segment = schedule.segment(index);
        const int first_token = corner(segment.tile).token;
        for (int step = segment.first * 2; step < segment.last * 2; ++step) {
          ptx::barrier_wait(panels.x_empty(ring.stage), ring.parity ^ 1);
          ptx::barrier_expect(panels.x_full(ring.stage), x_bytes);
          panels.load_x(&x_map, step, first_token, ring.stage);
          ring.advance();
        }
      }
    }
  } else {
#if CONSUMER_REGISTERS
    ptx::registers_more<CONSUMER_REGISTERS>();
#endif
    const u32 lane = thread % 32, warp = thread / 32;
    const u32 k_slice = warpgroup % SLICED_K, row_offset = warpgroup / SLICED_K * 64 + warp * 16;
    // Of the first of two 64-wide steps; the second one's is 16 bytes on, which the swizzle makes ^ 16.
    const u32 share = base + WEIGHT_OFFSET + (row_offset + lane / 4) * UNIT +
                      ((lane % 4 * 2 ^ lane / 4 ^ k_slice) << 4);
    // Of this warpgroup: where its sums of part `part` of `tile` lie, one float4 a thread, and the tile's counter.
    auto scratch = [&](int part, int tile) {
      const size_t slot = (size_t(part * cut + tile) * CLUSTER + rank) * CONSUMERS + warpgroup;
      return reinterpret_cast<float4*>(partials) + slot * (OWN_SUMS / 4 * 128) + thread;
    };
    auto counter = [&](int tile) { return counters + (tile * CLUSTER + rank) * CONSUMERS + warpgroup; };

    Output output(&y_map, y, row_exponent, bias, M, N, stores, base, warpgroup, thread);
    Pair pair(base, warpgroup * 4 + warp, lane, rank);

    // Who gathers a slice of a tile that parts share. A worker with one part keeps its own sums in registers.
    auto gathers = [&](int slice, const Segment& segment, const Corner& at) {
      return (slice - at.skip) % parts == segment.part;
    };
    // Of this warpgroup, which stores the tokens of its own slices alone.
    auto own = [&](Corner at) -> Corner {
      return {at.row, at.token + int(k_slice) * OWN_TOKENS, max(at.skip - int(k_slice) * SLICES, 0)};
    };
    const bool kept = schedule.part_count == 1;

    ptx::wait_for_previous_kernel();
    float sums[SUMS];
    Ring<X_STAGES> x_ring;
    Ring<WEIGHT_STAGES> weight_ring;
    if (k_slice == 1) x_ring.advance();
    for (int index = 0; index < schedule.count; ++index) {
      const Segment segment = schedule.segment(index);
      const Corner at = own(corner(segment.tile));
      output.begin(at.row);

      u32 weights[SETS][16];
      int previous = 0;
      auto multiply = [&](u32 (&operand)[16], bool first) {
        ptx::barrier_wait(panels.x_full(x_ring.stage), x_ring.parity);
        multiply_step(sums, operand, base + x_ring.stage * X_BYTES, first);
        if constexpr (SETS == 2) {
          // The step before is through: its registers may be written, and its x.
          ptx::wgmma_wait<1>();
          if (!first) panels.release_x(previous, lane);
        }
        previous = x_ring.stage;
#pragma unroll
        for (int i = 0; i < SLICED_K; ++i) x_ring.advance();
      };
      auto make_room = [&](bool first) {
        if constexpr (SETS == 2) return;
        ptx::wgmma_wait<0>();
        if (!first) panels.release_x(previous, lane);
      };
      auto await_weights = [&](int stage, u32 parity) -> u32 {
        ptx::barrier_wait(panels.weight_full(stage), parity);
        return share + stage * 2 * PLANE_BYTES;
      };
      Bytes<UNIT, PLANE_BYTES> bytes[2];
      if constexpr (AHEAD) {
        const u32 from = await_weights(weight_ring.stage, weight_ring.parity);
        bytes[0].load(from);
        bytes[1].load(from ^ 16);
      }
      for (int unit = segment.first; unit < segment.last; ++unit) {
        const bool first = unit == segment.first;
        if constexpr (SLICED_K == 2) {
          bytes[0].load(await_weights(weight_ring.stage, weight_ring.parity));
          make_room(first);
          bytes[0].rebuild(weights[0]);
          multiply(weights[0], first);
          panels.release_weights(weight_ring.stage, lane);
          weight_ring.advance();
          continue;
        }
        const u32 from = AHEAD ? 0 : await_weights(weight_ring.stage, weight_ring.parity);
        make_room(first);
        if constexpr (!AHEAD) bytes[0].load(from);
        bytes[0].rebuild(weights[0]);
        multiply(weights[0], first);
        make_room(false);
        if constexpr (!AHEAD) bytes[1].load(from ^ 16);
        bytes[1].rebuild(weights[SETS - 1]);
        const int stage = weight_ring.stage;
        const u32 parity = weight_ring.parity;
        weight_ring.advance();
        if constexpr (AHEAD) {
          // Behind the last unit it reads the same again, and nothing uses it: no branch may stand here.
          const bool more = unit + 1 < segment.last;
          const u32 next = await_weights(more ? weight_ring.stage : stage, more ? weight_ring.parity : parity);
          bytes[0].load(next);
          bytes[1].load(next ^ 16);
        }
        multiply(weights[SETS - 1], false);
        // wgmma has been issued on all of its weights, so the loads of its bytes have ended.
        panels.release_weights(stage, lane);
      }
      ptx::wgmma_wait<0>();
      ptx::hold(sums);
      panels.release_x(previous, lane);
      if constexpr (SLICED_K == 2) {
        output.await_read();
        auto buffer = [&](u32 owner) { return base + OUTPUT_OFFSET + (owner * 4 + warp) * WARP_BYTES + lane * 16; };
        exchange_in_turns(sums, buffer(warpgroup), buffer(warpgroup ^ 1), k_slice == 1, WARP_PAIRS + warp);
      }
      if constexpr (CLUSTER_K > 1) {
        if (segment.part >= 0) {
          const int end = min(SLICES, (M - at.token + SLICE - 1) / SLICE);
          pair.exchange(sums, at.skip, end,
                        [&](int slice) { output.store(sums + slice * SLICE_SUMS, at.token + slice * SLICE); });
          continue;
        }
      }

      float4* to = segment.part < 0 ? nullptr : scratch(segment.part, segment.tile);
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice) {
        const int token = at.token + slice * SLICE;
        if (slice < at.skip || token >= M) continue;
        const float* sum = sums + slice * SLICE_SUMS;
        if (!to) {
          output.store(sum, token);
          continue;
        }
        if (kept && gathers(slice, segment, at)) continue;
#pragma unroll
        for (int i = 0; i < SLICE / 8; ++i)
          __stcg(to + (slice * (SLICE / 8) + i) * 128,
                 make_float4(sum[i * 4], sum[i * 4 + 1], sum[i * 4 + 2], sum[i * 4 + 3]));
      }
      if (to) {
        __threadfence();
        ptx::warpgroup_sync(warpgroup + 1);
        if (thread == 0) ptx::count_one(counter(segment.tile));
      }
    }

    // Of each tile that this worker computed a part of, every `parts`-th slice: its own part, then the others in order.
    for (int index = schedule.whole_count; CLUSTER_K == 1 && index < schedule.count; ++index) {
      const Segment segment = schedule.segment(index);
      const Corner at = own(corner(segment.tile));
      output.begin(at.row);
      auto mine = [&](int slice) {
        return slice >= at.skip && at.token + slice * SLICE < M && gathers(slice, segment, at);
      };
      auto add = [&](int part, bool first) {
        const float4* from = scratch(part, segment.tile);
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
          if (!mine(slice)) continue;
#pragma unroll
          for (int i = 0; i < SLICE / 8; ++i) {
            const float4 value = __ldcg(from + (slice * (SLICE / 8) + i) * 128);
            float* sum = sums + slice * SLICE_SUMS + i * 4;
            sum[0] = first ? value.x : sum[0] + value.x;
            sum[1] = first ? value.y : sum[1] + value.y;
            sum[2] = first ? value.z : sum[2] + value.z;
            sum[3] = first ? value.w : sum[3] + value.w;
          }
        }
      };
      if (thread == 0) ptx::count_await(counter(segment.tile), parts);
      ptx::warpgroup_sync(warpgroup + 1);
      if (!kept) add(segment.part, true);
      for (int part = 0; part < parts; ++part)
        if (part != segment.part) add(part, false);
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice)
        if (mine(slice)) output.store(sums + slice * SLICE_SUMS, at.token + slice * SLICE);
      // All have waited once all have counted themselves again: the last leaves the counter at zero.
      if (thread == 0) ptx::count_leave(counter(segment.tile), 2 * parts);
    }
    output.await_stored();
  }
  // Others that share a panel with this CTA still signal here until they are through.
  __syncwarp();
  if constexpr (WORKER > 1) ptx::cluster_sync();
}
