// y [M, N] = (q(x) * x_scale) (e4m3(upper) * 2^(row_exponent - 8))^T + bias on Hopper: the FP8 mode, one launch.
//
// Operands. x: [M, K] 16-bit floats, rows `x_pitch` bytes apart; upper: E4M3 [N, K], row-major, or with `panels` in the
// stored order of `KOrder.HOPPER`, panels of N rows by 128 of K, K a multiple of 128. Rows of both begin on 16-byte
// boundaries and K is a multiple of 16. M, N and K are otherwise free: the copy engine fills what lies outside with
// zeros, and nothing outside y is stored. Scratch: codes, in the weights' order of K, and x_scale [M], which this
// launch fills; partials and flags for split K; flags are zero before and after. Boxes that reach past the last token
// are slow to copy: codes have rows for all tiles, and fewer tokens than a tile's are copied alone, `token_bytes` a
// chunk. What is multiplied beside M tokens, or N weight rows, is undefined.
//
// Quantising. Consumers first quantise the `front` tokens, those that the first tiles need; three idle warps of the
// producer's warpgroup quantise the others meanwhile. Each token is counted for its tile, and the producer asks for a
// tile's codes when all are.
//
// Multiplying, persistent over tiles of BLOCK_M tokens by BLOCK_N weight rows:
// * one thread streams both operands through a ring of STAGES shared-memory buffers by TMA, tile after tile. CTAs of a
//   cluster that share a panel each fetch a part of it and multicast it to the others;
// * CONSUMERS warpgroups multiply (wgmma, both operands from shared memory, BLOCKS * 64 tokens of the tile each), one
//   step in flight while the next is issued;
// * scales, factors and biases reach shared memory during the first step; each warp stages its sums a slice at a time
//   and stores them in rows, 16 bytes a thread: two barriers of a warpgroup a tile, however many slices it has.
//
// Whole waves. The first `whole` tiles, full waves of all workers, are multiplied whole. The K of each tile left is
// cut into `split` equal parts, one a worker. A part writes its sums to `partials`, except for its own share of the
// tile; counts itself; and, when all parts are counted, adds the others' sums to its share, in order, and stores it.
//
// Waits end. All of the grid is resident, which the launcher sees to, and products that share scratch run one after
// another. Quantising waits for nothing, so codes come, and the ring moves unless a consumer stops. A consumer waits for
// other parts only in the last unit of its CTA, when it has emptied its stages and written and counted its own.
//
// Accuracy, and when to promote. wgmma cuts its sums to about 14 bits. With PROMOTE each stage's sums are added to
// float32 totals; without, all of K stays in wgmma. Measured on normal data the latter costs 0.12 % (K = 4096) to
// 0.47 % (K = 32768) in norm, beside 3.7 % from quantising; on operands of one sign 7 % to 38 %, as in other
// libraries' fast accumulation. Totals double the registers of a tile: up to 64 tokens they cost nothing and are on.
//
// Roof: one byte a weight over the memory bandwidth for few tokens, the E4M3 tensor-core rate for many; between them
// shared memory, whose 128 bytes a cycle feed the copies in (BLOCK_M + BLOCK_N) and wgmma's operands (64 + BLOCK_N).
#include "ptx.cuh"
#include "elements.cuh"
#include "quantise.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

namespace {

constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int BLOCK_M = 64 * BLOCKS * CONSUMERS;
constexpr int CHUNK = 128;  // bytes of K in a row of a shared-memory panel, one row of the swizzle
constexpr int STEP = CHUNK * CHUNKS;
constexpr int TOKEN_BYTES = BLOCK_M * CHUNK;
constexpr int WEIGHT_BYTES = BLOCK_N * CHUNK;
constexpr int STAGE_BYTES = (TOKEN_BYTES + WEIGHT_BYTES) * CHUNKS;
constexpr int COLUMN_BYTES = BLOCK_N * 4;  // of a warpgroup: a bfloat16 factor and a bias for each column,
constexpr int ROW_BYTES = BLOCKS * 64 * 4;  // a scale for each row
// The epilogue goes by slices of columns, which each warp stages by itself.
constexpr int SLICE = BLOCK_N % 32 == 0 && BLOCK_N > 64 ? 32 : 16;
constexpr int SLICE_BYTES = 16 * SLICE * 2;
constexpr int SWIZZLE = SLICE / 8 - 1;
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int SCALE_OFFSET = OUTPUT_OFFSET + CONSUMERS * 4 * SLICE_BYTES;
constexpr int SCRATCH_OFFSET = SCALE_OFFSET + CONSUMERS * (COLUMN_BYTES + ROW_BYTES);  // a word a warp, twice
constexpr int BARRIER_OFFSET = SCRATCH_OFFSET + CONSUMERS * 4 * 2 * 4;
constexpr int WAITS = CLUSTER_M + CLUSTER_N - 1;  // CTAs that a panel of this one goes to
// Of `flags`: counts of quantised rows by token tile, then CTAs that are through with them, then parts of split tiles.
constexpr int DONE = 1024, PART_FLAGS = 1025;
constexpr int FRONT_HOLD = 8, BACKGROUND_HOLD = 1;
constexpr int SUMS = BLOCK_N / 2;  // of a thread in 64 tokens
// Named barriers: 1 + w inside warpgroup w; among all consumers.
constexpr int ALL_CONSUMERS = 4;

// Parts of a tile share it by pieces, a slice of 64 tokens each.
constexpr int PIECE_SUMS = SLICE / 2, VECTORS = PIECE_SUMS / 4;
constexpr int PIECES = BLOCK_N / SLICE * BLOCKS;
constexpr int SLOT = 128 * BLOCKS * SUMS / 4;  // of a warpgroup's sums, in float4
// Vectors of another part asked for at once, as many as registers and pieces allow.
constexpr int BATCH = PIECES * VECTORS % 8 == 0 && BLOCKS * BLOCK_N <= 320 ? 8 : PIECES * VECTORS % 4 == 0 ? 4 : 2;

static_assert(BLOCK_N % 16 == 0 && BLOCK_N <= 256 && BLOCKS <= 2 && CONSUMERS <= 3);
static_assert(BLOCK_M % (8 * CLUSTER_N) == 0 && BLOCK_N % (8 * CLUSTER_M) == 0);

struct Arguments {
  const TensorMap *codes_map, *upper_map;
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

// --- the producer's warpgroup ---

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
    await_codes(unit.m);
    Ring<STAGES> ring;
    for (int i = 0; i < early; ++i, ring.advance()) load_tokens(i, unit, i);

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
      }
    }
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
    quantise<BACKGROUND_HOLD>(a.x + size_t(row) * a.x_pitch, a.codes + size_t(row) * a.K, a.x_scale + row, a.K, lane,
                              32, a.panels, largest);
    count_row(a.flags, row, lane);
  }
}

