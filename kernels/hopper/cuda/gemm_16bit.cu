// y [M, N] = x [M, K] w^T * 2^row_exponent (+ bias), w [N, K] rebuilt exactly in registers, on Hopper.
//
// Operands. x: 16-bit floats, rows on 16-byte boundaries; upper, lower: bytes [N, K] in the stored order of
// `KOrder.HOPPER`, so K is a multiple of 64. M and N are free: the copy engine fills what lies outside with zeros and
// clips what is stored outside. partials, counters: scratch for tiles whose K is cut; counters are zero before and
// after. Products that share scratch run one after another.
//
// A tile is CONSUMERS * 64 weight rows by TOKENS tokens, computed transposed: the weights are wgmma's A operand, which
// may come from registers, and its N side takes any multiple of 8 tokens, so that tiles can fill whole waves.
// * one thread streams x and both byte planes through STAGES buffers by TMA, 64 of K a stage. CTAs of a cluster that
//   share a panel each fetch a part of it and multicast it: without that, small tiles wait for the L2;
// * CONSUMERS warpgroups own 64 rows each. A thread's share of 64 of K of one row is 16 adjacent bytes of each plane.
//   With SETS = 2 sets of registers a warpgroup rebuilds one step while its step before multiplies; with one set,
//   which leaves room for more warpgroups, it rebuilds while the others multiply;
// * a warpgroup scales, adds the bias, transposes through shared memory and stores by itself, while the producer
//   fills buffers for the next tile and the other warpgroups go on.
// schedule.cuh says how tiles are shared and why gathering the parts of a tile cannot deadlock.
//
// Roof: two bytes a weight over the memory bandwidth for few tokens, the tensor cores' rate for many; between them
// what a multiprocessor takes in, some 55 bytes a cycle of (TOKENS + ROWS) * 128 a stage, and the rebuild, which has
// the TOKENS * 2 cycles in which 64 rows multiply.
#include "ptx.cuh"
#include "elements.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace {

constexpr int CLUSTER = CLUSTER_TOKENS * CLUSTER_ROWS;
constexpr int ROWS = 64 * CONSUMERS;
constexpr int STEP = 64;
constexpr int TOKEN_BYTES = TOKENS * STEP * 2;
constexpr int PLANE_BYTES = ROWS * STEP;
constexpr int STAGE_BYTES = TOKEN_BYTES + 2 * PLANE_BYTES;
constexpr int SLICE_BYTES = SLICE * 64 * 2;  // tokens staged at once, 64 weight rows each
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int BARRIER_OFFSET = OUTPUT_OFFSET + CONSUMERS * 2 * SLICE_BYTES;
constexpr int SLICES = TOKENS / SLICE;
constexpr int SUMS = TOKENS / 2;
constexpr int WAITS = CLUSTER_TOKENS + CLUSTER_ROWS - 1;  // CTAs that a panel of this one goes to

static_assert(TOKENS % (16 * CLUSTER_ROWS) == 0 && TOKENS <= 256);
static_assert(ROWS % (8 * CLUSTER_TOKENS) == 0);
static_assert(TOKENS % SLICE == 0 && SLICE % 16 == 0 && SLICE_BYTES % 1024 == 0);

// Four weights of the two byte planes as two pairs of 16-bit floats: nestedfp/format.py says why this rebuilds them.
// Five instructions are for the narrow integer pipe; the subtractions are written as multiply-adds, with a factor
// that the compiler does not know to be one, so that they run beside them on the pipe of float multiplications.
__device__ __forceinline__ void rebuild(u32 upper, u32 lower, u32 one, u32& first, u32& second) {
  const u32 high = (upper & 0x80808080) | (upper >> 1 & 0x3F3F3F3F);
  first = __byte_perm(lower, high, 0x5140) * one - 0x00400040;
  second = __byte_perm(lower, high, 0x7362) * one - 0x00400040;
#if BFLOAT16
  first = as_bfloat16(first);
  second = as_bfloat16(second);
#endif
}

