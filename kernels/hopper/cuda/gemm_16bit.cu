// y [M, N] = x [M, K] w^T * 2^row_exponent (+ bias), w [N, K] rebuilt exactly in registers, on Hopper.
//
// Operands. x: 16-bit floats, rows on 16-byte boundaries; upper, lower: bytes [N, K] in the stored order of
// `KOrder.HOPPER`, so K is a multiple of 64. M and N are free: the copy engine fills what lies outside with zeros and
// clips what is stored outside. partials, flags: scratch for tiles that several CTAs share; flags are zero before and
// after. Products that share scratch run one after another.
//
// A tile is ROWS weight rows by TOKENS tokens, computed transposed: the weights are wgmma's A operand, which may come
// from registers, and its N side takes any multiple of 8 tokens, so that tiles can fill whole waves.
// * one thread streams x and both byte planes through STAGES buffers by TMA, 64 of K a stage. CTAs of a cluster that
//   share a panel each fetch a part of it and multicast it: without that, small tiles wait for the L2;
// * CONSUMERS warpgroups own BLOCKS * 64 rows each. A thread's share of 64 of K of one row is 16 adjacent bytes of
//   each plane; it rebuilds the weights of one block while the block before multiplies, in two sets of registers;
// * a warpgroup scales, adds the bias, transposes through shared memory and stores by itself, while the producer
//   fills buffers for the next tile and the other warpgroups go on.
// schedule.cuh says how tiles are shared; the sums of a shared tile are added in the order of K.
//
// Roof: two bytes a weight over the memory bandwidth for few tokens, the tensor cores' rate for many; between them
// the L2, which feeds (TOKENS + ROWS) * 128 bytes a stage, divided by the clusters' sharing.
#include "ptx.cuh"
#include "elements.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace {

constexpr int CLUSTER = CLUSTER_TOKENS * CLUSTER_ROWS;
constexpr int ROWS = 64 * BLOCKS * CONSUMERS;
constexpr int STEP = 64;
constexpr int UNIT_STEPS = 2;
constexpr int TOKEN_BYTES = TOKENS * STEP * 2;
constexpr int PLANE_BYTES = ROWS * STEP;
constexpr int STAGE_BYTES = TOKEN_BYTES + 2 * PLANE_BYTES;
constexpr int SLICE_BYTES = SLICE * 64 * 2;  // tokens staged at once, 64 weight rows each
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int BARRIER_OFFSET = OUTPUT_OFFSET + CONSUMERS * 2 * SLICE_BYTES;
constexpr int SUMS = TOKENS / 2;
constexpr int WAITS = CLUSTER_TOKENS + CLUSTER_ROWS - 1;  // CTAs that a panel of this one goes to

static_assert(TOKENS % (16 * CLUSTER_ROWS) == 0 && TOKENS <= 256);
static_assert(ROWS % (8 * CLUSTER_TOKENS) == 0);
static_assert(TOKENS % SLICE == 0 && SLICE % 16 == 0 && SLICE_BYTES % 1024 == 0);

// Four weights of the two byte planes as two pairs of 16-bit floats; nestedfp/kernels/hopper/rebuild.py derives it.
__device__ __forceinline__ void rebuild(u32 upper, u32 lower, u32& first, u32& second) {
  const u32 high = upper - (lower >> 7 & 0x01010101);
#if BFLOAT16
  const u32 magnitude = high >> 1 & 0x3F3F3F3F;
  u32 low_pair = __byte_perm(lower, magnitude, 0x5140), high_pair = __byte_perm(lower, magnitude, 0x7362);
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(low_pair) : "r"(0x74007400));
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(high_pair) : "r"(0x74007400));
  low_pair = low_pair >> 3 | (__byte_perm(upper, 0, 0x1404) & 0x80008000);
  high_pair = high_pair >> 3 | (__byte_perm(upper, 0, 0x3424) & 0x80008000);
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(first) : "r"(low_pair), "r"(0x70807080));
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(second) : "r"(high_pair), "r"(0x70807080));
#else
  const u32 bytes = (high & 0x80808080) | (high >> 1 & 0x3F3F3F3F);
  first = __byte_perm(lower, bytes, 0x5140);
  second = __byte_perm(lower, bytes, 0x7362);
