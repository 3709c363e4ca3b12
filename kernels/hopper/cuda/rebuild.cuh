// 16-bit weights from their two bytes, in the registers from which wgmma takes its A operand.
#pragma once
#include "elements.cuh"
#include "ptx.cuh"

// Four weights of the two byte planes as two pairs of 16-bit floats: nestedfp/format.py says why this rebuilds them.
// Multiply-adds instead of the subtractions would leave the integer pipe more room, which gains nothing beside wgmma,
// and cost 1 % of the time at the power limit.
__device__ __forceinline__ void rebuild(u32 upper, u32 lower, u32& first, u32& second) {
  const u32 high = upper + ((~upper & 0x7E7E7E7E) >> 1);
  first = __byte_perm(lower, high, 0x5140) - 0x3FBF3FBF;
  second = __byte_perm(lower, high, 0x7362) - 0x3FBF3FBF;
#if BFLOAT16
  first = as_bfloat16(first);
  second = as_bfloat16(second);
#endif
}

// A thread's share of 64 rows by 64 of K: 16 bytes of each plane in two rows. `from` is where its first row's lie in a
// plane in the 128-byte swizzle, which is the same for that row and the eighth after it. Rows are PITCH bytes apart,
// the lower plane PLANE behind the upper.
template <int PITCH, int PLANE>
struct Bytes {
  u32 upper[2][4], lower[2][4];
  __device__ __forceinline__ void load(u32 from) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      ptx::load_shared(upper[h], from + h * 8 * PITCH);
      ptx::load_shared(lower[h], from + h * 8 * PITCH + PLANE);
    }
  }
  // As wgmma's A fragments: four registers for each 16 of K.
  __device__ __forceinline__ void rebuild(u32 (&weights)[16]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        ::rebuild(upper[h][j], lower[h][j], weights[j * 4 + h], weights[j * 4 + h + 2]);
  }
};
