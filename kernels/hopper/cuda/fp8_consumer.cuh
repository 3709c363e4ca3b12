// The consumers of gemm_fp8.cu: they quantise the first tokens, multiply, exchange parts, scale and store.
#pragma once
#include "elements.cuh"
#include "fp8_schedule.cuh"
#include "quantise.cuh"
#include "wgmma.cuh"

namespace {

// The pieces of a tile that one part of its K stores.
struct Share {
  int first, count;

  __device__ __forceinline__ static Share of(const Part& part) {
    const int first = part.part * PIECES / part.parts;
    return {first, (part.part + 1) * PIECES / part.parts - first};
  }

  __device__ __forceinline__ bool operator()(int piece) const { return u32(ptx::here(piece) - first) < u32(count); }
};

// 2^exponent as a bfloat16, exponent from -128 to 127.
__device__ __forceinline__ u32 power_of_two(int exponent) {
  const int biased = exponent + 127;
  return biased > 0 ? biased << 7 : 0x40 >> -biased;
}

// Where a staged element lies: eight columns together, swizzled as the copy engine does it for rows of SLICE columns.
__device__ __forceinline__ u32 staged(int row, int column) {
  const u32 offset = (row * SLICE + column) * 2;
  return offset ^ (offset >> 7 & SWIZZLE) << 4;
}

// A warp's 16 rows of a tile of y, and those 64 below: copies staged slices there.
class Output {
 public:
  __device__ __forceinline__ Output(const Arguments& a, int m, int n, u32 staging, u32 lane)
      : map_(a.y_map), m_(m), n_(n), lane_(lane), N_(a.N) {
    const int row = lane / LANES, column = lane % LANES * 8;
    from_ = staging + staged(row, column);
    to_ = a.y + size_t(m + row) * a.N + n + column;
    rows_ = a.M - m - row, columns_ = a.N - n - column;
  }

  // By the copy engine the slice at rows `below` and columns `right`, staged at `place`: a group of the first lane's.
  __device__ __forceinline__ void send(int below, int right, int place) const {
    ptx::copies_fence();
    __syncwarp();
    if (lane_ != 0) return;
    if (below < rows_ && right < columns_)
      ptx::store_2d(map_, n_ + right, m_ + below, from_ + place * SLICE_BYTES);
    ptx::stores_commit();
  }

  // The same by all lanes.
  __device__ __forceinline__ void copy(int below, int right, int place) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i += 32 / LANES) {
      u32 words[4];
      // Rows of 128 bytes take four rows a turn, whose swizzle differs in one bit.
      ptx::load_shared(words, (SLICE == 64 ? from_ ^ (i & 4) << 4 : from_) + place * SLICE_BYTES + i * SLICE * 2);
      const int row = ptx::here(below + i);
      if (row < rows_ && right < columns_) put(to_ + (row * N_ + right), words, columns_ - right);
    }
  }

 private:
  static constexpr int LANES = SLICE / 8;  // that share a row

  __device__ __forceinline__ void put(u16* to, u32 (&words)[4], int columns) const {
    if (N_ % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      return;
    }
    // Rows are not aligned.
#pragma unroll 1
    for (int i = 0; i < min(8, columns); ++i) {
      to[i] = u16(words[0]);
#pragma unroll
      for (int word = 0; word < 4; ++word)
        words[word] = __funnelshift_r(words[word], word < 3 ? words[word + 1] : 0, 16);
    }
  }

  const TensorMap* map_;
  const int m_, n_;
  const u32 lane_;
  u16* to_;
  u32 from_;
  int N_, rows_, columns_;
};

