// y [M, N] = (q(x) * x_scale) (e4m3(upper) * 2^(row_exponent - 8))^T + bias on Hopper: the FP8 mode, one launch.
//
// Operands. x: [M, K] 16-bit floats, rows `x_pitch` bytes apart; upper: E4M3 [N, K]. Rows of both begin on 16-byte
// boundaries and K is a multiple of 16. M, N and K are otherwise free: the copy engine fills what lies outside with
// zeros and clips what is stored outside. Scratch: codes [M, K] and x_scale [M], which this launch fills; partials and
// flags for split K; flags are zero before and after.
//
// Quantising. Consumers first quantise the `front` tokens, those that the first tiles need; three idle warps of the
// producer's warpgroup quantise the others meanwhile. Each token is counted for its tile, and the producer asks for a
// tile's codes when all are. CTAs wait for one another here: all of the grid must be resident, which the launcher sees
// to, and products that share scratch must run one after another.
//
// Multiplying, persistent over tiles of BLOCK_M tokens by BLOCK_N weight rows:
// * one thread streams both operands through STAGES shared-memory buffers by TMA. CTAs of a cluster that share a
//   panel each fetch a part of it and multicast it to the others;
// * CONSUMERS warpgroups multiply (wgmma, both operands from shared memory), each its own BLOCKS * 64 tokens of the
//   tile, one step in flight while the next is issued;
// * a warpgroup scales, adds the bias and stores by itself, while the producer fills buffers for the next tile and
//   the other warpgroups go on.
//
// Split K: `split` parts of a tile are separate units of work. All but the last write their sums to `partials` and
// count themselves; the last adds them in order and stores. Units are taken in ascending order and the last part waits
// only for lower units.
//
// Roof: one byte a weight over the memory bandwidth for few tokens, the E4M3 tensor-core rate for many; between them
// shared memory, whose 128 bytes a cycle feed the copies in (BLOCK_M + BLOCK_N) and wgmma's operands (64 + BLOCK_N).
#include "ptx.cuh"
#include "elements.cuh"
#include "wgmma.cuh"

