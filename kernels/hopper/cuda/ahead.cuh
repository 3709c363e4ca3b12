// The beginning of the weights that the next product reads. Between two products of a model small kernels run that
// leave memory idle; it goes on streaming meanwhile if a product, when its own weights are there, asks the L2 cache for
// what comes next.
#pragma once
#include "ptx.cuh"

struct Ahead {
  const u8* planes[2];  // null where there is none
  u32 bytes;            // of each plane, a multiple of 16
};

// By one thread of each CTA: all CTAs together ask for all of it, what is read first before the rest.
__device__ __forceinline__ void ask_ahead(const Ahead& ahead) {
  constexpr u32 PIECE = 8192;
  for (u32 from = blockIdx.x * PIECE; from < ahead.bytes; from += gridDim.x * PIECE)
    for (const u8* plane : ahead.planes)
      if (plane) ptx::prefetch_l2(plane + from, min(PIECE, ahead.bytes - from));
}
