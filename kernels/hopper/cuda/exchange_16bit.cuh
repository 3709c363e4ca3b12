// Sums of one tile that several hold parts of: two warpgroups of a CTA, or the two CTAs of a cluster.
#pragma once
#include "layout_16bit.cuh"

namespace {

// Of the sums of two warps that took turns in K, OWN_SUMS to either: the first half to the first, the other to the
// second. They pass through the output buffers of both, half a buffer at a time, so that one barrier a round is enough.
// The order of the two terms does not change their sum.
__device__ __forceinline__ void exchange_in_turns(float (&sums)[SUMS], u32 buffer, u32 other_buffer, bool second,
                                                  u32 barrier) {
  // What is stored through these buffers is stored before and behind.
  ptx::threads_sync<CONSUMERS * 128>(ALL_CONSUMERS);
#pragma unroll
  for (int i = 0; i < OWN_SUMS; i += 8) {
    const u32 half = i / 8 % 2 * (WARP_BYTES / 2);
#pragma unroll
    for (int j = i; j < i + 8; j += 4) {
      float given[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) given[k] = second ? sums[j + k] : sums[OWN_SUMS + j + k];
      ptx::store_shared(buffer + half + (j - i) * 128, given);
    }
    ptx::threads_sync<64>(barrier);
#pragma unroll
    for (int j = i; j < i + 8; j += 4) {
      u32 taken[4];
      ptx::load_shared(taken, other_buffer + half + (j - i) * 128);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sums[j + k] = (second ? sums[OWN_SUMS + j + k] : sums[j + k]) + __uint_as_float(taken[k]);
    }
  }
  ptx::threads_sync<CONSUMERS * 128>(ALL_CONSUMERS);
}

// A thread's part in a cluster whose halves have half of K each: of each tile, a CTA of either gives that CTA of the
// other which has the same rows and tokens its sums of every second slice, straight into the buffers of x and weights,
// which are idle then, and stores the rest.
//
// Neither may write before the other's buffers are idle, nor may any that fills buffers, its own or those of others that
// share its panels, before what was given there has been taken. Nothing arrives at a CTA that has ended: it has waited
// for all that is sent to it, or for all others.
class Pair {
 public:
  __device__ __forceinline__ Pair(u32 base, u32 warp, u32 lane, u32 rank)
      : base_(base), buffer_(base + warp * GIVEN_BYTES + lane * 16), given_(base + GIVEN + warp * GIVEN_SLICES * 8),
        lane_(lane), half_(rank / WORKER), worker_(rank - rank % WORKER), other_(rank ^ WORKER) {}

  __device__ __forceinline__ static void init(u32 base) {
    ptx::barrier_init(base + READY, CONSUMERS * 4);
    ptx::barrier_init(base + TAKEN, CONSUMERS * 4 * WORKER);
    for (int i = 0; i < CONSUMERS * 4 * GIVEN_SLICES; ++i) ptx::barrier_init(base + GIVEN + i * 8, 1);
  }

  // For who fills the buffers: all that was given for the exchange before number `exchange` has been taken.
  __device__ __forceinline__ static void await_taken(u32 base, int exchange) {
    if (exchange > 0) ptx::barrier_wait(base + TAKEN, (exchange - 1) & 1);
  }

  // Slices from `first` up to `end`, of a tile that this warp has no more to multiply for; store(slice) for each that
  // stays here, with the sums of both.
  template <class Store>
  __device__ __forceinline__ void exchange(float (&sums)[SUMS], int first, int end, Store store) {
    // The other has made its barriers.
    if (MEET_LATE && exchanges_ == 0) ptx::cluster_wait();
    const u32 parity = exchanges_++ & 1;
    auto stays = [&](int slice) { return u32(slice - first & 1) == half_; };
    if (lane_ == 0) ptx::barrier_arrive_at(base_ + READY, other_);
    if (lane_ < GIVEN_SLICES) {
      const bool some = first + int(lane_ * 2 + half_) < end;
      ptx::barrier_expect(given_ + lane_ * 8, some ? GIVEN_SLICE_BYTES : 0);
    }
    ptx::barrier_wait(base_ + READY, parity);
    const u32 to = ptx::address_at(buffer_, other_), to_given = ptx::address_at(given_, other_);
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      if (slice < first || slice >= end || stays(slice)) continue;
      const u32 place = (slice - first) / 2;
#pragma unroll
      for (int i = 0; i < SLICE_SUMS; i += 4)
        ptx::store_remote(to + place * GIVEN_SLICE_BYTES + i * 128, sums + slice * SLICE_SUMS + i,
                          to_given + place * 8);
    }
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      if (slice < first || slice >= end || !stays(slice)) continue;
      const u32 place = (slice - first) / 2;
      ptx::barrier_wait(given_ + place * 8, parity);
#pragma unroll
      for (int i = 0; i < SLICE_SUMS; i += 4) {
        u32 taken[4];
        ptx::load_shared(taken, buffer_ + place * GIVEN_SLICE_BYTES + i * 128);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[slice * SLICE_SUMS + i + k] += __uint_as_float(taken[k]);
      }
      store(slice);
    }
    // The copy engine writes there next.
    ptx::copies_fence();
    __syncwarp();
    if (lane_ >= WORKER) return;
    if constexpr (WORKER == 1)
      ptx::barrier_arrive(base_ + TAKEN);
    else
      ptx::barrier_arrive_at(base_ + TAKEN, worker_ + lane_);
  }

 private:
  const u32 base_, buffer_, given_, lane_, half_, worker_, other_;
  int exchanges_ = 0;
};

}  // namespace
