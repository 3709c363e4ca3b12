// The end of a gated product (kernels/gated.py): with GATED the weight rows of a tile are eight of a gate and eight of
// its partner in turn, which puts both sums of an output into one thread's registers, and y has half as many columns.
#pragma once
#include "elements.cuh"

namespace {

constexpr int HALVED = GATED ? 2 : 1;

// silu(gate) * partner of two pairs of products, which are read as they would have been stored. ex2 and rcp are good to
// 2^-22, the rounded argument of ex2 costs up to 2^-17 where the gate is far below zero, and below -87 the output is zero.
__device__ __forceinline__ u32 gate(u32 gates, u32 partners) {
  float outputs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float value = widen(u16(gates >> i * 16));
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    outputs[i] = value * inverse * widen(u16(partners >> i * 16));
  }
  return pack(outputs[0], outputs[1]);
}

}  // namespace