// wgmma's A fragments of 64 rows by 64 of K: four registers for each 16 of K. `from` is the thread's first row in a
// plane whose 64-byte rows are in the 64-byte swizzle, which is the same for that row and the eighth after it.
__device__ __forceinline__ void load_weights(u32 (&weights)[16], u32 from, u32 one) {
  u32 upper[2][4], lower[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    ptx::load_shared(upper[h], from + h * 8 * STEP);
    ptx::load_shared(lower[h], from + h * 8 * STEP + PLANE_BYTES);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) rebuild(upper[h][j], lower[h][j], one, weights[j * 4 + h], weights[j * 4 + h + 2]);
}

// The tile of one CTA: its first row and token, and how many slices of it belong to the tile before.
struct Corner {
  int row, token, skip;
};

}  // namespace

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, CTAS)
    gemm_16bit(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap upper_map,
               const __grid_constant__ TensorMap lower_map, const __grid_constant__ TensorMap y_map, u16* y,
               const signed char* row_exponent, const u16* bias, float* partials, u32* counters, int M, int N, int K,
               int group, int cut, int parts, int bulk) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const u32 full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
  const u32 rank = CLUSTER == 1 ? 0 : ptx::cluster_rank();
  const u32 rank_token = rank % CLUSTER_TOKENS, rank_row = rank / CLUSTER_TOKENS;
  const int row_tiles = (N + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS);
  const int token_tiles = (M + TOKENS * CLUSTER_TOKENS - 1) / (TOKENS * CLUSTER_TOKENS);
  const int last_token = max((M + SLICE - 1) / SLICE * SLICE - TOKENS, 0);
  const Schedule schedule(blockIdx.x / CLUSTER, gridDim.x / CLUSTER, row_tiles * token_tiles, cut, parts, K / STEP);
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

  // The copy engine is slow where a box reaches past the last token, so the last tile begins where it ends there.
  auto corner = [&](int tile) -> Corner {
    const Position at = position(tile, row_tiles, token_tiles, group);
    const int token = (at.token * CLUSTER_TOKENS + rank_token) * TOKENS;
    const int from = min(token, last_token);
    return {(at.row * CLUSTER_ROWS + int(rank_row)) * ROWS, from, (token - from) / SLICE};
  };

  if (warpgroup == CONSUMERS) {
#if PRODUCER_REGISTERS
    ptx::registers_less<PRODUCER_REGISTERS>();
#endif
    if (thread == 0) {
      // Of a panel that several CTAs of the cluster share, each fetches its part for all of them.
      constexpr int TOKEN_PART = TOKENS / CLUSTER_ROWS, ROW_PART = ROWS / CLUSTER_TOKENS;
      u16 token_ctas = 0, row_ctas = 0;
      for (int i = 0; i < CLUSTER_ROWS; ++i) token_ctas |= 1 << (rank_token + i * CLUSTER_TOKENS);
      for (int i = 0; i < CLUSTER_TOKENS; ++i) row_ctas |= 1 << (i + rank_row * CLUSTER_TOKENS);

      auto load_x = [&](int stage, int token, int step) {
        const u32 to = base + stage * STAGE_BYTES + rank_row * TOKEN_PART * STEP * 2;
        const int from = token + rank_row * TOKEN_PART;
        if constexpr (CLUSTER_ROWS > 1)
          ptx::load_2d_multicast(to, &x_map, step * STEP, from, full + stage * 8, token_ctas, ptx::EVICT_NORMAL);
        else
          ptx::load_2d(to, &x_map, step * STEP, from, full + stage * 8, ptx::EVICT_NORMAL);
      };
      auto load_planes = [&](int stage, int row, int step) {
        const u32 to = base + stage * STAGE_BYTES + TOKEN_BYTES + rank_token * ROW_PART * STEP;
        const int from = row + rank_token * ROW_PART;
        if constexpr (CLUSTER_TOKENS > 1) {
          ptx::load_2d_multicast(to, &upper_map, step * STEP, from, full + stage * 8, row_ctas, ptx::EVICT_NORMAL);
          ptx::load_2d_multicast(to + PLANE_BYTES, &lower_map, step * STEP, from, full + stage * 8, row_ctas,
                                 ptx::EVICT_NORMAL);
        } else {
          ptx::load_2d(to, &upper_map, step * STEP, from, full + stage * 8, ptx::EVICT_NORMAL);
          ptx::load_2d(to + PLANE_BYTES, &lower_map, step * STEP, from, full + stage * 8, ptx::EVICT_NORMAL);
        }
      };

      // Weights depend on nothing: the first of them are asked for before the kernel before this one has ended.
      int early = 0;
      if (schedule.count) {
        const Segment segment = schedule.segment(0);
        const Corner at = corner(segment.tile);
        early = min(segment.last - segment.first, STAGES);
        for (int i = 0; i < early; ++i) {
          ptx::barrier_expect(full + i * 8, STAGE_BYTES);
          load_planes(i, at.row, segment.first + i);
        }
        ptx::wait_for_previous_kernel();
        for (int i = 0; i < early; ++i) load_x(i, at.token, segment.first + i);
      }
      int stage = early % STAGES;
      u32 parity = early == STAGES ? 0 : 1;
      for (int index = 0; index < schedule.count; ++index) {
        const Segment segment = schedule.segment(index);
        const Corner at = corner(segment.tile);
        for (int step = segment.first + (index == 0 ? early : 0); step < segment.last; ++step) {
          ptx::barrier_wait(empty + stage * 8, parity);
          ptx::barrier_expect(full + stage * 8, STAGE_BYTES);
          load_planes(stage, at.row, step);
          load_x(stage, at.token, step);
          if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
#if CONSUMER_REGISTERS
    ptx::registers_more<CONSUMER_REGISTERS>();
#endif
    const u32 lane = thread % 32, warp = thread / 32;
    const u32 one = gridDim.y;
    const u32 output = base + OUTPUT_OFFSET + warpgroup * 2 * SLICE_BYTES;
    const u32 share = base + TOKEN_BYTES + (warpgroup * 64 + warp * 16 + lane / 4) * STEP +
                      ((lane % 4 ^ (lane / 8 & 3)) << 4);
    u32 peer_cta = rank;
    if constexpr (CLUSTER > 1)
      peer_cta = lane < CLUSTER_TOKENS
                     ? lane + rank_row * CLUSTER_TOKENS
                     : rank_token + (lane - CLUSTER_TOKENS + (lane - CLUSTER_TOKENS >= rank_row)) * CLUSTER_TOKENS;
    auto release = [&](int stage) {
      if (lane < WAITS) {
        if constexpr (CLUSTER == 1)
          ptx::barrier_arrive(empty + stage * 8);
        else
          ptx::barrier_arrive_at(empty + stage * 8, peer_cta);
      }
    };
    // Of this warpgroup: where its sums of part `part` of `tile` lie, one float4 a thread, and the tile's counter.
    auto scratch = [&](int part, int tile) {
      const size_t slot = (size_t(part * cut + tile) * CLUSTER + rank) * CONSUMERS + warpgroup;
      return reinterpret_cast<float4*>(partials) + slot * (SUMS / 4 * 128) + thread;
    };
    auto counter = [&](int tile) { return counters + (tile * CLUSTER + rank) * CONSUMERS + warpgroup; };

    // The exponent, biased as a float's, and the bias of this thread's two rows: asked for before the product, so
    // that the epilogue waits for neither.
    auto ask = [&](u32 (&row_words)[2], int tile_row) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = tile_row + warpgroup * 64 + warp * 16 + h * 8 + lane / 4;
        const u32 exponent = row < N ? u32(int(__ldg(row_exponent + row)) + 127) : 0;
        row_words[h] = exponent << 16 | (row < N && bias ? __ldg(bias + row) : 0);
      }
    };
    int buffer = 0;
    auto store = [&](const float* sums, const u32 (&row_words)[2], int tile_row, int token) {
      const int row = tile_row + warpgroup * 64;
      float scale[2], shift[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[h] = __uint_as_float(row_words[h] >> 16 << 23);
        shift[h] = widen(u16(row_words[h]));
      }
      const u32 to = output + buffer * SLICE_BYTES;
      if (bulk) {
        if (thread == 0) ptx::store_wait_read<1>();
        ptx::warpgroup_sync(warpgroup + 1);
      }
#pragma unroll
      for (int pair = 0; pair < SLICE / 16; ++pair) {
        u32 words[4];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const float* sum = sums + (pair * 16 + g * 8) / 2;
#pragma unroll
          for (int h = 0; h < 2; ++h)
            words[g * 2 + h] = pack(sum[h * 2] * scale[h] + shift[h], sum[h * 2 + 1] * scale[h] + shift[h]);
        }
        if (bulk) {
          const u32 at = pair * 16 + lane / 16 * 8 + lane % 8;
          const u32 chunk = (warp * 2 + lane / 8 % 2) ^ (at & 7);
          ptx::store_matrices_transposed(to + at * 128 + chunk * 16, words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
          for (int word = 0; word < 4; ++word)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int line = token + pair * 16 + word / 2 * 8 + lane % 4 * 2 + half;
              const int column = row + warp * 16 + word % 2 * 8 + lane / 4;
              if (line < M && column < N) y[size_t(line) * N + column] = u16(words[word] >> half * 16);
            }
        }
      }
      if (bulk) {
        ptx::fence_async_shared();
        ptx::warpgroup_sync(warpgroup + 1);
        if (thread == 0) ptx::store_2d(&y_map, row, token, to);
        buffer ^= 1;
      }
    };

    ptx::wait_for_previous_kernel();
    int stage = 0;
    u32 parity = 0;
    for (int index = 0; index < schedule.count; ++index) {
      const Segment segment = schedule.segment(index);
      const Corner at = corner(segment.tile);
      u32 row_words[2];
      ask(row_words, at.row);

      float sums[SUMS];
      u32 weights[SETS][16];
      int previous = 0;
      auto multiply = [&](u32 (&operand)[16], bool first) {
        ptx::barrier_wait(full + stage * 8, parity);
        if constexpr (SETS == 1) {
          // The step before is through: its registers may be written, and its stage.
          ptx::wgmma_wait<0>();
          if (!first) release(previous);
        }
        load_weights(operand, share + stage * STAGE_BYTES, one);
        const u64 x_panel = ptx::panel_descriptor(base + stage * STAGE_BYTES);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma(sums, operand + k * 4, x_panel + k * 2, k > 0 || !first);
        ptx::wgmma_commit();
        if constexpr (SETS == 2) {
          ptx::wgmma_wait<1>();
          if (!first) release(previous);
        }
        previous = stage;
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      };
      // By twos, so that each set of registers has a name; a branch between them would part the products in flight.
      int step = segment.first;
      for (; step + 1 < segment.last; step += 2) {
        multiply(weights[0], step == segment.first);
        multiply(weights[SETS - 1], false);
      }
      if (step < segment.last) multiply(weights[0], step == segment.first);
      ptx::wgmma_wait<0>();
      ptx::hold(sums);
      release(previous);

      float4* to = segment.part < 0 ? nullptr : scratch(segment.part, segment.tile);
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice) {
        const int token = at.token + slice * SLICE;
        if (slice < at.skip || token >= M) continue;
        const float* sum = sums + slice * (SLICE / 2);
        if (!to) {
          store(sum, row_words, at.row, token);
          continue;
        }
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

    // Of each tile that this worker computed a part of, every `parts`-th slice.
    for (int index = 0; index < schedule.part_count; ++index) {
      const Segment segment = schedule.segment(index);
      const Corner at = corner(segment.tile);
      u32 row_words[2];
      ask(row_words, at.row);
      if (thread == 0) ptx::count_await(counter(segment.tile), parts);
      ptx::warpgroup_sync(warpgroup + 1);
      for (int slice = at.skip + segment.part; slice < SLICES; slice += parts) {
        const int token = at.token + slice * SLICE;
        if (token >= M) break;
        float total[SLICE / 2] = {};
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
          const float4* from = scratch(part, segment.tile) + slice * (SLICE / 8) * 128;
#pragma unroll
          for (int i = 0; i < SLICE / 8; ++i) {
            const float4 value = __ldcg(from + i * 128);
            total[i * 4] += value.x;
            total[i * 4 + 1] += value.y;
            total[i * 4 + 2] += value.z;
            total[i * 4 + 3] += value.w;
          }
        }
        store(total, row_words, at.row, token);
      }
      // All have waited once all have counted themselves again: the last leaves the counter at zero.
      if (thread == 0) ptx::count_leave(counter(segment.tile), 2 * parts);
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  // Others of the cluster still signal here until they are through.
  __syncwarp();
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
