// The 16-bit float of activations, outputs and biases: bfloat16 with BFLOAT16, else float16.
#pragma once
#include "ptx.cuh"

#if BFLOAT16
#define PACK "cvt.rn.bf16x2.f32"
#else
#define PACK "cvt.rn.f16x2.f32"
#endif

// Two outputs, and one widened.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
  asm(PACK " %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float widen(u16 bits) {
#if BFLOAT16
  return __uint_as_float(u32(bits) << 16);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

#if BFLOAT16
// Two float16 numbers of at most eight significant bits as bfloat16: exact, as float32 holds either.
__device__ __forceinline__ u32 as_bfloat16(u32 pair) {
  float low, high;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(pair));
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
#endif
