// y [M, N] = x [M, K] w^T * 2^row_exponent (+ bias), as gemm_16bit.cu, for many tokens: each weight is rebuilt once for
// all the tiles of a wave that need it, instead of once for each of them.
//
// Operands are those of gemm_16bit.cu. `ring` holds RING slots of CHUNK * 128 of K by `ring_rows` weight rows, as 16-bit
// floats in the order of wgmma's A fragments: small enough to stay in the L2 cache. counters: one a slot and one more,
// 128 bytes apart, zero before and after. Products that share either run one after another.
//
// * two warps of every CTA rebuild its share of the rows of the wave (waves.cuh), a chunk of K after another, in
//   registers, and write it to the ring. They run ahead of the products by as many chunks as the ring has room for;
// * a thread streams the rebuilt rows of its tile from the ring, another x; two warpgroups multiply, as in gemm_16bit.cu
//   but with operands that are ready. At the power limit what a rebuild costs is energy, and with it time.
//
// A slot's counter goes up by the number of CTAs when all have written their share of it, and again when all have read
// theirs. Nobody counts for a use of the slot before all have counted for what came before, so the counter says what
// the slot holds; waits end if all CTAs are resident.
#include "layout_16bit.cuh"
#include "multiply_16bit.cuh"
#include "output_16bit.cuh"
#include "panels_16bit.cuh"
#include "ptx.cuh"
#include "rebuild.cuh"
#include "ring.cuh"
#include "waves.cuh"

namespace {

constexpr int ROWS_AT_ONCE = 4;  // by the 32 threads of a warp, 16 bytes of each plane a thread
constexpr int GROUPS = CHUNK / UNITS_AT_ONCE;
constexpr int COUNTER_PITCH = 32;

// Counts the chunks of all waves, and says what the counter of a chunk's slot has to reach.
struct Slots {
  u32* counters;
  u32 ctas;
  int slot = 0;
  u32 round = 0;

  __device__ __forceinline__ u32* counter() const { return counters + slot * COUNTER_PITCH; }
  __device__ __forceinline__ u32 free() const { return 2 * round * ctas; }
  __device__ __forceinline__ u32 full() const { return free() + ctas; }
  __device__ __forceinline__ void advance() {
    if (++slot == RING) {
      slot = 0;
      ++round;
    }
  }
  // Before this thread ends; of all CTAs' three threads that count, the last sets everything back.
  __device__ __forceinline__ void leave() const {
    __threadfence();
    u32* left = counters + RING * COUNTER_PITCH;
    if (atomicAdd(left, 1) + 1 != 3 * ctas) return;
    __threadfence();
    for (int i = 0; i <= RING; ++i) counters[i * COUNTER_PITCH] = 0;
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, 1)
    gemm_16bit_once(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap ring_map,
                    const __grid_constant__ TensorMap y_map, u16* y, const u8* upper, const u8* lower, u8* ring,
                    const signed char* row_exponent, const u16* bias, u32* counters, int M, int N, int K, int width,
                    int ring_rows, int x_bytes, int stores) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const Panels panels(base, CLUSTER == 1 ? 0 : ptx::cluster_rank());
  const int row_tiles = (N + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS);
  const int token_tiles = (M + TOKENS * CLUSTER_TOKENS - 1) / (TOKENS * CLUSTER_TOKENS);
  const int last_token = max((M + SLICE - 1) / SLICE * SLICE - TOKENS, 0);
  const int units = K / UNIT;
  const int worker = blockIdx.x / CLUSTER;
  Waves waves(gridDim.x / CLUSTER, row_tiles, token_tiles, width);
  Slots slots{counters, gridDim.x};
  const u32 warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  const u32 thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    panels.init_barriers();
    ptx::barrier_init_fence();
  }
  ptx::meet<CLUSTER>();

