// What the sums of a tile of gemm_fp8.cu are scaled by, from its first step until its sums are packed: factors and
// biases of columns, in shared memory, each warpgroup its own; and scales of rows, each lane one of its warp's.
#pragma once
#include "elements.cuh"
#include "fp8_schedule.cuh"
#include "fp8_thread.cuh"

namespace {

// 2^exponent, exponent from -128 to 127.
__device__ __forceinline__ float power_of_two(int exponent) {
  const int biased = exponent + 127;
  return __uint_as_float(biased > 0 ? biased << 23 : 0x400000 >> -biased);
}

// Of this warpgroup: for each pair of columns two factors and two biases. As float32, so that packing, while the tensor
// cores wait, has nothing to widen.
__device__ __forceinline__ u32 columns_address(u32 base) {
  return base + SCALE_OFFSET + ptx::thread() / 128 * COLUMN_BYTES;
}

// A thread's share of them on its way there, two columns.
class Columns {
 public:
  // Of the tile at n. Only asks: nothing waits for the answer before it is put.
  __device__ __forceinline__ Columns(const Arguments& a, int n) {
    const int first = self::thread() * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (first < BLOCK_N && n + first + i < a.N) {
        exponents_[i] = __ldg(a.row_exponent + n + first + i);
        if (a.bias) biases_[i] = __ldg(a.bias + n + first + i);
      }
  }

  __device__ __forceinline__ void put(u32 base) const {
    self::sync();  // those of the last tile have been read
    const int first = self::thread() * 2;
    const float low = power_of_two(ptx::here(exponents_[0])), high = power_of_two(ptx::here(exponents_[1]));
    if (first < BLOCK_N)
      ptx::store_shared(columns_address(base) + first * 8, {low, high, widen(u16(ptx::here(biases_[0]))),
                                                            widen(u16(ptx::here(biases_[1])))});
  }

 private:
  int exponents_[2] = {-128, -128};
  int biases_[2] = {0, 0};
};

// Of this lane's row of the tile at m, whose tokens are there, and thus their scales.
__device__ __forceinline__ float row_scale(const Arguments& a, int m) {
  const int lane = self::lane(), row = m + lane / 16 * 64 + self::warp() * 16 + lane % 16;
  return lane < BLOCKS * 16 && row < a.M ? __ldcg(a.x_scale + row) : 0;
}

// A thread's sums as 16-bit outputs.
class Scaling {
 public:
  // scale: this lane's `row_scale`.
  __device__ __forceinline__ Scaling(u32 base, float scale) {
    const u32 lane = self::lane();
    columns_ = columns_address(base) + lane % 4 * 16;
    scale *= 0x1p-8f;  // of the weights' format
#pragma unroll
    for (int i = 0; i < BLOCKS * 2; ++i) rows_[i / 2][i % 2] = __shfl_sync(0xFFFFFFFF, scale, lane / 4 + i * 8);
  }

  // A piece, scaled and with the bias: by octets of columns, two rows each.
  __device__ __forceinline__ void pack(const float (&sums)[BLOCKS][SUMS], int piece, u32 (&words)[PIECE_WORDS]) const {
    const float* sum = piece_of(sums, piece);
    const float(&rows)[2] = rows_[piece % BLOCKS];
#pragma unroll
    for (int i = 0; i < PIECE_WORDS; i += 2, sum += 4) {
      float low, high, low_bias, high_bias;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(low), "=f"(high), "=f"(low_bias), "=f"(high_bias)
                   : "r"(columns_ + piece / BLOCKS * SLICE * 8 + i * 32)
                   : "memory");
      words[i] = ::pack(sum[0] * rows[0] * low + low_bias, sum[1] * rows[0] * high + high_bias);
      words[i + 1] = ::pack(sum[2] * rows[1] * low + low_bias, sum[3] * rows[1] * high + high_bias);
    }
  }

 private:
  u32 columns_;
  float rows_[BLOCKS][2];
};

}  // namespace