namespace {

constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int BLOCK_M = 64 * BLOCKS * CONSUMERS;
constexpr int CHUNK = 128;  // bytes of K in a row of a shared-memory panel, one row of the swizzle
constexpr int STEP = CHUNK * CHUNKS;
constexpr int TOKEN_BYTES = BLOCK_M * CHUNK;
constexpr int WEIGHT_BYTES = BLOCK_N * CHUNK;
constexpr int STAGE_BYTES = (TOKEN_BYTES + WEIGHT_BYTES) * CHUNKS;
// Columns of the output staged at once: one row of the widest swizzle that divides the tile.
constexpr int SLICE = BLOCK_N % 64 == 0 ? 64 : BLOCK_N % 32 == 0 ? 32 : 16;
constexpr int SLICE_BYTES = 64 * SLICE * 2;
constexpr int SWIZZLE = SLICE / 8 - 1;
constexpr int COLUMN_BYTES = BLOCK_N * 4;  // of a warpgroup: a bfloat16 factor and a bias for each column
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int COLUMN_OFFSET = OUTPUT_OFFSET + CONSUMERS * 2 * SLICE_BYTES;
constexpr int SCRATCH_OFFSET = COLUMN_OFFSET + CONSUMERS * COLUMN_BYTES;  // a word a warp, twice
constexpr int BARRIER_OFFSET = SCRATCH_OFFSET + CONSUMERS * 4 * 2 * 4;
constexpr int COLUMN_LOADS = (BLOCK_N + 127) / 128;
// Of `flags`: counts of quantised rows by token tile, then CTAs that are through with them, then split tiles.
constexpr int DONE = 1024, SPLIT_FLAGS = 1025;
// Where sums leave no registers, the epilogue asks for scales itself.
constexpr bool LATE = BLOCKS * BLOCK_N > 320;
constexpr int FRONT_HOLD = 8, BACKGROUND_HOLD = 1;
constexpr int SUMS = BLOCK_N / 2;
constexpr int WAITS = CLUSTER_M + CLUSTER_N - 1;  // CTAs that a panel of this one goes to

static_assert(BLOCK_N % 16 == 0 && BLOCK_N <= 256);
static_assert(BLOCK_M % (8 * CLUSTER_N) == 0 && BLOCK_N % (8 * CLUSTER_M) == 0);

// Arrives at the barrier at the same offset in CTA `rank` of the cluster.
__device__ __forceinline__ void arrive(u32 barrier, u32 rank) {
  if constexpr (CLUSTER == 1)
    ptx::barrier_arrive(barrier);
  else
    ptx::barrier_arrive_at(barrier, rank);
}

// Until `count` has reached `target`, by increments that others publish.
__device__ __forceinline__ void await_count(const u32* count, u32 target) {
#if BOUNDED
  for (u32 polls = 0; ptx::flag_read(count) != target; ++polls)
    if (polls > (1u << 22)) ptx::give_up();
#else
  while (ptx::flag_read(count) != target) {
  }
#endif
}

__device__ __forceinline__ void count_one(u32* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

// The larger of two 16-bit floats' magnitudes, by halves; NaN is larger than anything.
__device__ __forceinline__ u32 larger(u32 magnitudes, u32 words) {
  asm("max.u16x2 %0, %0, %1;" : "+r"(magnitudes) : "r"(words & 0x7FFF7FFF));
  return magnitudes;
}

// Sixteen columns, two to a word, scaled and narrowed to E4M3, four to a word in natural order; for `permute`
// word t holds columns 2t, 2t + 1, 2t + 8, 2t + 9: what thread t of a quad feeds to the tensor cores.
__device__ __forceinline__ uint4 narrow(const u32 (&words)[8], float factor, bool permute) {
  u32 pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    u16 pair;
    const float low = widen(u16(words[i])) * factor, high = widen(u16(words[i] >> 16)) * factor;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    pairs[i] = pair;
  }
  uint4 codes;
  codes.x = pairs[0] | (permute ? pairs[4] : pairs[1]) << 16;
  codes.y = (permute ? pairs[1] : pairs[2]) | (permute ? pairs[5] : pairs[3]) << 16;
  codes.z = (permute ? pairs[2] : pairs[4]) | (permute ? pairs[6] : pairs[5]) << 16;
  codes.w = (permute ? pairs[3] : pairs[6]) | pairs[7] << 16;
  return codes;
}

// Word t of lane j of a quad goes to word j of lane t.
__device__ __forceinline__ uint4 transpose(uint4 codes, u32 lane) {
  const bool high = lane & 2, odd = lane & 1;
  const u32 r0 = __shfl_xor_sync(0xFFFFFFFF, high ? codes.x : codes.z, 2);
  const u32 r1 = __shfl_xor_sync(0xFFFFFFFF, high ? codes.y : codes.w, 2);
  const u32 a00 = high ? r0 : codes.x, a01 = high ? r1 : codes.y;
  const u32 a10 = high ? codes.z : r0, a11 = high ? codes.w : r1;
  const u32 q0 = __shfl_xor_sync(0xFFFFFFFF, odd ? a00 : a01, 1);
  const u32 q1 = __shfl_xor_sync(0xFFFFFFFF, odd ? a10 : a11, 1);
  return odd ? make_uint4(q0, a01, q1, a11) : make_uint4(a00, q0, a10, q1);
}

// Quantises one token: codes[p] = e4m3(x[k(p)] * 448 / amax), scale = amax / 448. A team of `lanes` threads,
// of which this is `lane`, takes 16 columns each in turn; HOLD of a thread's turns stay in registers between
// finding amax and writing, the others are read twice. `largest` makes a thread's magnitude the team's.
template <int HOLD, class Largest>
__device__ __forceinline__ void quantise(const u8* x, u8* codes, float* scale, int K, u32 lane, u32 lanes, bool permute,
                         Largest largest) {
  const int chunks = K / 16;
  u32 held[HOLD][8];
  u32 magnitudes = 0;
  auto load = [&](u32 (&words)[8], int chunk) {
    const uint4* from = reinterpret_cast<const uint4*>(x) + chunk * 2;
    const uint4 low = chunk < chunks ? from[0] : make_uint4(0, 0, 0, 0);
    const uint4 high = chunk < chunks ? from[1] : make_uint4(0, 0, 0, 0);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
  };
  auto visit = [&](const u32 (&words)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) magnitudes = larger(magnitudes, words[i]);
  };
#pragma unroll
  for (int i = 0; i < HOLD; ++i) load(held[i], lane + i * lanes);
#pragma unroll
  for (int i = 0; i < HOLD; ++i) visit(held[i]);
  for (int chunk = lane + HOLD * lanes; chunk < chunks; chunk += lanes) {
    u32 words[8];
    load(words, chunk);
    visit(words);
  }
  float amax = widen(u16(largest(max(magnitudes & 0xFFFF, magnitudes >> 16))));
  amax = amax < 0x1p-100f ? 0x1p-100f : amax;
  const float factor = __fdiv_rn(448.0f, amax);
  if (lane == 0) *scale = __fdiv_rn(amax, 448.0f);
  auto write = [&](const u32 (&words)[8], int chunk) {
    uint4 out = narrow(words, factor, permute);
    if (permute) out = transpose(out, lane);
    if (chunk < chunks) reinterpret_cast<uint4*>(codes)[chunk] = out;
  };
#pragma unroll
  for (int i = 0; i < HOLD; ++i)
    if (i * lanes < chunks) write(held[i], lane + i * lanes);
  for (int first = HOLD * lanes; first < chunks; first += lanes) {
    u32 words[8];
    load(words, first + lane);
    write(words, first + lane);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// One more row of its tile is there: call it after the writers have met.
__device__ __forceinline__ void count_row(u32* flags, int row, u32 lane) {
  __syncwarp();
  if (lane == 0) {
    __threadfence();
    count_one(flags + row / BLOCK_M);
  }
}

struct Unit {
  int m, n, part, begin, end, tile;
};

// Unit `index` of the cluster, as the tile of this CTA. Token tiles run fastest inside groups of `group`.
__device__ __forceinline__ Unit decode(int index, u32 rank, int tiles_m, int tiles_n, int group, int split, int steps) {
  int super = index / split;
  Unit unit;
  unit.part = index - super * split;
  int per_group = group * tiles_n;
  int first = super / per_group * group;
  int height = min(tiles_m - first, group);
  int within = super - first * tiles_n;
  unit.m = ((first + within % height) * CLUSTER_M + rank % CLUSTER_M) * BLOCK_M;
  unit.n = (within / height * CLUSTER_N + rank / CLUSTER_M) * BLOCK_N;
  unit.begin = steps * unit.part / split;
  unit.end = steps * (unit.part + 1) / split;
  unit.tile = super * CLUSTER + rank;
  return unit;
}

}  // namespace

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, CTAS)
    gemm_fp8(const __grid_constant__ TensorMap codes_map, const __grid_constant__ TensorMap upper_map,
             const __grid_constant__ TensorMap y_map, u16* y, const u8* x, u8* codes, float* x_scale,
             const signed char* row_exponent, const u16* bias, float* partials, u32* flags, int M, int N, int K,
             int x_pitch, int permute, int front, int team_warps, int group, int split, int bulk) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const u32 full = base + BARRIER_OFFSET;
  const u32 empty = full + STAGES * 8;
  const u32 rank = CLUSTER > 1 ? ptx::cluster_rank() : 0;
  const int tiles_m = (M + BLOCK_M * CLUSTER_M - 1) / (BLOCK_M * CLUSTER_M);
  const int tiles_n = (N + BLOCK_N * CLUSTER_N - 1) / (BLOCK_N * CLUSTER_N);
  const int units = tiles_m * tiles_n * split;
  const int steps = (K + STEP - 1) / STEP;
  const int clusters = gridDim.x / CLUSTER;
  const int first_unit = blockIdx.x / CLUSTER;
  const u32 warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  const u32 thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, CONSUMERS * 4 * WAITS);
    }
    ptx::barrier_init_fence();
  }
  if constexpr (CLUSTER > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
  ptx::let_next_kernel_start();

  if (warpgroup == CONSUMERS) {
#if PRODUCER_REGISTERS
    ptx::registers_less<PRODUCER_REGISTERS>();
#endif
    if (thread == 0) {
      // Of a panel that several CTAs of the cluster share, each fetches its part for all of them.
      const u32 rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
      constexpr int TOKEN_PART = BLOCK_M / CLUSTER_N, WEIGHT_PART = BLOCK_N / CLUSTER_M;
      u16 token_ctas = 0, weight_ctas = 0;
      for (int i = 0; i < CLUSTER_N; ++i) token_ctas |= 1 << (rank_m + i * CLUSTER_M);
      for (int i = 0; i < CLUSTER_M; ++i) weight_ctas |= 1 << (i + rank_n * CLUSTER_M);

      auto load_tokens = [&](int stage, int m, int step) {
        u32 to = base + stage * STAGE_BYTES + rank_n * TOKEN_PART * CHUNK;
        for (int i = 0; i < CHUNKS; ++i) {
          int k = step * STEP + i * CHUNK;
          int row = m + rank_n * TOKEN_PART;
          if constexpr (CLUSTER_N > 1)
            ptx::load_2d_multicast(to + i * TOKEN_BYTES, &codes_map, k, row, full + stage * 8, token_ctas, ptx::EVICT_NORMAL);
          else
            ptx::load_2d(to + i * TOKEN_BYTES, &codes_map, k, row, full + stage * 8, ptx::EVICT_NORMAL);
        }
      };
      auto load_weights = [&](int stage, int n, int step) {
        u32 to = base + stage * STAGE_BYTES + CHUNKS * TOKEN_BYTES + rank_m * WEIGHT_PART * CHUNK;
        for (int i = 0; i < CHUNKS; ++i) {
          int k = step * STEP + i * CHUNK;
          int row = n + rank_m * WEIGHT_PART;
          if constexpr (CLUSTER_M > 1)
            ptx::load_2d_multicast(to + i * WEIGHT_BYTES, &upper_map, k, row, full + stage * 8, weight_ctas, ptx::EVICT_NORMAL);
          else
            ptx::load_2d(to + i * WEIGHT_BYTES, &upper_map, k, row, full + stage * 8, ptx::EVICT_NORMAL);
        }
      };

      // Tokens are quantised in this launch: a tile's are there when as many rows have been counted.
      auto await_codes = [&](int m) {
        if (m >= M) return;
        await_count(flags + m / BLOCK_M, min(BLOCK_M, M - m));
        asm volatile("fence.proxy.async.global;" ::: "memory");
      };

      // Weights depend on nothing: the first of them are asked for before anything is waited for.
      Unit unit = decode(first_unit, rank, tiles_m, tiles_n, group, split, steps);
      const int early = first_unit < units ? min(unit.end - unit.begin, STAGES) : 0;
      for (int i = 0; i < early; ++i) {
        ptx::barrier_expect(full + i * 8, STAGE_BYTES);
        load_weights(i, unit.n, unit.begin + i);
      }
      ptx::wait_for_previous_kernel();
      await_codes(unit.m);
      for (int i = 0; i < early; ++i) load_tokens(i, unit.m, unit.begin + i);

      int stage = early % STAGES;
      u32 parity = early == STAGES ? 0 : 1;
      int step = unit.begin + early;
      for (int index = first_unit; index < units; index += clusters) {
        if (index != first_unit) {
          unit = decode(index, rank, tiles_m, tiles_n, group, split, steps);
          step = unit.begin;
          await_codes(unit.m);
        }
        for (; step < unit.end; ++step) {
          ptx::barrier_wait(empty + stage * 8, parity);
          ptx::barrier_expect(full + stage * 8, STAGE_BYTES);
          load_weights(stage, unit.n, step);
          load_tokens(stage, unit.m, step);
          if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
      // The last CTA to have seen its tokens leaves the counts at zero for the next launch.
      if (atomicAdd(flags + DONE, 1) == gridDim.x - 1) {
        for (int i = 0; i * BLOCK_M < M; ++i) flags[i] = 0;
        flags[DONE] = 0;
      }
    } else if (thread >= 32) {
      // Idle warps quantise what the first tiles do not need, one token each, while the others multiply.
      ptx::wait_for_previous_kernel();
      auto largest = [](u32 magnitude) { return __reduce_max_sync(0xFFFFFFFF, magnitude); };
      for (int row = front + blockIdx.x + (thread / 32 - 1) * gridDim.x; row < M; row += 3 * gridDim.x) {
        quantise<BACKGROUND_HOLD>(x + size_t(row) * x_pitch, codes + size_t(row) * K, x_scale + row, K, thread % 32, 32,
                                  permute, largest);
        count_row(flags, row, thread % 32);
      }
    }
  } else {
#if CONSUMER_REGISTERS
    ptx::registers_more<CONSUMER_REGISTERS>();
#endif
    const u32 lane = thread % 32, warp = thread / 32;
    const u32 output = base + OUTPUT_OFFSET + warpgroup * 2 * SLICE_BYTES;
    const u32 columns = base + COLUMN_OFFSET + warpgroup * COLUMN_BYTES;
    u32 peer = rank;
    if constexpr (CLUSTER > 1) {
      const u32 rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
      peer = lane < CLUSTER_M ? lane + rank_n * CLUSTER_M
                              : rank_m + (lane - CLUSTER_M + (lane - CLUSTER_M >= rank_n)) * CLUSTER_M;
    }
    auto release = [&](int stage) {
      if (lane < WAITS) arrive(empty + stage * 8, peer);
    };

    ptx::wait_for_previous_kernel();
    {
      // The tokens of the first tiles, by teams of one warp, one warpgroup or all, as many as there is work for.
      u32 turn = 0;
      const u32 cta_warp = warpgroup * 4 + warp, team = cta_warp / team_warps, lanes = team_warps * 32;
      const u32 team_lane = cta_warp % team_warps * 32 + lane;
      auto team_sync = [&] {
        if (team_warps == 4)
          ptx::warpgroup_sync(warpgroup + 1);
        else if (team_warps > 4)
          asm volatile("bar.sync 4, %0;" ::"n"(CONSUMERS * 128) : "memory");
        else
          __syncwarp();
      };
      auto largest = [&](u32 magnitude) {
        magnitude = __reduce_max_sync(0xFFFFFFFF, magnitude);
        if (team_warps == 1) return magnitude;
        const u32 scratch = base + SCRATCH_OFFSET + turn * CONSUMERS * 16;
        turn ^= 1;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(scratch + cta_warp * 4), "r"(magnitude) : "memory");
        team_sync();
        for (u32 i = 0; i < team_warps; ++i) {
          u32 other;
          asm volatile("ld.shared.u32 %0, [%1];" : "=r"(other) : "r"(scratch + (team * team_warps + i) * 4) : "memory");
          magnitude = max(magnitude, other);
        }
        return magnitude;
      };
      for (int row = blockIdx.x + team * gridDim.x; row < front; row += CONSUMERS * 4 / team_warps * gridDim.x) {
        quantise<FRONT_HOLD>(x + size_t(row) * x_pitch, codes + size_t(row) * K, x_scale + row, K, team_lane, lanes,
                             permute, largest);
        team_sync();
        count_row(flags, row, team_lane);
      }
    }
    int stage = 0, buffer = 0;
    u32 parity = 0;
    for (int index = first_unit; index < units; index += clusters) {
      const Unit unit = decode(index, rank, tiles_m, tiles_n, group, split, steps);
      const bool last = unit.part == split - 1;
      const int m = unit.m + warpgroup * BLOCKS * 64;

      // What the epilogue needs is asked for before the product, so that it waits for none of it. The scales
      // are there once the tokens are.
      ptx::barrier_wait(full + stage * 8, parity);
      float scale[BLOCKS][2];
      u32 column_words[COLUMN_LOADS];
      auto ask = [&] {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            int row = m + b * 64 + warp * 16 + h * 8 + lane / 4;
            scale[b][h] = last && row < M ? __ldcg(x_scale + row) : 0.0f;
          }
#pragma unroll
        for (int i = 0; i < COLUMN_LOADS; ++i) {
          int column = i * 128 + thread;
          bool inside = last && column < BLOCK_N && unit.n + column < N;
          u32 exponent = inside ? u32(int(__ldg(row_exponent + unit.n + column)) + 128) : 0;
          u32 offset = inside && bias ? __ldg(bias + unit.n + column) : 0;
          column_words[i] = exponent << 16 | offset;
        }
      };
      if constexpr (!LATE) ask();

      float sums[BLOCKS][SUMS];
#if PROMOTE
      float totals[BLOCKS][SUMS] = {};
#endif
      int previous = 0;
      for (int step = unit.begin; step < unit.end; ++step) {
        ptx::barrier_wait(full + stage * 8, parity);
        const u32 tokens = base + stage * STAGE_BYTES + warpgroup * BLOCKS * 64 * CHUNK;
        const u32 weights = base + stage * STAGE_BYTES + CHUNKS * TOKEN_BYTES;
        const u64 a = ptx::panel_descriptor(tokens), b = ptx::panel_descriptor(weights);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
          for (int k = 0; k < CHUNK / 32; ++k)
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block)
              wgmma(sums[block], a + ((i * TOKEN_BYTES + block * 64 * CHUNK + k * 32) >> 4),
                    b + ((i * WEIGHT_BYTES + k * 32) >> 4), i + k > 0 || (!PROMOTE && step > unit.begin));
        ptx::wgmma_commit();
#if PROMOTE
        ptx::wgmma_wait<0>();
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          ptx::hold(sums[block]);
#pragma unroll
          for (int i = 0; i < SUMS; ++i) totals[block][i] += sums[block][i];
        }
        release(stage);
#else
        ptx::wgmma_wait<1>();
        if (step > unit.begin) release(previous);
        previous = stage;
#endif
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
#if PROMOTE
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[block][i] = totals[block][i];
#else
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ptx::hold(sums[block]);
      release(previous);
#endif

      if (split > 1) {
        const int slots = split - 1;
        float4* slot = reinterpret_cast<float4*>(partials) +
                       (size_t(unit.tile) * slots * CONSUMERS + warpgroup) * (BLOCKS * SUMS / 4) * 128 + thread;
        const size_t pitch = size_t(CONSUMERS) * (BLOCKS * SUMS / 4) * 128;
        u32* flag = flags + SPLIT_FLAGS + unit.tile * CONSUMERS + warpgroup;
        if (!last) {
          slot += unit.part * pitch;
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int i = 0; i < SUMS / 4; ++i)
              __stcg(slot + (b * (SUMS / 4) + i) * 128, make_float4(sums[b][i * 4], sums[b][i * 4 + 1],
                                                                    sums[b][i * 4 + 2], sums[b][i * 4 + 3]));
          __threadfence();
          ptx::warpgroup_sync(warpgroup + 1);
          if (thread == 0) count_one(flag);
          continue;
        }
        if (thread == 0) {
          await_count(flag, slots);
          *flag = 0;
        }
        ptx::warpgroup_sync(warpgroup + 1);
        for (int part = 0; part < slots; ++part, slot += pitch)
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int i = 0; i < SUMS / 4; ++i) {
              float4 value = __ldcg(slot + (b * (SUMS / 4) + i) * 128);
              sums[b][i * 4] += value.x;
              sums[b][i * 4 + 1] += value.y;
              sums[b][i * 4 + 2] += value.z;
              sums[b][i * 4 + 3] += value.w;
            }
      }

      if constexpr (LATE) ask();
      // The factors of columns, 2^row_exponent as bfloat16, and the biases, by pairs of columns.
      ptx::warpgroup_sync(warpgroup + 1);
