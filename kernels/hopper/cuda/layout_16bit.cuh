// What the parts of gemm_16bit.cu share: sizes of a tile, and where things lie in shared memory.
#pragma once
#include "ptx.cuh"

namespace {

// CTAs that share panels of x or weights, and with them a place in the schedule; a cluster has CLUSTER_K times as many.
constexpr int WORKER = CLUSTER_TOKENS * CLUSTER_ROWS;
constexpr int CLUSTER = WORKER * CLUSTER_K;
// CTAs that share K alone meet before they exchange sums, not at the start.
constexpr bool MEET_LATE = CLUSTER_K > 1 && WORKER == 1;
constexpr int ROWS = 64 * CONSUMERS / SLICED_K;
constexpr int STEP = 64;   // of K: what one stage of x holds, and a quarter of the products of a unit
constexpr int UNIT = 128;  // of K: what one stage of weights holds
constexpr int X_BYTES = TOKENS * STEP * 2;
constexpr int PLANE_BYTES = ROWS * UNIT;
constexpr int SUMS = TOKENS / 2;
// Of tokens in one product (wgmma), and in one copy of x.
constexpr int MMA_TOKENS = TOKENS / MMAS;
constexpr int X_BOX = TOKENS / CLUSTER_ROWS / X_BOXES;
// Of the tokens that a warpgroup stores, by slices.
constexpr int OWN_TOKENS = TOKENS / SLICED_K;
constexpr int OWN_SUMS = SUMS / SLICED_K;
constexpr int SLICES = OWN_TOKENS / SLICE;
constexpr int SLICE_SUMS = SLICE / 2;
constexpr int SLICE_BYTES = SLICE * 128;
// A warpgroup's, of a slice each.
constexpr int BUFFERS = 4 * WARP_BYTES / SLICE_BYTES;
// What two CTAs that share K give each other, of a warp: every second slice, 16 rows of float32.
constexpr int GIVEN_SLICES = (SLICES + 1) / 2;
constexpr int GIVEN_SLICE_BYTES = SLICE * 64;
constexpr int GIVEN_BYTES = GIVEN_SLICES * GIVEN_SLICE_BYTES;

constexpr int WEIGHT_OFFSET = X_STAGES * X_BYTES;
constexpr int OUTPUT_OFFSET = WEIGHT_OFFSET + WEIGHT_STAGES * 2 * PLANE_BYTES;
// Barriers, of 8 bytes each.
constexpr int X_FULL = OUTPUT_OFFSET + CONSUMERS * 4 * WARP_BYTES, X_EMPTY = X_FULL + X_STAGES * 8;
constexpr int WEIGHT_FULL = X_EMPTY + X_STAGES * 8, WEIGHT_EMPTY = WEIGHT_FULL + WEIGHT_STAGES * 8;
// Where two CTAs share K: the other's buffers may be written; a slice has been given to a warp; all have taken theirs.
constexpr int READY = WEIGHT_EMPTY + WEIGHT_STAGES * 8, TAKEN = READY + 8, GIVEN = TAKEN + 8;
// Named barriers: 1 + w inside warpgroup w, then of the two warps that took turns in K, then of all consumers.
constexpr u32 WARP_PAIRS = CONSUMERS + 1, ALL_CONSUMERS = CONSUMERS + 5;

static_assert(X_BOX % 8 == 0 && X_BOX <= 256 && MMA_TOKENS % 8 == 0 && MMA_TOKENS <= 256);
static_assert(ROWS % (8 * CLUSTER_TOKENS) == 0);
static_assert(OWN_TOKENS % SLICE == 0 && SLICE % 16 == 0);
static_assert(SLICED_K == 1 || (CONSUMERS == 2 && SLICED_K == 2 && TOKENS % 32 == 0 && SETS == 1 && !AHEAD));
static_assert(CLUSTER_K == 1 || (CLUSTER_K == 2 && WORKER <= 2));
static_assert(BUFFERS >= 2);
static_assert(CLUSTER_K == 1 || CONSUMERS * 4 * GIVEN_BYTES <= OUTPUT_OFFSET);

}  // namespace
