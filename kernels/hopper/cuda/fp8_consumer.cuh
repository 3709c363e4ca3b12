// The consumers of gemm_fp8.cu: they quantise the first tokens, multiply, exchange parts, scale and store.
#pragma once
#include "fp8_output.cuh"
#include "fp8_scales.cuh"
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

// One thread of a warpgroup that multiplies.
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, const Schedule& schedule, u32 base, u32 warpgroup)
      : arguments_(arguments), schedule_(schedule), base_(base), warpgroup_(warpgroup) {}

  // The tokens of the first tiles, by teams of one warp, a pair, one warpgroup or all.
  __device__ __forceinline__ void quantise_front() const {
    const Arguments& a = arguments_;
    const u32 cta_warp = warpgroup_ * 4 + self::warp(), team = cta_warp / a.team_warps;
    const u32 team_lane = cta_warp % a.team_warps * 32 + self::lane(), lanes = a.team_warps * 32;
    u32 turn = 0;
    auto meet = [&] {
      if (a.team_warps == 2)
        ptx::threads_sync<64>(PAIRS + ptx::thread() / 64);
      else if (a.team_warps == 4)
        self::sync();
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
      const u8* x = a.x + size_t(row) * a.x_pitch;
      u8* codes = a.codes + size_t(row) * a.K;
      if (a.K <= FEW_TURNS * 16 * int(lanes))
        quantise<FEW_TURNS, 1>(x, codes, a.x_scale + row, a.K, team_lane, lanes, a.panels, largest);
      else
        quantise<HELD, 1>(x, codes, a.x_scale + row, a.K, team_lane, lanes, a.panels, largest);
      meet();
      count_row(a.flags, row, team_lane);
    }
  }

  __device__ __forceinline__ void run() {
    Waiting waiting;
    Unit unit = unit_of(schedule_.worker());
    Columns columns(arguments_, unit.n);
    for (int index = schedule_.worker();; index += schedule_.workers()) {
      const bool followed = index + schedule_.workers() < schedule_.units;
      float sums[BLOCKS][SUMS];
      const float scale = multiply(sums, unit, columns, waiting);
      // Beside the last products: what is left of the tile before, and which tile is next.
      while (waiting.any()) waiting.store_one(arguments_, base_);
      const int m = unit.m, n = unit.n;
      if (followed) {
        unit = unit_of(index + schedule_.workers());
        columns = Columns(arguments_, unit.n);
      }
      self::sync();  // the factors are there
      finish(sums);
      const Scaling scaling(base_, scale);
      // Parts of tiles come last.
      if (DEFERRED && followed) {
        waiting.pack(sums, scaling, arguments_, base_, m, n);
        continue;
      }
      Share share = {0, PIECES};
      if (schedule_.is_part(index)) {
        const Part part = schedule_.part(index);
        share = Share::of(part);
        exchange(sums, part, share);
      }
      store(sums, scaling, m, n, share);
      if (!followed) break;
    }
    ptx::stores_wait<0>();
  }

 private:
  // From this warpgroup's first row. Found here, and not where it is needed.
  __device__ __forceinline__ Unit unit_of(int index) const {
    Unit unit = schedule_.unit(index);
    unit.m = ptx::here(unit.m + warpgroup_ * BLOCKS * 64), unit.n = ptx::here(unit.n);
    return unit;
  }

  __device__ __forceinline__ void release(int stage) const {
    // A warp's lanes tell the CTAs whose loads arrive here: along the tokens, this one among them, then along the rows.
    const u32 rank_m = schedule_.rank() % CLUSTER_M, rank_n = schedule_.rank() / CLUSTER_M;
    const u32 lane = self::lane(), other = lane - CLUSTER_M;
    const u32 peer = lane < CLUSTER_M ? lane + rank_n * CLUSTER_M : rank_m + (other + (other >= rank_n)) * CLUSTER_M;
    if (lane < WAITS) arrive(base_ + BARRIER_OFFSET + (STAGES + stage) * 8, peer);
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

  // All steps of a unit, the last of them perhaps still under way. A share a step of the tile that waits is stored
  // meanwhile. Returns the scale of this lane's row.
  __device__ __forceinline__ float multiply(float (&sums)[BLOCKS][SUMS], const Unit& unit, const Columns& columns,
                                            Waiting& waiting) {
    await_stage();
    issue(sums, ring_.stage, false);
    columns.put(base_);
    const float scale = row_scale(arguments_, unit.m);
#if PROMOTE
    float totals[BLOCKS][SUMS] = {};
#endif
    for (int step = 1; step < unit.steps; ++step) {
#if PROMOTE
      add(totals, sums);
#endif
      const int previous = ring_.stage;
      ring_.advance();
      await_stage();
      issue(sums, ring_.stage, !PROMOTE);
      if (waiting.any()) waiting.store_one(arguments_, base_);
#if !PROMOTE
      ptx::wgmma_wait<1>();
      release(previous);
#endif
    }
#if PROMOTE
    add(totals, sums);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[block][i] = totals[block][i];
#endif
    return scale;
  }

  // Until the sums of `multiply` are there.
  __device__ __forceinline__ void finish(float (&sums)[BLOCKS][SUMS]) {
#if !PROMOTE
    wait(sums);
    release(ring_.stage);
#endif
    ring_.advance();
  }

  __device__ __forceinline__ void await_stage() const {
    ptx::barrier_wait(base_ + BARRIER_OFFSET + ring_.stage * 8, ring_.parity);
  }

#if PROMOTE
  // The sums of a stage, which is through then.
  __device__ __forceinline__ void add(float (&totals)[BLOCKS][SUMS], float (&sums)[BLOCKS][SUMS]) const {
    wait(sums);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) totals[block][i] += sums[block][i];
    release(ring_.stage);
  }