#pragma unroll
      for (int i = 0; i < COLUMN_LOADS; ++i) {
        int column = i * 128 + thread;
        if (column < BLOCK_N) {
          int exponent = int(column_words[i] >> 16) - 1;  // biased as a float's
          u16 factor = exponent > 0 ? exponent << 7 : 0x40 >> -exponent;
          u32 at = columns + column / 2 * 8 + column % 2 * 2;
          asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(factor) : "memory");
          asm volatile("st.shared.u16 [%0], %1;" ::"r"(at + 4), "h"(u16(column_words[i])) : "memory");
        }
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const float low_scale = scale[b][0] * 0x1p-8f, high_scale = scale[b][1] * 0x1p-8f;
#pragma unroll
        for (int slice = 0; slice < BLOCK_N / SLICE; ++slice) {
          if (thread == 0) ptx::store_wait_read<1>();
          ptx::warpgroup_sync(warpgroup + 1);
          const u32 to = output + buffer * SLICE_BYTES;
#pragma unroll
          for (int pair = 0; pair < SLICE / 16; ++pair) {
            u32 words[4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int at = slice * SLICE + pair * 16 + h * 8;
              const float* sum = sums[b] + at / 2;
              u32 factors, biases;
              asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                           : "=r"(factors), "=r"(biases)
                           : "r"(columns + (at / 2 + lane % 4) * 8));
              const float f0 = __uint_as_float(factors << 16), f1 = __uint_as_float(factors & 0xFFFF0000);
              const float b0 = widen(u16(biases)), b1 = widen(u16(biases >> 16));
              words[h * 2] = pack(sum[0] * low_scale * f0 + b0, sum[1] * low_scale * f1 + b1);
              words[h * 2 + 1] = pack(sum[2] * high_scale * f0 + b0, sum[3] * high_scale * f1 + b1);
            }
            if (bulk) {
              u32 offset = (warp * 16 + lane % 16) * SLICE * 2 + (pair * 2 + lane / 16) * 16;
              offset ^= (offset >> 7 & SWIZZLE) << 4;
              ptx::store_matrices(to + offset, words[0], words[1], words[2], words[3]);
            } else {
#pragma unroll
              for (int word = 0; word < 4; ++word)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  int row = m + b * 64 + warp * 16 + word % 2 * 8 + lane / 4;
                  int column = unit.n + slice * SLICE + pair * 16 + word / 2 * 8 + lane % 4 * 2 + half;
                  if (row < M && column < N)
                    y[size_t(row) * N + column] = u16(words[word] >> half * 16);
                }
            }
          }
          if (bulk) {
            ptx::fence_async_shared();
            ptx::warpgroup_sync(warpgroup + 1);
            if (thread == 0) ptx::store_2d(&y_map, unit.n + slice * SLICE, m + b * 64, to);
            buffer ^= 1;
          }
        }
      }
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  // Others of the cluster still signal here until they are through.
  __syncwarp();
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