#endif
}

// wgmma's A fragments of 64 rows by 64 of K: four registers for each 16 of K. `from` is the thread's first row in a
// plane whose 64-byte rows are in the 64-byte swizzle, which is the same for that row and the eighth after it.
__device__ __forceinline__ void load_weights(u32 (&weights)[16], u32 from) {
  u32 upper[2][4], lower[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    ptx::load_shared(upper[h], from + h * 8 * STEP);
    ptx::load_shared(lower[h], from + h * 8 * STEP + PLANE_BYTES);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) rebuild(upper[h][j], lower[h][j], weights[j * 4 + h], weights[j * 4 + h + 2]);
}

struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, CTAS)
    gemm_16bit(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap upper_map,
               const __grid_constant__ TensorMap lower_map, const __grid_constant__ TensorMap y_map, u16* y,
               const signed char* row_exponent, const u16* bias, float* partials, u32* flags, int M, int N, int K,
               int group, int stream_tiles, int bulk) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const u32 full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
  const u32 rank = CLUSTER == 1 ? 0 : ptx::cluster_rank();
  const u32 rank_token = rank % CLUSTER_TOKENS, rank_row = rank / CLUSTER_TOKENS;
  const int row_tiles = (N + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS);
  const int token_tiles = (M + TOKENS * CLUSTER_TOKENS - 1) / (TOKENS * CLUSTER_TOKENS);
  const int tile_units = (K + STEP * UNIT_STEPS - 1) / (STEP * UNIT_STEPS);
  const int worker = blockIdx.x / CLUSTER;
  const Schedule schedule(worker, gridDim.x / CLUSTER, row_tiles * token_tiles, stream_tiles, tile_units);
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

  auto corner = [&](int tile) {
    Position at = position(tile, row_tiles, token_tiles, group);
    at.row = (at.row * CLUSTER_ROWS + rank_row) * ROWS;
    at.token = (at.token * CLUSTER_TOKENS + rank_token) * TOKENS;
    return at;
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
        const Position at = corner(segment.tile);
        early = min((segment.last - segment.first) * UNIT_STEPS, STAGES);
        for (int i = 0; i < early; ++i) {
          ptx::barrier_expect(full + i * 8, STAGE_BYTES);
          load_planes(i, at.row, segment.first * UNIT_STEPS + i);
        }
        ptx::wait_for_previous_kernel();
        for (int i = 0; i < early; ++i) load_x(i, at.token, segment.first * UNIT_STEPS + i);
      }
      int stage = early % STAGES;
      u32 parity = early == STAGES ? 0 : 1;
      for (int index = 0; index < schedule.count; ++index) {
        const Segment segment = schedule.segment(index);
        const Position at = corner(segment.tile);
        const int last = segment.last * UNIT_STEPS;
        for (int step = segment.first * UNIT_STEPS + (index == 0 ? early : 0); step < last; ++step) {
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
    const u32 output = base + OUTPUT_OFFSET + warpgroup * 2 * SLICE_BYTES;
    const u32 share = base + TOKEN_BYTES + (warpgroup * BLOCKS * 64 + warp * 16 + lane / 4) * STEP +
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
    constexpr int PART = BLOCKS * SUMS / 4 * 128;  // of a warpgroup, in float4
    auto slot = [&](int of) { return (of * CLUSTER + rank) * CONSUMERS + warpgroup; };

    ptx::wait_for_previous_kernel();
    Ring ring;
    int buffer = 0;
    for (int index = 0; index < schedule.count; ++index) {
      const Segment segment = schedule.segment(index);
      const Position at = corner(segment.tile);

      // What the epilogue needs is asked for before the product, so that it waits for none of it.
      u32 row_words[BLOCKS][2];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = at.row + (warpgroup * BLOCKS + b) * 64 + warp * 16 + h * 8 + lane / 4;
          const u32 exponent = row < N ? u32(int(__ldg(row_exponent + row)) + 127) : 0;
          row_words[b][h] = exponent << 16 | (row < N && bias ? __ldg(bias + row) : 0);
        }

      float sums[BLOCKS][SUMS];
      u32 weights[2][16];
      int previous = 0;
      for (int unit = segment.first; unit < segment.last; ++unit) {
#pragma unroll
        for (int half = 0; half < UNIT_STEPS; ++half) {
          ptx::barrier_wait(full + ring.stage * 8, ring.parity);
          const u64 x_panel = ptx::panel_descriptor(base + ring.stage * STAGE_BYTES);
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b) {
            u32(&operand)[16] = weights[(half * BLOCKS + b) % 2];
            load_weights(operand, share + ring.stage * STAGE_BYTES + b * 64 * STEP);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k)
              wgmma(sums[b], operand + k * 4, x_panel + k * 2, half + k > 0 || unit > segment.first);
            ptx::wgmma_commit();
            // The block before is through: its registers may be written, and its stage unless it is this one.
            ptx::wgmma_wait<1>();
            if (b == 0 && (half > 0 || unit > segment.first)) release(previous);
          }
          previous = ring.stage;
          ring.advance();
        }
      }
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) ptx::hold(sums[b]);
      release(previous);

      if (segment.first > 0) {
        float4* to = reinterpret_cast<float4*>(partials) + size_t(slot(worker)) * PART + thread;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int i = 0; i < SUMS / 4; ++i)
            __stcg(to + (b * (SUMS / 4) + i) * 128, make_float4(sums[b][i * 4], sums[b][i * 4 + 1],
                                                                sums[b][i * 4 + 2], sums[b][i * 4 + 3]));
        __threadfence();
        ptx::warpgroup_sync(warpgroup + 1);
        if (thread == 0) ptx::flag_raise(flags + slot(worker));
        continue;
      }
      if (segment.last < tile_units) {
        for (int peer = worker + 1; schedule.holds_part(peer, segment.tile); ++peer) {
          if (thread == 0) ptx::flag_take(flags + slot(peer));
          ptx::warpgroup_sync(warpgroup + 1);
          const float4* from = reinterpret_cast<const float4*>(partials) + size_t(slot(peer)) * PART + thread;
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int i = 0; i < SUMS / 4; ++i) {
              const float4 value = __ldcg(from + (b * (SUMS / 4) + i) * 128);
              sums[b][i * 4] += value.x;
              sums[b][i * 4 + 1] += value.y;
              sums[b][i * 4 + 2] += value.z;
              sums[b][i * 4 + 3] += value.w;
            }
        }
      }

