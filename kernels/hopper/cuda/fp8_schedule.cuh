// What the parts of gemm_fp8.cu share: sizes of a tile, arguments, and how units of work are shared by clusters.
#pragma once
#include "gate.cuh"
#include "ptx.cuh"
#include "ring.cuh"

namespace {

constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int BLOCK_M = 64 * BLOCKS * CONSUMERS;
constexpr int CHUNK = 128;  // bytes of K in a row of a shared-memory panel, one row of the swizzle
constexpr int STEP = CHUNK * CHUNKS;
constexpr int TOKEN_BYTES = BLOCK_M * CHUNK;
constexpr int WEIGHT_BYTES = BLOCK_N * CHUNK;
constexpr int STAGE_BYTES = (TOKEN_BYTES + WEIGHT_BYTES) * CHUNKS;
constexpr int COLUMN_BYTES = BLOCK_N * 8;  // of a warpgroup: a factor and a bias for each column
// The epilogue goes by slices of SLICE columns, which each warp stages by itself in SLICES places by turns.
constexpr int SLICE_BYTES = 16 * SLICE * 2;
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int SCALE_OFFSET = OUTPUT_OFFSET + CONSUMERS * 4 * SLICES * SLICE_BYTES;
constexpr int SCRATCH_OFFSET = SCALE_OFFSET + CONSUMERS * COLUMN_BYTES;  // a word a warp, twice
constexpr int BARRIER_OFFSET = SCRATCH_OFFSET + CONSUMERS * 4 * 2 * 4;
constexpr int WAITS = CLUSTER_M + CLUSTER_N - 1;  // CTAs that a panel of this one goes to
// Of `flags`: counts of quantised rows by token tile, then CTAs that are through with them, then parts of split tiles.
constexpr int DONE = 1024, PART_FLAGS = 1025;
// Tokens of at most so many turns (16 columns of each thread) have code of their own: a turn without columns costs
// time, too.
constexpr int FEW_TURNS = 3;
// Turns of a token that a thread in the background asks for at once; beside so many sums the producer's warps have
// registers for one.
constexpr int BACKGROUND_BATCH = BLOCKS * BLOCK_N > 256 ? 1 : 3;
constexpr int SUMS = BLOCK_N / 2;  // of a thread in 64 tokens
// Named barriers: 1 + w inside warpgroup w; among all consumers; the first of those inside pairs of warps.
constexpr int ALL_CONSUMERS = 4, PAIRS = 5;

// Parts of a tile share it by pieces, a slice of 64 tokens each.
constexpr int PIECE_SUMS = SLICE / 2, VECTORS = PIECE_SUMS / 4, PIECE_WORDS = PIECE_SUMS / 2;
constexpr int PIECES = BLOCK_N / SLICE * BLOCKS;
// A piece's outputs: of so many columns, and a thread's words.
constexpr int OUT_COLUMNS = SLICE / HALVED, OUT_WORDS = PIECE_WORDS / HALVED;
constexpr int SLOT = 128 * BLOCKS * SUMS / 4;  // of a warpgroup's sums, in float4
// Vectors of another part asked for at once, as many as registers and pieces allow.
constexpr int BATCH = PIECES * VECTORS % 8 == 0 && BLOCKS * BLOCK_N <= 320 ? 8 : PIECES * VECTORS % 4 == 0 ? 4 : 2;

// A piece's sums of a thread.
template <class Sums>
__device__ __forceinline__ auto piece_of(Sums& sums, int piece) {
  return sums[piece % BLOCKS] + piece / BLOCKS * PIECE_SUMS;
}

static_assert(!DEFERRED || (!PROMOTE && CTAS == 1 && BLOCKS * BLOCK_N <= 256));
static_assert(BLOCK_N % 16 == 0 && BLOCK_N <= 256 && BLOCKS <= 2 && CONSUMERS <= 3);
static_assert(BLOCK_M % (8 * CLUSTER_N) == 0 && BLOCK_N % (8 * CLUSTER_M) == 0);

struct Arguments {
  const TensorMap *codes_map, *upper_map, *y_map;
  u16* y;
  const u8* x;
  u8* codes;
  float* x_scale;
  const signed char* row_exponent;
  const u16* bias;
  float* partials;
  u32* flags;
  int M, N, K, x_pitch, token_bytes;
  bool panels;
  int front, team_warps;
};

struct Unit {
  int m, n, first, steps;  // from which step of K, and how many
};

// One of the parts that a tile's K is in, and the tile's number among such tiles.
struct Part {
  int tile, part, parts;
};

// The units of work, `units` of them, that clusters share: worker w takes w, w + workers, ...
struct Schedule {
  int tiles_m, tiles_n, steps, group, whole, split, units;

  __device__ __forceinline__ static u32 rank() { return CLUSTER > 1 ? ptx::cluster_rank() : 0; }
  __device__ __forceinline__ static int worker() { return ptx::block() / CLUSTER; }
  __device__ __forceinline__ static int workers() { return ptx::blocks() / CLUSTER; }

  __device__ __forceinline__ bool is_part(int index) const { return SPLITS && index >= whole; }

  __device__ __forceinline__ Part part(int index) const {
    const int tile = (index - whole) / split;
    return {tile * CLUSTER + int(rank()), index - whole - tile * split, split};
  }

  // Unit `index` as the tile of this CTA. Token tiles run fastest inside groups of `group`.
  __device__ __forceinline__ Unit unit(int index) const {
    Unit unit;
    unit.first = 0, unit.steps = steps;
    if (is_part(index)) {
      const int tile = whole + (index - whole) / split, part = (index - whole) % split;
      unit.first = steps * part / split;
      unit.steps = steps * (part + 1) / split - unit.first;
      index = tile;
    }
    const u32 rank = Schedule::rank();
    const int per_group = group * tiles_n;
    const int first = index / per_group * group;
    const int height = min(tiles_m - first, group);
    const int within = index - first * tiles_n;
    unit.m = ((first + within % height) * CLUSTER_M + rank % CLUSTER_M) * BLOCK_M;
    unit.n = (within / height * CLUSTER_N + rank / CLUSTER_M) * BLOCK_N;
    return unit;
  }
};

// Arrives at the barrier at the same offset in CTA `rank` of the cluster.
__device__ __forceinline__ void arrive(u32 barrier, u32 rank) {
  if constexpr (CLUSTER == 1)
    ptx::barrier_arrive(barrier);
  else
    ptx::barrier_arrive_at(barrier, rank);
}

// One more row of its tile is there: call it after the writers have met.
__device__ __forceinline__ void count_row(u32* flags, int row, u32 lane) {
  __syncwarp();
  if (lane == 0) {
    __threadfence();
    ptx::count_one(flags + row / BLOCK_M);
  }
}

}  // namespace
