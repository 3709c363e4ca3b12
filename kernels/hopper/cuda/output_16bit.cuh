// The last step of gemm_16bit.cu: sums of 64 weight rows, scaled, shifted, with GATED multiplied in pairs, and stored.
#pragma once
#include "elements.cuh"
#include "gate.cuh"
#include "layout_16bit.cuh"

namespace {

// A thread's part in what its warpgroup stores.
//
// The 64 rows of a slice of tokens are transposed through shared memory, so that y is written in whole lines of 128
// bytes, or with GATED halves of them: a warp's own 16 rows are 32 bytes of each token, and a store of so many short
// pieces takes as many cycles as it touches lines. Buffers by turns need one barrier a slice.
//
// The copy engine stores what is SENT, while the next tile is multiplied; of few tokens, whose end it would delay, and
// of rows of y that do not begin on 16-byte boundaries, nothing is.
class Output {
 public:
  __device__ __forceinline__ Output(const TensorMap* y_map, u16* y, const signed char* row_exponent, const u16* bias,
                                    int M, int N, int stores, u32 base, u32 warpgroup, u32 thread)
      : y_map_(y_map), y_(y), row_exponent_(row_exponent), bias_(bias), M_(M), N_(N), stores_(stores),
        base_(base), warpgroup_(warpgroup), thread_(thread) {}

  // Of a tile's rows. The exponent, biased as a float's, and the bias of this thread's two rows are asked for before
  // the product, so that the epilogue waits for neither.
  __device__ __forceinline__ void begin(int tile_row) {
    row_ = tile_row + int(warpgroup_ / SLICED_K) * 64;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_ + int(thread_ / 32 * 16 + h * 8 + thread_ % 32 / 4);
      const u32 exponent = row < N_ ? u32(int(__ldg(row_exponent_ + row)) + 127) : 0;
      words_[h] = exponent << 16 | (row < N_ && bias_ ? __ldg(bias_ + row) : 0);
    }
  }

  // A slice from `token` on, by all threads of the warpgroup.
  __device__ __forceinline__ void store(const float* sums, int token) {
    const u32 lane = thread_ % 32, warp = thread_ / 32;
    float scale[2], shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[h] = __uint_as_float(words_[h] >> 16 << 23);
      shift[h] = widen(u16(words_[h]));
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
      if constexpr (GATED)
        ptx::store_matrices_transposed(buffer() + staged(pair * 16 + lane % 16, warp), gate(words[0], words[1]),
                                       gate(words[2], words[3]));
      else
        ptx::store_matrices_transposed(
            buffer() + staged(pair * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), words[0], words[1],
            words[2], words[3]);
    }
    if (stores_ == SENT) {
      ptx::copies_fence();
      // The next buffer is free once all have met here.
      if (thread_ == 0) ptx::stores_wait_read<BUFFERS - 2>();
      ptx::warpgroup_sync(warpgroup_ + 1);
      if (thread_ == 0) {
        ptx::store_2d(y_map_, row_ / HALVED, token, buffer());
        ptx::stores_commit();
      }
    } else {
      ptx::warpgroup_sync(warpgroup_ + 1);
      copy(token);
    }
    turn_ = turn_ == BUFFERS - 1 ? 0 : turn_ + 1;
  }

  // Before the buffers are used for something else.
  __device__ __forceinline__ void await_read() const {
    if (stores_ == SENT && thread_ == 0) ptx::stores_wait_read<0>();
  }

  // Before this thread ends.
  __device__ __forceinline__ void await_stored() const {
    if (stores_ == SENT && thread_ == 0) ptx::stores_wait<0>();
  }

 private:
  // As the host names them.
  enum { NARROW, WIDE, SENT };

  __device__ __forceinline__ u32 buffer() const {
    return base_ + OUTPUT_OFFSET + (warpgroup_ * BUFFERS + turn_) * SLICE_BYTES;
  }

  // The slice in the buffer, by all threads.
  __device__ __forceinline__ void copy(int token) const {
    constexpr int LINES = 128 / LINE_EIGHTS;  // at once
    const int columns = N_ / HALVED, column = row_ / HALVED + int(thread_ % LINE_EIGHTS) * 8;
#pragma unroll
    for (int first = 0; first < SLICE; first += LINES) {
      const int line = first + int(thread_ / LINE_EIGHTS);
      if (LINES > SLICE && line >= SLICE) continue;
      u32 words[4];
      ptx::load_shared(words, buffer() + staged(line, thread_ % LINE_EIGHTS));
      if (token + line >= M_ || column >= columns) continue;
      u16* to = y_ + size_t(token + line) * columns + column;
      if (stores_ == WIDE) {
        ptx::store_global(to, words);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (column + i < columns) to[i] = u16(words[i / 2] >> i % 2 * 16);
      }
    }
  }

  static constexpr int LINE_EIGHTS = 8 / HALVED;

  // Where eight (16 bytes) of a token's outputs lie, swizzled as the copy engine does it for lines of 128 or 64 bytes:
  // those of eight tokens in turn are in different banks.
  __device__ __forceinline__ static u32 staged(u32 token, u32 eight) {
    return token * (LINE_EIGHTS * 16) + ((eight ^ (token / HALVED & (LINE_EIGHTS - 1))) << 4);
  }

  const TensorMap* y_map_;
  u16* y_;
  const signed char* row_exponent_;
  const u16* bias_;
  const int M_, N_;
  const int stores_;
  const u32 base_, warpgroup_, thread_;
  u32 turn_ = 0;
  int row_ = 0;
  u32 words_[2] = {};
};

}  // namespace