#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const int row = at.row + (warpgroup * BLOCKS + b) * 64;
        float scale[2], shift[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale[h] = __uint_as_float(row_words[b][h] >> 16 << 23);
          shift[h] = widen(u16(row_words[b][h]));
        }
#pragma unroll
        for (int slice = 0; slice < TOKENS / SLICE; ++slice) {
          // Tiles reach past the last token by whole slices.
          if (at.token + slice * SLICE >= M) break;
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
              const float* sum = sums[b] + (slice * SLICE + pair * 16 + g * 8) / 2;
#pragma unroll
              for (int h = 0; h < 2; ++h)
                words[g * 2 + h] =
                    pack(sum[h * 2] * scale[h] + shift[h], sum[h * 2 + 1] * scale[h] + shift[h]);
            }
            if (bulk) {
              const u32 token = pair * 16 + lane / 16 * 8 + lane % 8;
              const u32 chunk = (warp * 2 + lane / 8 % 2) ^ (token & 7);
              ptx::store_matrices_transposed(to + token * 128 + chunk * 16, words[0], words[1], words[2], words[3]);
            } else {
#pragma unroll
              for (int word = 0; word < 4; ++word)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const int token = at.token + slice * SLICE + pair * 16 + word / 2 * 8 + lane % 4 * 2 + half;
                  const int column = row + warp * 16 + word % 2 * 8 + lane / 4;
                  if (token < M && column < N) y[size_t(token) * N + column] = u16(words[word] >> half * 16);
                }
            }
          }
          if (bulk) {
            ptx::fence_async_shared();
            ptx::warpgroup_sync(warpgroup + 1);
            if (thread == 0) ptx::store_2d(&y_map, row, at.token + slice * SLICE, to);
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
