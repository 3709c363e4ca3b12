// What the sums of a tile of gemm_fp8.cu are scaled by: factors and biases of columns, scales of rows. Each warpgroup
// has its own in shared memory, from the first step of a tile until its sums are packed.
#pragma once
#include "elements.cuh"
#include "fp8_schedule.cuh"
#include "fp8_thread.cuh"

namespace {

// 2^exponent as a bfloat16, exponent from -128 to 127.
__device__ __forceinline__ u32 power_of_two(int exponent) {
  const int biased = exponent + 127;
  return biased > 0 ? biased << 7 : 0x40 >> -biased;
}

// Of this warpgroup: a factor and a bias for each pair of columns, then rows.
__device__ __forceinline__ u32 scales_address(u32 base) {
  return base + SCALE_OFFSET + ptx::thread() / 128 * (COLUMN_BYTES + ROW_BYTES);
}

// Of the tile at m, n. Its tokens are there, and thus their scales.
__device__ __forceinline__ void put_scales(const Arguments& a, u32 base, int m, int n) {
  const int thread = self::thread(), column = n + thread * 2;
  // A thread's share: two columns and a row.
  int exponents[2] = {-128, -128};
  u32 biases[2] = {0, 0};
  float row = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (thread * 2 < BLOCK_N && column + i < a.N) {
      exponents[i] = __ldg(a.row_exponent + column + i);
      if (a.bias) biases[i] = __ldg(a.bias + column + i);
    }
  if (thread < BLOCKS * 64 && m + thread < a.M) row = __ldcg(a.x_scale + m + thread);
  self::sync();  // those of the last tile have been read
  const u32 columns = scales_address(base), low = power_of_two(exponents[0]), high = power_of_two(exponents[1]);
  if (thread * 2 < BLOCK_N)
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(columns + thread * 8), "r"(low | high << 16),
                 "r"(biases[0] | biases[1] << 16)
                 : "memory");
  if (thread < BLOCKS * 64)
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(columns + COLUMN_BYTES + thread * 4), "f"(row) : "memory");
}

// A thread's sums as 16-bit outputs.
class Scaling {
 public:
  __device__ __forceinline__ explicit Scaling(u32 base) {
    const u32 lane = self::lane(), address = scales_address(base), row = self::warp() * 16 + lane / 4;
    columns_ = address + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < BLOCKS * 2; ++i) {
      float& scale = rows_[i / 2][i % 2];
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(scale)
                   : "r"(address + COLUMN_BYTES + (row + i % 2 * 8 + i / 2 * 64) * 4)
                   : "memory");
      scale *= 0x1p-8f;  // of the weights' format
    }
  }

  // A piece, scaled and with the bias: by octets of columns, two rows each.
  __device__ __forceinline__ void pack(const float (&sums)[BLOCKS][SUMS], int piece, u32 (&words)[PIECE_WORDS]) const {
    const float* sum = piece_of(sums, piece);
    const float(&rows)[2] = rows_[piece % BLOCKS];
#pragma unroll
    for (int i = 0; i < PIECE_WORDS; i += 2, sum += 4) {
      u32 factors, biases;
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(factors), "=r"(biases)
                   : "r"(columns_ + piece / BLOCKS * SLICE * 4 + i * 16)
                   : "memory");
      const float low = __uint_as_float(factors << 16), high = __uint_as_float(factors & 0xFFFF0000);
      const float low_bias = widen(u16(biases)), high_bias = widen(u16(biases >> 16));
      words[i] = ::pack(sum[0] * rows[0] * low + low_bias, sum[1] * rows[0] * high + high_bias);
      words[i + 1] = ::pack(sum[2] * rows[1] * low + low_bias, sum[3] * rows[1] * high + high_bias);
    }
  }

 private:
  u32 columns_;
  float rows_[BLOCKS][2];
};

}  // namespace
