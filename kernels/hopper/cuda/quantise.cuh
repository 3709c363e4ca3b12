// Quantising a token to E4M3 by a team of threads: codes[p] = e4m3(x[k(p)] * 448 / amax), scale = amax / 448.
#pragma once
#include "elements.cuh"

// The larger of two 16-bit floats' magnitudes, by halves; NaN is larger than anything.
__device__ __forceinline__ u32 larger(u32 magnitudes, u32 words) {
  asm("max.u16x2 %0, %0, %1;" : "+r"(magnitudes) : "r"(words & 0x7FFF7FFF));
  return magnitudes;
}

// Sixteen columns, two to a word, scaled and narrowed to E4M3, four to a word in natural order; for `permute`
// word t holds columns 2t, 2t + 1, 2t + 8, 2t + 9: what thread t of a quad feeds to the tensor cores.
__device__ __forceinline__ uint4 narrow(const u32 (&words)[8], float factor, bool permute) {
  u32 pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    u16 pair;
    const float low = widen(u16(words[i])) * factor, high = widen(u16(words[i] >> 16)) * factor;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    pairs[i] = pair;
  }
  uint4 codes;
  codes.x = pairs[0] | (permute ? pairs[4] : pairs[1]) << 16;
  codes.y = (permute ? pairs[1] : pairs[2]) | (permute ? pairs[5] : pairs[3]) << 16;
  codes.z = (permute ? pairs[2] : pairs[4]) | (permute ? pairs[6] : pairs[5]) << 16;
  codes.w = (permute ? pairs[3] : pairs[6]) | pairs[7] << 16;
  return codes;
}

// Word t of lane j of a quad goes to word j of lane t.
__device__ __forceinline__ uint4 transpose(uint4 words, u32 lane) {
  const bool high = lane & 2, odd = lane & 1;
  const u32 r0 = __shfl_xor_sync(0xFFFFFFFF, high ? words.x : words.z, 2);
  const u32 r1 = __shfl_xor_sync(0xFFFFFFFF, high ? words.y : words.w, 2);
  const u32 a00 = high ? r0 : words.x, a01 = high ? r1 : words.y;
  const u32 a10 = high ? words.z : r0, a11 = high ? words.w : r1;
  const u32 q0 = __shfl_xor_sync(0xFFFFFFFF, odd ? a00 : a01, 1);
  const u32 q1 = __shfl_xor_sync(0xFFFFFFFF, odd ? a10 : a11, 1);
  return odd ? make_uint4(q0, a01, q1, a11) : make_uint4(a00, q0, a10, q1);
}

// A team of `lanes` threads, of which this is `lane`, takes 16 columns each in turn; HOLD of a thread's turns, asked
// for at once, stay in registers between finding amax and writing, the others are read twice, BATCH at once. `largest`
// makes a thread's magnitude the team's.
template <int HOLD, int BATCH, class Largest>
__device__ __forceinline__ void quantise(const u8* x, u8* codes, float* scale, int K, u32 lane, u32 lanes, bool permute,
                                         Largest largest) {
  const int chunks = K / 16;
  u32 held[HOLD > 0 ? HOLD : 1][8];
  u32 magnitudes = 0;
  auto load = [&](u32 (&words)[8], int chunk) {
    const uint4* from = reinterpret_cast<const uint4*>(x) + chunk * 2;
    const uint4 low = chunk < chunks ? from[0] : make_uint4(0, 0, 0, 0);
    const uint4 high = chunk < chunks ? from[1] : make_uint4(0, 0, 0, 0);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
  };
  auto visit = [&](const u32 (&words)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) magnitudes = larger(magnitudes, words[i]);
  };
#pragma unroll
  for (int i = 0; i < HOLD; ++i) load(held[i], lane + i * lanes);
#pragma unroll
  for (int i = 0; i < HOLD; ++i) visit(held[i]);
  auto load_batch = [&](u32 (&words)[BATCH][8], int chunk) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) load(words[i], chunk + i * lanes);
  };
  for (int chunk = lane + HOLD * lanes; chunk < chunks; chunk += BATCH * lanes) {
    u32 words[BATCH][8];
    load_batch(words, chunk);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) visit(words[i]);
  }
  float amax = widen(u16(largest(max(magnitudes & 0xFFFF, magnitudes >> 16))));
  amax = amax < 0x1p-100f ? 0x1p-100f : amax;
  const float factor = __fdiv_rn(448.0f, amax);
  if (lane == 0) *scale = __fdiv_rn(amax, 448.0f);
  auto write = [&](const u32 (&words)[8], int chunk) {
    uint4 out = narrow(words, factor, permute);
    if (permute) out = transpose(out, lane);
    // In a panel of 128 columns, thread t of a quad has 32 bytes, 16 for each step of 64.
    const int to = permute ? (chunk & ~7) + chunk % 4 * 2 + chunk / 4 % 2 : chunk;
    if (chunk < chunks) reinterpret_cast<uint4*>(codes)[to] = out;
  };
#pragma unroll
  for (int i = 0; i < HOLD; ++i)
    if (i * int(lanes) < chunks) write(held[i], lane + i * lanes);
  for (int first = HOLD * lanes; first < chunks; first += BATCH * lanes) {
    u32 words[BATCH][8];
    load_batch(words, first + lane);
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (first + i * int(lanes) < chunks) write(words[i], first + lane + i * lanes);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