// One thread of a warpgroup that multiplies.
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, const Schedule& schedule, u32 base, u32 warpgroup)
      : arguments_(arguments), schedule_(schedule), base_(base), warpgroup_(warpgroup) {}

  // The tokens of the first tiles, by teams of one warp, one warpgroup or all, as many as there is work for.
  __device__ __forceinline__ void quantise_front() const {
    const Arguments& a = arguments_;
    const u32 cta_warp = warpgroup_ * 4 + warp(), team = cta_warp / a.team_warps;
    const u32 team_lane = cta_warp % a.team_warps * 32 + lane(), lanes = a.team_warps * 32;
    u32 turn = 0;
    auto meet = [&] {
      if (a.team_warps == 4)
        sync();
      else if (a.team_warps > 4)
        ptx::threads_sync<CONSUMERS * 128>(ALL_CONSUMERS);
      else
        __syncwarp();
    };
    auto largest = [&](u32 magnitude) {
      magnitude = __reduce_max_sync(0xFFFFFFFF, magnitude);
      if (a.team_warps == 1) return magnitude;
      const u32 scratch = base_ + SCRATCH_OFFSET + turn * CONSUMERS * 16;
      turn ^= 1;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(scratch + cta_warp * 4), "r"(magnitude) : "memory");
      meet();
      for (u32 i = 0; i < a.team_warps; ++i) {
        u32 other;
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(other)
                     : "r"(scratch + (team * a.team_warps + i) * 4)
                     : "memory");
        magnitude = max(magnitude, other);
      }
      return magnitude;
    };
    for (int row = blockIdx.x + team * gridDim.x; row < a.front; row += CONSUMERS * 4 / a.team_warps * gridDim.x) {
      quantise<FRONT_HOLD>(a.x + size_t(row) * a.x_pitch, a.codes + size_t(row) * a.K, a.x_scale + row, a.K, team_lane,
                           lanes, a.panels, largest);
      meet();
      count_row(a.flags, row, team_lane);
    }
  }

  __device__ __forceinline__ void run() {
    for (int index = schedule_.worker(); index < schedule_.units; index += schedule_.workers()) {
      const Unit unit = schedule_.unit(index);
      const int m = unit.m + warpgroup_ * BLOCKS * 64;
      float sums[BLOCKS][SUMS];
      multiply(sums, unit, m);
      Share share = {0, PIECES};
      if (schedule_.is_part(index)) {
        const Part part = schedule_.part(index);
        share = Share::of(part);
        exchange(sums, part, share);
      }
      store(sums, m, unit.n, share, index + schedule_.workers() < schedule_.units);
    }
    ptx::stores_wait<0>();
  }

 private:
  // This thread's share of what the epilogue needs: of two columns, and of a row.
  struct Scales {
    int exponents[2] = {-128, -128};
    u32 biases[2] = {0, 0};
    float row = 0;
  };

  // Of the warpgroup. Asked for anew each time, as what follows from them is: beside the sums no registers are left
  // to keep the epilogue's addresses in.
  __device__ __forceinline__ static u32 thread() { return ptx::thread() % 128; }
  __device__ __forceinline__ static u32 lane() { return ptx::thread() % 32; }
  __device__ __forceinline__ static u32 warp() { return ptx::thread() / 32 % 4; }
  // In shared memory, this warpgroup's scales and this warp's staged slices.
  __device__ __forceinline__ u32 columns() const {
    return base_ + SCALE_OFFSET + ptx::thread() / 128 * (COLUMN_BYTES + ROW_BYTES);
  }
  __device__ __forceinline__ u32 staging() const {
    return base_ + OUTPUT_OFFSET + ptx::thread() / 32 * SLICES * SLICE_BYTES;
  }

  __device__ __forceinline__ static void sync() { ptx::warpgroup_sync(ptx::thread() / 128 + 1); }

  __device__ __forceinline__ void release(int stage) const {
    // A warp's lanes tell the CTAs whose loads arrive here: along the tokens, this one among them, then along the rows.
    const u32 rank_m = schedule_.rank() % CLUSTER_M, rank_n = schedule_.rank() / CLUSTER_M;
    const u32 lane = Consumer::lane(), other = lane - CLUSTER_M;
    const u32 peer = lane < CLUSTER_M ? lane + rank_n * CLUSTER_M : rank_m + (other + (other >= rank_n)) * CLUSTER_M;
    if (lane < WAITS) arrive(base_ + BARRIER_OFFSET + (STAGES + stage) * 8, peer);
  }

  // Only asks, so that the first product waits for no answer. Scales are there once the tokens are.
  __device__ __forceinline__ Scales ask(const Unit& unit, int m) const {
    const Arguments& a = arguments_;
    const int thread = Consumer::thread(), column = unit.n + thread * 2;
    Scales scales;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (thread * 2 < BLOCK_N && column + i < a.N) {
        scales.exponents[i] = __ldg(a.row_exponent + column + i);
        if (a.bias) scales.biases[i] = __ldg(a.bias + column + i);
      }
    if (thread < BLOCKS * 64 && m + thread < a.M) scales.row = __ldcg(a.x_scale + m + thread);
    return scales;
  }

  // Into shared memory, by pairs of columns.
  __device__ __forceinline__ void put(const Scales& scales) const {
    sync();  // those of the last tile have been read
    const u32 thread = Consumer::thread(), columns = Consumer::columns();
    const u32 low = power_of_two(ptx::here(scales.exponents[0])), high = power_of_two(ptx::here(scales.exponents[1]));
    if (thread * 2 < BLOCK_N)
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(columns + thread * 8), "r"(low | high << 16),
                   "r"(ptx::here(scales.biases[0]) | ptx::here(scales.biases[1]) << 16)
                   : "memory");
    if (thread < BLOCKS * 64)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(columns + COLUMN_BYTES + thread * 4), "f"(scales.row) : "memory");
  }

  // sums = keep * sums + the products of a stage.
  __device__ __forceinline__ void issue(float (&sums)[BLOCKS][SUMS], int stage, bool keep) const {
    const u32 tokens = base_ + stage * STAGE_BYTES + warpgroup_ * BLOCKS * 64 * CHUNK;
    const u32 weights = base_ + stage * STAGE_BYTES + CHUNKS * TOKEN_BYTES;
    const u64 a = ptx::panel_descriptor(tokens), b = ptx::panel_descriptor(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
      for (int k = 0; k < CHUNK / 32; ++k)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          wgmma(sums[block], a + ((i * TOKEN_BYTES + block * 64 * CHUNK + k * 32) >> 4),
                b + ((i * WEIGHT_BYTES + k * 32) >> 4), i + k > 0 || keep);
    ptx::wgmma_commit();
  }

  // All steps of a unit.
  __device__ __forceinline__ void multiply(float (&sums)[BLOCKS][SUMS], const Unit& unit, int m) {
    ptx::barrier_wait(base_ + BARRIER_OFFSET + ring_.stage * 8, ring_.parity);
    const Scales scales = ask(unit, m);
#if PROMOTE
    float totals[BLOCKS][SUMS] = {};
#endif
    for (int step = 0; step < unit.steps; ++step) {
      ptx::barrier_wait(base_ + BARRIER_OFFSET + ring_.stage * 8, ring_.parity);
      issue(sums, ring_.stage, !PROMOTE && step > 0);
      if (step == 0) put(scales);
#if PROMOTE
      wait(sums);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) totals[block][i] += sums[block][i];
      release(ring_.stage);
#else
      ptx::wgmma_wait<1>();
      if (step > 0) release(previous_);
      previous_ = ring_.stage;
#endif
      ring_.advance();
    }
#if PROMOTE
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[block][i] = totals[block][i];
#else
    wait(sums);
    release(previous_);
#endif
  }

  __device__ __forceinline__ static void wait(float (&sums)[BLOCKS][SUMS]) {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ptx::hold(sums[block]);
  }

  // A piece's sums of this thread.
  template <class Sums>
  __device__ __forceinline__ static auto piece_of(Sums& sums, int piece) {
    return sums[piece % BLOCKS] + piece / BLOCKS * PIECE_SUMS;
  }

  // Writes what other parts store, and adds what they have of this part's share, in their order.
  __device__ __forceinline__ void exchange(float (&sums)[BLOCKS][SUMS], const Part& part, const Share& share) const {
    const int tile = part.tile * CONSUMERS + warpgroup_;
    float4* slots = reinterpret_cast<float4*>(arguments_.partials) + size_t(tile) * part.parts * SLOT + thread();
    u32* flag = arguments_.flags + PART_FLAGS + tile;

    float4* own = slots + size_t(part.part) * SLOT;
#pragma unroll
    for (int i = 0; i < PIECES * VECTORS; ++i) {
      const float* from = piece_of(sums, i / VECTORS) + i % VECTORS * 4;
      if (!share(i / VECTORS)) __stcg(own + i * 128, make_float4(from[0], from[1], from[2], from[3]));
    }
    __threadfence();
    sync();
    if (thread() == 0) {
      ptx::count_one(flag);
      ptx::count_await(flag, part.parts);
      ptx::count_leave(flag, 2 * part.parts);
    }
    sync();
    for (int other = 0; other < part.parts; ++other)
      if (other != part.part) gather(sums, slots + size_t(other) * SLOT, share);
  }

  // Adds the share's pieces of another part.
  __device__ __forceinline__ static void gather(float (&sums)[BLOCKS][SUMS], const float4* from, const Share& share) {
#pragma unroll
    for (int first = 0; first < PIECES * VECTORS; first += BATCH) {
      float4 values[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (share((first + i) / VECTORS)) values[i] = __ldcg(from + (first + i) * 128);
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (share((first + i) / VECTORS)) {
          float* to = piece_of(sums, (first + i) / VECTORS) + (first + i) % VECTORS * 4;
          to[0] += values[i].x, to[1] += values[i].y, to[2] += values[i].z, to[3] += values[i].w;
        }
    }
  }

  // Scales, adds the bias and stores the pieces of `share`. If a tile follows, the copy engine stores them beside its
  // products. Nothing would hide the engine's delay after the last tile, nor where each slice waits for the one before;
  // and it takes no rows off 16-byte boundaries.
  __device__ __forceinline__ void store(const float (&sums)[BLOCKS][SUMS], int m, int n, const Share& share,
                                        bool followed) const {
    const bool sent = SLICES > 1 && followed && arguments_.N % 8 == 0;
    ptx::stores_wait_read<0>();
    sync();  // the scales are there, and all places free
    const u32 lane = Consumer::lane(), row = warp() * 16, staging = Consumer::staging(), columns = Consumer::columns();
    const Output out(arguments_, m + row, n, staging, lane);
    float scales[BLOCKS][2];
#pragma unroll
    for (int i = 0; i < BLOCKS * 2; ++i) {
      float& scale = scales[i / 2][i % 2];
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(scale)
                   : "r"(columns + COLUMN_BYTES + (row + lane / 4 + i * 8 + i / 2 * 48) * 4)
                   : "memory");
      scale *= 0x1p-8f;  // of the weights' format
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      if (SPLITS && !share(piece)) continue;
      const int column = piece / BLOCKS * SLICE, block = piece % BLOCKS, place = piece % SLICES;
      if (piece >= SLICES) ptx::stores_wait_read<SLICES - 1>();
      __syncwarp();  // the slice that was here has been read
#pragma unroll
      for (int at = 0; at < SLICE; at += 16)
        stage(piece_of(sums, piece) + at / 2, scales[block], columns + (column + at) * 4 + lane % 4 * 8,
              staging + place * SLICE_BYTES + staged(lane % 16, at + lane / 16 * 8));
      if (sent)
        out.send(block * 64, column, place);
      else
        out.copy(block * 64, column, place);
    }
  }

  // Sixteen columns, whose factors and biases are at `columns`, to `to`.
  __device__ __forceinline__ static void stage(const float* sums, const float (&scales)[2], u32 columns, u32 to) {
    u32 words[4];
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      u32 factors, biases;
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(factors), "=r"(biases)
                   : "r"(columns + octet * 32)
                   : "memory");
      const float low = __uint_as_float(factors << 16), high = __uint_as_float(factors & 0xFFFF0000);
      const float low_bias = widen(u16(biases)), high_bias = widen(u16(biases >> 16));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* sum = sums + octet * 4 + half * 2;
        words[octet * 2 + half] =
            pack(sum[0] * scales[half] * low + low_bias, sum[1] * scales[half] * high + high_bias);
      }
    }
    ptx::store_matrices(to, words[0], words[1], words[2], words[3]);
  }

  const Arguments& arguments_;
  const Schedule& schedule_;
  const u32 base_, warpgroup_;
  Ring<STAGES> ring_;
  int previous_ = 0;
};

}  // namespace
