// How gemm_fp8.cu stores a tile of y, a piece at a time: each warp stages its 16 rows of a slice in shared memory,
// from where they go to y, at once (`Output`) or beside the products of the next tile (`Waiting`).
#pragma once
#include "fp8_scales.cuh"
#include "fp8_schedule.cuh"
#include "fp8_thread.cuh"

namespace {

// Where a staged element lies: eight columns together, swizzled as the copy engine does it for rows of OUT_COLUMNS.
__device__ __forceinline__ u32 staged(int row, int column) {
  const u32 offset = (row * OUT_COLUMNS + column) * 2;
  return offset ^ (offset >> 7 & (OUT_COLUMNS / 8 - 1)) << 4;
}

// This warp's first place for a slice.
__device__ __forceinline__ u32 staging_address(u32 base) {
  return base + OUTPUT_OFFSET + ptx::thread() / 32 * SLICES * SLICE_BYTES;
}

// A thread's word `i` of a piece's outputs, of which `words` are the products.
__device__ __forceinline__ u32 output(const u32 (&words)[PIECE_WORDS], int i) {
  // Octets of columns are a gate's and its partner's by turns, and each has words of two rows.
  if constexpr (GATED)
    return gate(words[i / 2 * 4 + i % 2], words[i / 2 * 4 + 2 + i % 2]);
  else
    return words[i];
}

// What one instruction stages of a piece, of which there are FOURS: four words of a thread, or the two that there are.
constexpr int FOURS = OUT_WORDS > 4 ? OUT_WORDS / 4 : 1;
__device__ __forceinline__ void stage_four(const u32 (&words)[PIECE_WORDS], int four, u32 staging) {
  const u32 lane = self::lane();
  const int i = four * 4;
  const u32 to = staging + staged(lane % 16, i * 4 + lane / 16 * 8);
  if constexpr (OUT_WORDS == 2)
    ptx::store_matrices(to, output(words, 0), output(words, 1));
  else
    ptx::store_matrices(to, output(words, i), output(words, i + 1), output(words, i + 2), output(words, i + 3));
}

// A piece's outputs, to the place at `staging`.
__device__ __forceinline__ void stage(const u32 (&words)[PIECE_WORDS], u32 staging) {
#pragma unroll
  for (int four = 0; four < FOURS; ++four) stage_four(words, four, staging);
}

// A warp's rows of a tile whose pieces are stored at once.
class Output {
 public:
  // m, n: where the warpgroup's rows begin.
  __device__ __forceinline__ Output(const Arguments& a, u32 base, int m, int n) : N_(a.N / HALVED) {
    n /= HALVED;
    const u32 lane = self::lane();
    const int row = self::warp() * 16 + lane / LANES, column = lane % LANES * 8;
    staging_ = staging_address(base);
    from_ = staging_ + staged(lane / LANES, column);
    to_ = a.y + size_t(m + row) * N_ + n + column;
    // Of lines of eight columns there are fewer than lanes.
    rows_ = lane / LANES < 16 ? a.M - m - row : 0, columns_ = N_ - n - column;
  }

  // A piece's words of this thread. Lanes change them in shared memory, so that each has sixteen bytes of a row.
  __device__ __forceinline__ void store(const u32 (&words)[PIECE_WORDS], int piece) const {
    const int below = piece % BLOCKS * 64, right = piece / BLOCKS * OUT_COLUMNS, place = piece % SLICES;
    __syncwarp();  // the slice that was here has been read
    stage(words, staging_ + place * SLICE_BYTES);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i += 32 / LANES) {
      u32 row_words[4];
      // Rows of 128 bytes take four rows a turn, whose swizzle differs in one bit.
      const u32 from = OUT_COLUMNS == 64 ? from_ ^ (i & 4) << 4 : from_;
      ptx::load_shared(row_words, from + place * SLICE_BYTES + i * OUT_COLUMNS * 2);
      const int row = ptx::here(below + i);
      if (row < rows_ && right < columns_) put(to_ + (row * N_ + right), row_words, columns_ - right);
    }
  }

 private:
  static constexpr int LANES = OUT_COLUMNS / 8;  // that share a row

  __device__ __forceinline__ void put(u16* to, u32 (&words)[4], int columns) const {
    if (N_ % 8 == 0) {
      ptx::store_global(to, words);
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

  const int N_;
  u16* to_;
  u32 staging_, from_;
  int rows_, columns_;
};

// A tile whose products wait in registers, for the copy engine to store its outputs beside the products of the next
// one: the tensor cores wait for packing alone. A gate's functions take as long as a step, so that with GATED a step has
// no more than four words to stage.
class Waiting {
 public:
  __device__ __forceinline__ bool any() const { return DEFERRED && next_ < PIECES * SHARES; }

  // m, n: where the warpgroup's rows begin. Stores at once what the copy engine does not take.
  __device__ __forceinline__ void pack(const float (&sums)[BLOCKS][SUMS], const Scaling& scaling, const Arguments& a,
                                       u32 base, int m, int n) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) scaling.pack(sums, piece, words_[piece]);
    m_ = m, n_ = n, next_ = 0;
    if (GATED || a.N % 8 == 0) return;
    // Rows off 16-byte boundaries, which gated outputs never are.
    const Output out(a, base, m, n);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) out.store(words_[piece], piece);
    next_ = PIECES * SHARES;
  }

  // The next share of a piece. One place is enough: the engine has a step's products to read it.
  __device__ __forceinline__ void store_one(const Arguments& a, u32 base) {
    const u32 staging = staging_address(base);
    if (next_ % SHARES == 0) {
      ptx::stores_wait_read<0>();
      __syncwarp();
    }
    stage_next(staging);
    if (next_ % SHARES == SHARES - 1) {
      ptx::copies_fence();
      __syncwarp();
      if (self::lane() == 0) {
        const int piece = next_ / SHARES;
        const int row = m_ + self::warp() * 16 + piece % BLOCKS * 64;
        const int column = n_ / HALVED + piece / BLOCKS * OUT_COLUMNS;
        if (row < a.M && column < a.N / HALVED) ptx::store_2d(a.y_map, column, row, staging);
        ptx::stores_commit();
      }
    }
    ++next_;
  }

 private:
  static constexpr int SHARES = GATED ? FOURS : 1;

  // Registers have no index: each share has its own code. A loop over them would move them to memory.
  template <int NEXT = 0>
  __device__ __forceinline__ void stage_next(u32 staging) const {
    if (next_ == NEXT) {
#pragma unroll
      for (int four = 0; four < FOURS / SHARES; ++four)
        stage_four(words_[NEXT / SHARES], NEXT % SHARES + four, staging);
    } else if constexpr (NEXT + 1 < PIECES * SHARES) {
      stage_next<NEXT + 1>(staging);
    }
  }

  u32 words_[PIECES][PIECE_WORDS];
  int m_, n_, next_ = PIECES * SHARES;
};

}  // namespace
