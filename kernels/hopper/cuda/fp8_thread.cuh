// A thread among the consumers of gemm_fp8.cu. Asked for anew each time, as what follows from it is: beside the sums no
// registers are left to keep the epilogue's addresses in.
#pragma once
#include "ptx.cuh"

namespace self {

__device__ __forceinline__ u32 lane() { return ptx::thread() % 32; }
// Of its warpgroup.
__device__ __forceinline__ u32 thread() { return ptx::thread() % 128; }
__device__ __forceinline__ u32 warp() { return ptx::thread() / 32 % 4; }

// All of its warpgroup.
__device__ __forceinline__ void sync() { ptx::warpgroup_sync(ptx::thread() / 128 + 1); }

}  // namespace self
