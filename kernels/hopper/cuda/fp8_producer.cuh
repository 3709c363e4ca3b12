// The producer's warpgroup of gemm_fp8.cu: one thread streams operands, idle warps quantise tokens.
#pragma once
#include "elements.cuh"
#include "fp8_schedule.cuh"
#include "quantise.cuh"

namespace {

// One thread: streams the operands of all units of this CTA.
class Producer {
 public:
  __device__ __forceinline__ Producer(const Arguments& arguments, const Schedule& schedule, u32 base)
      : arguments_(arguments), schedule_(schedule), base_(base) {
    rank_m_ = schedule.rank() % CLUSTER_M, rank_n_ = schedule.rank() / CLUSTER_M;
    for (int i = 0; i < CLUSTER_N; ++i) token_ctas_ |= 1 << (rank_m_ + i * CLUSTER_M);
    for (int i = 0; i < CLUSTER_M; ++i) weight_ctas_ |= 1 << (i + rank_n_ * CLUSTER_M);
  }

  __device__ __forceinline__ void run() {
    // Weights depend on nothing: the first of them are asked for before anything is waited for.
    Unit unit = schedule_.unit(schedule_.worker());
    const int early = min(unit.steps, STAGES);
    for (int i = 0; i < early; ++i) {
      ptx::barrier_expect(full(i), CHUNKS * (arguments_.token_bytes + WEIGHT_BYTES));
      load_weights(i, unit, i);
    }
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    await_codes(unit.m);
    Ring<STAGES> ring, last;
    for (int i = 0; i < early; ++i, ring.advance()) load_tokens(i, unit, i), last = ring;

    int step = early;
    for (int index = schedule_.worker(); index < schedule_.units; index += schedule_.workers(), step = 0) {
      if (index != schedule_.worker()) {
        unit = schedule_.unit(index);
        await_codes(unit.m);
      }
      for (; step < unit.steps; ++step, ring.advance()) {
        ptx::barrier_wait(empty(ring.stage), ring.parity ^ 1);
        ptx::barrier_expect(full(ring.stage), CHUNKS * (arguments_.token_bytes + WEIGHT_BYTES));
        load_weights(ring.stage, unit, step);
        load_tokens(ring.stage, unit, step);
        last = ring;
      }
    }
    ptx::barrier_wait(full(last.stage), last.parity);
    clear_counts();
  }

 private:
  __device__ __forceinline__ u32 full(int stage) const { return base_ + BARRIER_OFFSET + stage * 8; }
  __device__ __forceinline__ u32 empty(int stage) const { return full(STAGES + stage); }

  // Of a panel that several CTAs of the cluster share, each fetches its part for all of them.
  template <int SHARERS>
  __device__ __forceinline__ void load(u32 to, const TensorMap* map, int k, int row, int stage, u16 ctas) const {
    if constexpr (SHARERS > 1)
      ptx::load_2d_multicast(to, map, k, row, full(stage), ctas, ptx::EVICT_NORMAL);
    else
      ptx::load_2d(to, map, k, row, full(stage), ptx::EVICT_NORMAL);
  }

  __device__ __forceinline__ void load_tokens(int stage, const Unit& unit, int step) const {
    constexpr int PART = BLOCK_M / CLUSTER_N;
    const u32 to = base_ + stage * STAGE_BYTES + rank_n_ * PART * CHUNK;
    for (int i = 0; i < CHUNKS; ++i)
      load<CLUSTER_N>(to + i * TOKEN_BYTES, arguments_.codes_map, (unit.first + step) * STEP + i * CHUNK,
                      unit.m + rank_n_ * PART, stage, token_ctas_);
  }

  __device__ __forceinline__ void load_weights(int stage, const Unit& unit, int step) const {
    constexpr int PART = BLOCK_N / CLUSTER_M;
    const u32 to = base_ + stage * STAGE_BYTES + CHUNKS * TOKEN_BYTES + rank_m_ * PART * CHUNK;
    for (int i = 0; i < CHUNKS; ++i) {
      const int chunk = (unit.first + step) * CHUNKS + i, row = unit.n + rank_m_ * PART;
      load<CLUSTER_M>(to + i * WEIGHT_BYTES, arguments_.upper_map, arguments_.panels ? 0 : chunk * CHUNK,
                      arguments_.panels ? chunk * arguments_.N + row : row, stage, weight_ctas_);
    }
  }

  // Tokens are quantised in this launch: a tile's are there when as many rows have been counted.
  __device__ __forceinline__ void await_codes(int m) const {
    if (m >= arguments_.M) return;
    ptx::count_await(arguments_.flags + m / BLOCK_M, min(BLOCK_M, arguments_.M - m));
    asm volatile("fence.proxy.async.global;" ::: "memory");
  }

  // The last CTA to have seen its tokens leaves the counts at zero for the next launch.
  __device__ __forceinline__ void clear_counts() const {
    u32* flags = arguments_.flags;
    if (atomicAdd(flags + DONE, 1) != gridDim.x - 1) return;
    for (int i = 0; i * BLOCK_M < arguments_.M; ++i) flags[i] = 0;
    flags[DONE] = 0;
  }

  const Arguments& arguments_;
  const Schedule& schedule_;
  const u32 base_;
  u32 rank_m_, rank_n_;
  u16 token_ctas_ = 0, weight_ctas_ = 0;
};

// One of the producer's idle warps, of which this is `warp`: quantises what the first tiles do not need.
__device__ __forceinline__ void quantise_background(const Arguments& a, int warp, u32 lane) {
  ptx::wait_for_previous_kernel();
  auto largest = [](u32 magnitude) { return __reduce_max_sync(0xFFFFFFFF, magnitude); };
  for (int row = a.front + blockIdx.x + warp * gridDim.x; row < a.M; row += 3 * gridDim.x) {
    const u8* x = a.x + size_t(row) * a.x_pitch;
    u8* codes = a.codes + size_t(row) * a.K;
    quantise<0, BACKGROUND_BATCH>(x, codes, a.x_scale + row, a.K, lane, 32, a.panels, largest);
    count_row(a.flags, row, lane);
  }
}

}  // namespace
