// Where a pipeline of COUNT buffers stands: its next buffer, and the parity of its use of the buffers so far.
#pragma once
#include "ptx.cuh"

template <int COUNT>
struct Ring {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == COUNT) {
      stage = 0;
      parity ^= 1;
    }
  }
};
