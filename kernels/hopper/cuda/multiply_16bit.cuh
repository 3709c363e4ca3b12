// The products of one step of K, by a warpgroup.
#pragma once
#include "layout_16bit.cuh"
#include "wgmma.cuh"

namespace {

// sums = the products of 64 weight rows in registers and a stage of x, plus, unless it is the `first`, the sums so far.
// Only issued: operand and stage are in use until the group has been waited for.
__device__ __forceinline__ void multiply_step(float (&sums)[SUMS], const u32 (&operand)[16], u32 x_stage, bool first) {
  const u64 x_panel = ptx::panel_descriptor(x_stage);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < MMAS; ++i)
      wgmma(reinterpret_cast<float (&)[MMA_TOKENS / 2]>(sums[i * MMA_TOKENS / 2]), operand + k * 4,
            x_panel + k * 2 + i * (MMA_TOKENS * STEP * 2 >> 4), k > 0 || !first);
  ptx::wgmma_commit();
}

}  // namespace
