// y [M, N] = (q(x) * x_scale) (e4m3(upper) * 2^(row_exponent - 8))^T + bias on Hopper: the FP8 mode, one launch.
// With GATED y is [M, N / 2]: gate.cuh.
//
// Operands. x: [M, K] 16-bit floats, rows `x_pitch` bytes apart; upper: E4M3 [N, K], row-major, or with `panels` in the
// stored order of `KOrder.HOPPER`, panels of N rows by 128 of K, K a multiple of 128. Rows of both begin on 16-byte
// boundaries and K is a multiple of 16. M, N and K are otherwise free: the copy engine fills what lies outside with
// zeros, and nothing outside y is stored. Scratch: codes, in the weights' order of K, and x_scale [M], which this
// launch fills; partials and flags for split K; flags are zero before and after. Boxes that reach past the last token
// are slow to copy: codes have rows for all tiles, and fewer tokens than a tile's are copied alone, `token_bytes` a
// chunk. What is multiplied beside M tokens, or N weight rows, is undefined.
//
// Quantising. Consumers first quantise the `front` tokens, those that the first tiles need; three idle warps of the
// producer's warpgroup quantise the others meanwhile. Each token is counted for its tile, and the producer asks for a
// tile's codes when all are.
//
// Multiplying, persistent over tiles of BLOCK_M tokens by BLOCK_N weight rows:
// * one thread streams both operands through a ring of STAGES shared-memory buffers by TMA, tile after tile. CTAs of a
//   cluster that share a panel each fetch a part of it and multicast it to the others;
// * CONSUMERS warpgroups multiply (wgmma, both operands from shared memory, BLOCKS * 64 tokens of the tile each), one
//   step in flight while the next is issued;
// * factors and biases of columns are asked for during the last step of the tile before, and reach shared memory in the
//   first, when scales of rows are asked for: no step waits for them;
// * sums leave in pieces of SLICE columns, which a warp stages in shared memory. With DEFERRED those of a tile that
//   another follows are scaled and packed as soon as they are there, and wait in registers, half as many as the sums,
//   while its products begin: beside each step a share of them is staged, and the copy engine takes whole pieces. All
//   others are stored at once, 16 bytes a thread: those of the last tile, which has no products behind it, and rows of
//   y off 16-byte boundaries, which are not for that engine.
//
// Whole waves. The first `whole` tiles, full waves of all workers, are multiplied whole. The K of each tile left is
// cut into `split` equal parts, one a worker. A part writes its sums to `partials`, except for its own share of the
// tile; counts itself; and, when all parts are counted, adds the others' sums to its share, in order, and stores it.
//
// Waits end. All of the grid is resident, which the launcher sees to, and products that share scratch run one after
// another. Quantising waits for nothing, so codes come, and the ring moves unless a consumer stops. A consumer waits for
// other parts only in the last unit of its CTA, when it has emptied its stages and written and counted its own.
//
// Accuracy, and when to promote. wgmma cuts its sums to about 14 bits. With PROMOTE each stage's sums are added to
// float32 totals; without, all of K stays in wgmma. Measured on normal data the latter costs 0.12 % (K = 4096) to
// 0.47 % (K = 32768) in norm, beside 3.7 % from quantising; on operands of one sign 7 % to 38 %, as in other
// libraries' fast accumulation. Totals double the registers of a tile: up to 64 tokens they cost nothing and are on.
//
// Roof: one byte a weight over the memory bandwidth for few tokens, the E4M3 tensor-core rate for many; between them
// shared memory, whose 128 bytes a cycle feed the copies in (BLOCK_M + BLOCK_N) and wgmma's operands (64 + BLOCK_N).
#include "ahead.cuh"
#include "fp8_consumer.cuh"
#include "fp8_producer.cuh"

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, CTAS)
    gemm_fp8(const __grid_constant__ TensorMap codes_map, const __grid_constant__ TensorMap upper_map,
             const __grid_constant__ TensorMap y_map, u16* y, const u8* x, u8* codes, float* x_scale,
             const signed char* row_exponent, const u16* bias, float* partials, u32* flags, int M, int N, int K,
             int x_pitch, int token_bytes, int panels, int front, int team_warps, const Schedule schedule,
             const Ahead ahead) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = ptx::shared_address(shared);
  const Arguments arguments = {&codes_map,  &upper_map, &y_map,   y,     x, codes, x_scale, row_exponent,
                               bias,        partials,   flags,    M,     N, K,     x_pitch, token_bytes,
                               panels != 0, front,      team_warps};
  const u32 warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  const u32 thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    const u32 full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    for (int i = 0; i < STAGES; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, CONSUMERS * 4 * WAITS);
    }
    ptx::barrier_init_fence();
  }
  ptx::meet<CLUSTER>();

  if (warpgroup == CONSUMERS) {
#if PRODUCER_REGISTERS
    ptx::registers_less<PRODUCER_REGISTERS>();
#endif
    if (thread == 0) {
      Producer(arguments, schedule, base).run();
      ask_ahead(ahead);
    } else if (thread >= 32)
      quantise_background(arguments, thread / 32 - 1, thread % 32);
  } else {
#if CONSUMER_REGISTERS
    ptx::registers_more<CONSUMER_REGISTERS>();
#endif
    ptx::wait_for_previous_kernel();
    Consumer(arguments, schedule, base, warpgroup).quantise_front();
    // The warpgroup is asked for anew: while a token is held, no register is left to keep it in.
    Consumer(arguments, schedule, base, __shfl_sync(0xFFFFFFFF, ptx::thread() / 128, 0)).run();
  }
  // Others of the cluster still signal here until they are through.
  __syncwarp();
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
}
