// The buffers of x and weights in shared memory. CTAs of a cluster share panels: each fetches a part of a panel for all
// that multiply it, and tells all that fetch parts of its own when it is through with a buffer.
#pragma once
#include "layout_16bit.cuh"

namespace {

// rank: of this CTA in its cluster. Of the CTAs that share panels with it: the first one's rank, and where it stands
// among them.
struct Panels {
  const u32 base, first, rank_token, rank_row;

  __device__ __forceinline__ Panels(u32 base, u32 rank)
      : base(base), first(CLUSTER_K == 1 ? 0 : rank - rank % WORKER), rank_token((rank - first) % CLUSTER_TOKENS),
        rank_row((rank - first) / CLUSTER_TOKENS) {}

  __device__ __forceinline__ u32 x_full(int stage) const { return base + X_FULL + stage * 8; }
  __device__ __forceinline__ u32 x_empty(int stage) const { return base + X_EMPTY + stage * 8; }
  __device__ __forceinline__ u32 weight_full(int stage) const { return base + WEIGHT_FULL + stage * 8; }
  __device__ __forceinline__ u32 weight_empty(int stage) const { return base + WEIGHT_EMPTY + stage * 8; }

  // By one thread, before any other uses them.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < X_STAGES; ++i) {
      ptx::barrier_init(x_full(i), 1);
      ptx::barrier_init(x_empty(i), CONSUMERS / SLICED_K * 4 * CLUSTER_ROWS);
    }
    for (int i = 0; i < WEIGHT_STAGES; ++i) {
      ptx::barrier_init(weight_full(i), 1);
      ptx::barrier_init(weight_empty(i), CONSUMERS * 4 * CLUSTER_TOKENS);
    }
  }

  // The first weight row that this CTA fetches of a tile's.
  __device__ __forceinline__ int own_row() const { return rank_token * PART; }

  // This CTA's part of a weight panel, from `line` of the map on; a buffer has two of them, of 128 bytes a row.
  __device__ __forceinline__ void load_weights(const TensorMap* map, int panel, int line, int stage) const {
    const u32 to = base + WEIGHT_OFFSET + stage * 2 * PLANE_BYTES + panel * PLANE_BYTES + rank_token * PART * UNIT;
    if constexpr (CLUSTER_TOKENS == 1) {
      ptx::load_2d(to, map, 0, line, weight_full(stage), ptx::EVICT_NORMAL);
    } else {
      u16 ctas = 0;
      for (int i = 0; i < CLUSTER_TOKENS; ++i) ctas |= 1 << (first + i + rank_row * CLUSTER_TOKENS);
      ptx::load_2d_multicast(to, map, 0, line, weight_full(stage), ctas, ptx::EVICT_NORMAL);
    }
  }

  // This CTA's part of x, from a tile's first token and step `step` of K on.
  __device__ __forceinline__ void load_x(const TensorMap* map, int step, int first_token, int stage) const {
    u16 ctas = 0;
    for (int i = 0; i < CLUSTER_ROWS; ++i) ctas |= 1 << (first + rank_token + i * CLUSTER_TOKENS);
#pragma unroll
    for (int box = 0; box < X_BOXES; ++box) {
      const int token = (rank_row * X_BOXES + box) * X_BOX;
      const u32 to = base + stage * X_BYTES + token * STEP * 2;
      if constexpr (CLUSTER_ROWS > 1)
        ptx::load_2d_multicast(to, map, step * STEP, first_token + token, x_full(stage), ctas, ptx::EVICT_NORMAL);
      else
        ptx::load_2d(to, map, step * STEP, first_token + token, x_full(stage), ptx::EVICT_NORMAL);
    }
  }

  // By every warp that multiplies, to every CTA that writes to this one's buffer.
  __device__ __forceinline__ void release_x(int stage, u32 lane) const {
    if (lane >= CLUSTER_ROWS) return;
    if constexpr (CLUSTER_ROWS == 1)
      ptx::barrier_arrive(x_empty(stage));
    else
      ptx::barrier_arrive_at(x_empty(stage), first + rank_token + lane * CLUSTER_TOKENS);
  }
  __device__ __forceinline__ void release_weights(int stage, u32 lane) const {
    if (lane >= CLUSTER_TOKENS) return;
    if constexpr (CLUSTER_TOKENS == 1)
      ptx::barrier_arrive(weight_empty(stage));
    else
      ptx::barrier_arrive_at(weight_empty(stage), first + lane + rank_row * CLUSTER_TOKENS);
  }

 private:
  static constexpr int PART = ROWS / CLUSTER_TOKENS;
};

}  // namespace