  if (warpgroup == CONSUMERS) {
    ptx::registers_less<PRODUCER_REGISTERS>();
    if (thread >= 64) {
      // Two warps take chunks by turns.
      const u32 lane = thread % 32, turn = thread / 32 - 2;
      const u32 piece = lane % 8;  // of 16 bytes, of a row of 128 of K: two for each of the four threads of a fragment
      u32 chunk = 0;
      bool started = false;
      for (; waves.more(); waves.advance()) {
        const int first_row = waves.row * CLUSTER_ROWS * ROWS;
        const int rows = min(waves.height * CLUSTER_ROWS * ROWS, N - first_row);
        const int begin = u32(rows) * blockIdx.x / gridDim.x, end = u32(rows) * (blockIdx.x + 1) / gridDim.x;
        // Into the L2 cache: a chunk from unit `first` on.
        auto ask = [&](int first) {
          if (lane >= CHUNK || first + int(lane) >= units || begin == end) return;
          const u32 from = u32((first + lane) * N + first_row + begin) * UNIT;
          ptx::prefetch_l2(upper + from, (end - begin) * UNIT);
          ptx::prefetch_l2(lower + from, (end - begin) * UNIT);
        };
        ask(chunk % 2 == turn ? 0 : CHUNK);
        for (int first = 0; first < units; first += CHUNK, slots.advance(), ++chunk) {
          if (chunk % 2 != turn) continue;
          ask(first + 2 * CHUNK);
          const int steps = (end - begin + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * GROUPS;
          // Each step's bytes are asked for before the step before is written.
          uint4 high[UNITS_AT_ONCE] = {}, low[UNITS_AT_ONCE] = {};
          auto fetch = [&](int step) {
            const int row = begin + step / GROUPS * ROWS_AT_ONCE + lane / 8, unit = first + step % GROUPS * UNITS_AT_ONCE;
#pragma unroll
            for (int i = 0; i < UNITS_AT_ONCE; ++i) {
              if (row >= end || unit + i >= units) continue;
              const u32 from = u32((unit + i) * N + first_row + row) * UNIT + piece * 16;
              high[i] = __ldcs(reinterpret_cast<const uint4*>(upper + from));
              low[i] = __ldcs(reinterpret_cast<const uint4*>(lower + from));
            }
          };
          fetch(0);
          // The weights depend on nothing, what is written over on the kernel before and on the slot's readers.
          if (!started) ptx::wait_for_previous_kernel();
          started = true;
          if (lane == 0) ptx::count_await(slots.counter(), slots.free());
          __syncwarp();
          for (int step = 0; step < steps; ++step) {
            const int row = begin + step / GROUPS * ROWS_AT_ONCE + lane / 8, unit = step % GROUPS * UNITS_AT_ONCE;
            uint4 now_high[UNITS_AT_ONCE], now_low[UNITS_AT_ONCE];
#pragma unroll
            for (int i = 0; i < UNITS_AT_ONCE; ++i) now_high[i] = high[i], now_low[i] = low[i];
            fetch(step + 1);
            // Units behind the last one of K are written too, and nobody reads them.
            if (row >= end) continue;
#pragma unroll
            for (int i = 0; i < UNITS_AT_ONCE; ++i) {
              const u32 line = ((slots.slot * CHUNK + unit + i) * 2 + piece % 2) * ring_rows + row;
              uint4* to = reinterpret_cast<uint4*>(ring + line * 128 + piece / 2 * 32);
              uint4 weights;
              rebuild(now_high[i].x, now_low[i].x, weights.x, weights.y);
              rebuild(now_high[i].y, now_low[i].y, weights.z, weights.w);
              __stcg(to, weights);
              rebuild(now_high[i].z, now_low[i].z, weights.x, weights.y);
              rebuild(now_high[i].w, now_low[i].w, weights.z, weights.w);
              __stcg(to + 1, weights);
            }
          }
          ptx::global_copies_fence();
          __syncwarp();
          if (lane == 0) ptx::count_one(slots.counter());
        }
      }
      if (!started) ptx::wait_for_previous_kernel();
      if (lane == 0) slots.leave();
    } else if (thread == 0) {
      ptx::wait_for_previous_kernel();
      Ring<WEIGHT_STAGES> stages;
      u32* read = nullptr;  // counter of the slot that this CTA has yet to hand back
      bool ready = false;   // of the next chunk's slot
      // Copies end in any order: all must have, but that of a unit of the next chunk if one has been `issued`.
      auto hand_back = [&](bool issued) {
        if (!read) return;
#pragma unroll
        for (int stage = 0; stage < WEIGHT_STAGES; ++stage)
          if (!issued || stage != stages.stage)
            ptx::barrier_wait(panels.weight_full(stage), stage < stages.stage ? stages.parity : stages.parity ^ 1);
        ptx::count_one(read);
        read = nullptr;
      };
      for (; waves.more(); waves.advance()) {
        const bool holds = waves.holds(worker);
        const int row = ((waves.row_of(worker) - waves.row) * CLUSTER_ROWS + int(panels.rank_row)) * ROWS + panels.own_row();
        for (int first = 0; first < units; first += CHUNK, slots.advance()) {
          if (!ready) {
            ptx::count_await(slots.counter(), slots.full());
            ptx::global_copies_fence();
          }
          ready = false;
          if (!holds) {
            hand_back(false);
            ptx::count_one(slots.counter());
            continue;
          }
          Slots next = slots;
          next.advance();
          for (int i = 0; i < min(CHUNK, units - first); ++i) {
            ptx::barrier_wait(panels.weight_empty(stages.stage), stages.parity ^ 1);
            ptx::barrier_expect(panels.weight_full(stages.stage), 2 * PLANE_BYTES);
            for (int half = 0; half < 2; ++half)
              panels.load_weights(&ring_map, half, ((slots.slot * CHUNK + i) * 2 + half) * ring_rows + row, stages.stage);
            // While the next stage is in use: what is on its way takes no time from the copies.
            if (i == 0) hand_back(true);
            if (i > 0 && !ready && ptx::count_read(next.counter()) >= next.full()) {
              ptx::global_copies_fence();
              ready = true;
            }
            stages.advance();
          }
          read = slots.counter();
        }
      }
      slots.leave();
    } else if (thread == 32) {
      ptx::wait_for_previous_kernel();
      ptx::let_next_kernel_start();
      Ring<X_STAGES> stages;
      for (; waves.more(); waves.advance()) {
        if (!waves.holds(worker)) continue;
        const int token = min((waves.token_of(worker) * CLUSTER_TOKENS + int(panels.rank_token)) * TOKENS, last_token);
        for (int step = 0; step < units * 2; ++step) {
          ptx::barrier_wait(panels.x_empty(stages.stage), stages.parity ^ 1);
          ptx::barrier_expect(panels.x_full(stages.stage), x_bytes);
          panels.load_x(&x_map, step, token, stages.stage);
          stages.advance();
        }
      }
    }
  } else {
    ptx::registers_more<CONSUMER_REGISTERS>();
    const u32 lane = thread % 32, warp = thread / 32;
    // Of the first half of a thread's 32 bytes; the second is 16 bytes on, which the swizzle makes ^ 16.
    const u32 share = base + WEIGHT_OFFSET + (warpgroup * 64 + warp * 16 + lane / 4) * UNIT +
                      ((lane % 4 * 2 ^ lane / 4) << 4);
    Output output(&y_map, y, row_exponent, bias, M, N, stores, base, warpgroup, thread);
    ptx::wait_for_previous_kernel();
    float sums[SUMS];
    Ring<X_STAGES> x_ring;
    Ring<WEIGHT_STAGES> weight_ring;
    for (; waves.more(); waves.advance()) {
      if (!waves.holds(worker)) continue;
      const int own_token = (waves.token_of(worker) * CLUSTER_TOKENS + int(panels.rank_token)) * TOKENS;
      const int token = min(own_token, last_token), skip = (own_token - token) / SLICE;
      output.begin((waves.row_of(worker) * CLUSTER_ROWS + int(panels.rank_row)) * ROWS);

      u32 weights[SETS][16];
      int previous = 0;
      auto step = [&](u32 (&operand)[16], u32 from, bool first) {
        if constexpr (SETS == 1) {
          ptx::wgmma_wait<0>();
          if (!first) panels.release_x(previous, lane);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            u32 words[4];
            ptx::load_shared(words, (from ^ half * 16) + row * 8 * UNIT);
#pragma unroll
            for (int i = 0; i < 4; ++i) operand[(half * 2 + i / 2) * 4 + i % 2 * 2 + row] = words[i];
          }
        ptx::barrier_wait(panels.x_full(x_ring.stage), x_ring.parity);
        multiply_step(sums, operand, base + x_ring.stage * X_BYTES, first);
        if constexpr (SETS == 2) {
          ptx::wgmma_wait<1>();
          if (!first) panels.release_x(previous, lane);
        }
        previous = x_ring.stage;
        x_ring.advance();
      };
      for (int unit = 0; unit < units; ++unit) {
        ptx::barrier_wait(panels.weight_full(weight_ring.stage), weight_ring.parity);
        const u32 from = share + weight_ring.stage * 2 * PLANE_BYTES;
        step(weights[0], from, unit == 0);
        step(weights[SETS - 1], from + PLANE_BYTES, false);
        panels.release_weights(weight_ring.stage, lane);
        weight_ring.advance();
      }
      ptx::wgmma_wait<0>();
      ptx::hold(sums);
      panels.release_x(previous, lane);
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice)
        if (slice >= skip && token + slice * SLICE < M) output.store(sums + slice * SLICE_SUMS, token + slice * SLICE);
    }
    output.await_stored();
  }
  __syncwarp();
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