// --- consumers ---

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

// Where a staged element lies: eight columns together, in a swizzle that repeats after eight rows.
__device__ __forceinline__ u32 staged(int row, int column) {
  const u32 offset = (row * SLICE + column) * 2;
  return offset ^ (offset >> 7 & SWIZZLE) << 4;
}

// A warp's 16 rows of a tile of y, and those 64 below: copies staged slices there.
class Output {
 public:
  __device__ __forceinline__ Output(const Arguments& a, int m, int n, u32 staging, u32 lane) : N_(a.N) {
    const int row = lane / LANES, column = lane % LANES * 8;
    from_ = staging + staged(row, column);
    to_ = a.y + size_t(m + row) * a.N + n + column;
    rows_ = a.M - m - row, columns_ = a.N - n - column;
  }

  // The slice at rows `below` and columns `right`.
  __device__ __forceinline__ void copy(int below, int right) const {
#pragma unroll
    for (int i = 0; i < 16; i += 32 / LANES) {
      u32 words[4];
      ptx::load_shared(words, from_ + i * SLICE * 2);
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
      store(sums, m, unit.n, share);
    }
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
  // In shared memory, this warpgroup's scales and this warp's staged slice.
  __device__ __forceinline__ u32 columns() const {
    return base_ + SCALE_OFFSET + ptx::thread() / 128 * (COLUMN_BYTES + ROW_BYTES);
  }
  __device__ __forceinline__ u32 staging() const { return base_ + OUTPUT_OFFSET + ptx::thread() / 32 * SLICE_BYTES; }

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

  // Scales, adds the bias and stores the pieces of `share`.
  __device__ __forceinline__ void store(const float (&sums)[BLOCKS][SUMS], int m, int n, const Share& share) const {
    sync();  // the scales are there
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
      const int column = piece / BLOCKS * SLICE, block = piece % BLOCKS;
      __syncwarp();  // the last slice has been read
#pragma unroll
      for (int at = 0; at < SLICE; at += 16)
        stage(piece_of(sums, piece) + at / 2, scales[block], columns + (column + at) * 4 + lane % 4 * 8,
              staging + staged(lane % 16, at + lane / 16 * 8));
      __syncwarp();
      out.copy(block * 64, column);
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

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, CTAS)
    gemm_fp8(const __grid_constant__ TensorMap codes_map, const __grid_constant__ TensorMap upper_map, u16* y,
             const u8* x, u8* codes, float* x_scale, const signed char* row_exponent, const u16* bias, float* partials,
             u32* flags, int M, int N, int K, int x_pitch, int token_bytes, int panels, int front, int team_warps,
             const Schedule schedule) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const Arguments arguments = {&codes_map, &upper_map, y, x, codes,   x_scale,      row_exponent, bias, partials,
                               flags,      M,          N, K, x_pitch, token_bytes, panels != 0, front,        team_warps};
  const u32 warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  const u32 thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    const u32 full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    for (int i = 0; i < STAGES; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, CONSUMERS * 4 * WAITS);
    }
    ptx::barrier_init_fence();
  }
  ptx::meet_and_let_next_start<CLUSTER>();

  if (warpgroup == CONSUMERS) {
#if PRODUCER_REGISTERS
    ptx::registers_less<PRODUCER_REGISTERS>();
#endif
    if (thread == 0)
      Producer(arguments, schedule, base).run();
    else if (thread >= 32)
      quantise_background(arguments, thread / 32 - 1, thread % 32);
  } else {
#if CONSUMER_REGISTERS
    ptx::registers_more<CONSUMER_REGISTERS>();
#endif
    Consumer consumer(arguments, schedule, base, warpgroup);
    ptx::wait_for_previous_kernel();
    consumer.quantise_front();
    consumer.run();
  }
  // Others of the cluster still signal here until they are through.
  __syncwarp();
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