#endif

  __device__ __forceinline__ static void wait(float (&sums)[BLOCKS][SUMS]) {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ptx::hold(sums[block]);
  }

  // Writes what other parts store, and adds what they have of this part's share, in their order.
  __device__ __forceinline__ void exchange(float (&sums)[BLOCKS][SUMS], const Part& part, const Share& share) const {
    const int tile = part.tile * CONSUMERS + warpgroup_;
    float4* slots = reinterpret_cast<float4*>(arguments_.partials) + size_t(tile) * part.parts * SLOT + self::thread();
    u32* flag = arguments_.flags + PART_FLAGS + tile;

    float4* own = slots + size_t(part.part) * SLOT;
#pragma unroll
    for (int i = 0; i < PIECES * VECTORS; ++i) {
      const float* from = piece_of(sums, i / VECTORS) + i % VECTORS * 4;
      if (!share(i / VECTORS)) __stcg(own + i * 128, make_float4(from[0], from[1], from[2], from[3]));
    }
    __threadfence();
    self::sync();
    if (self::thread() == 0) {
      ptx::count_one(flag);
      ptx::count_await(flag, part.parts);
      ptx::count_leave(flag, 2 * part.parts);
    }
    self::sync();
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

  // Scales, adds the bias and stores the pieces of `share`. Nothing would hide the copy engine's delay here.
  __device__ __forceinline__ void store(const float (&sums)[BLOCKS][SUMS], const Scaling& scaling, int m, int n,
                                        const Share& share) const {
    ptx::stores_wait_read<0>();
    const Output out(arguments_, base_, m, n);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      if (SPLITS && !share(piece)) continue;
      u32 words[PIECE_WORDS];
      scaling.pack(sums, piece, words);
      out.store(words, piece);
    }
  }

  const Arguments& arguments_;
  const Schedule& schedule_;
  const u32 base_, warpgroup_;
  Ring<STAGES> ring_;
};

}  // namespace
