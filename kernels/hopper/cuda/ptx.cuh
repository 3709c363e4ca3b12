// Hopper's instructions as functions, one a function: what each does is in the PTX manual under its name.
//
// Shared memory is addressed by its 32-bit address in the shared window. With BOUNDED set, a wait that lasts
// for millions of polls ends the kernel with an error instead of hanging the device.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#ifndef BOUNDED
#define BOUNDED 0
#endif

// As cuTensorMapEncodeTiled fills it.
struct alignas(64) TensorMap {
  u64 words[16];
};

namespace ptx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return u32(__cvta_generic_to_shared(pointer));
}

// An illegal store: unlike a trap it leaves setmaxnreg its effect.
__device__ __forceinline__ void give_up() { asm volatile("st.global.u32 [%0], 0;" ::"l"(u64(8)) : "memory"); }

// --- mbarrier ---

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ bool barrier_try(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Until the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
#if BOUNDED
  for (u32 polls = 0; !barrier_try(barrier, parity); ++polls)
    if (polls > (1u << 22)) give_up();
#else
  while (!barrier_try(barrier, parity)) {
  }
#endif
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the same offset in CTA `rank` of the cluster. It orders nothing for that CTA: what it hands back is read by
// the tensor cores and written by the copy engine. (A release for the cluster would wait for all memory.)
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// The address in CTA `rank` of the cluster of what lies at `address` in this one.
__device__ __forceinline__ u32 address_at(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Sixteen bytes to another CTA's shared memory, counted at a barrier of that CTA.
__device__ __forceinline__ void store_remote(u32 to, const float* values, u32 barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
      : "memory");
}

// What this thread has read and written in shared memory comes before copies issued after it has signalled.
__device__ __forceinline__ void copies_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- bulk copies; a policy is an L2 eviction priority ---

constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;

__device__ __forceinline__ void load_2d(u32 to, const TensorMap* map, int c0, int c1, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(barrier), "l"(policy)
      : "memory");
}

// Into the same place of every CTA in the mask `ctas`; each gets the bytes counted at its own barrier.
__device__ __forceinline__ void load_2d_multicast(u32 to, const TensorMap* map, int c0, int c1, u32 barrier,
                                                  u16 ctas, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(barrier), "h"(ctas), "l"(policy)
      : "memory");
}

// From shared memory, without what lies outside the tensor.
__device__ __forceinline__ void store_2d(const TensorMap* map, int c0, int c1, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(c0),
               "r"(c1), "r"(from)
               : "memory");
}

// What this thread has stored so since it last did this, as a group.
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the last COUNT have left shared memory.
template <int COUNT>
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(COUNT) : "memory");
}

// Until all of this thread's groups but the last COUNT have been written.
template <int COUNT>
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(COUNT) : "memory");
}

// Into the L2 cache; address and bytes are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const u8* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Sixteen bytes, in one store: what the compiler makes of an assignment are at times four.
__device__ __forceinline__ void store_global(u16* to, const u32 (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// --- matrices in shared memory ---

__device__ __forceinline__ void load_shared(u32 (&words)[4], u32 from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void store_shared(u32 to, const float (&values)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(values[0]), "f"(values[1]), "f"(values[2]),
               "f"(values[3])
               : "memory");
}

__device__ __forceinline__ void store_matrices(u32 to, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(u32 to, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// wgmma's descriptor of an operand with K along 128-byte rows in the 128-byte swizzle, from `address`, whose
// panel starts at a multiple of 1024: groups of eight rows lie 1024 bytes apart. K advances by adding bytes / 16.
__device__ __forceinline__ u64 panel_descriptor(u32 address) {
  return u64((address & 0x3FFFF) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// --- wgmma ---

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int COUNT>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

// Pins values between wgmma and a wait: the compiler moves no use of them across.
template <int COUNT>
__device__ __forceinline__ void hold(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// The value, known only here: what follows from it is computed here and not kept from before.
__device__ __forceinline__ int here(int value) {
  int result;
  asm volatile("mov.b32 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// --- threads, clusters, kernels ---

// Named barrier `id` among the 128 threads of a warpgroup.
__device__ __forceinline__ void warpgroup_sync(u32 id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// Named barrier `id` among THREADS threads.
template <int THREADS>
__device__ __forceinline__ void threads_sync(u32 id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// This thread of its block, this block, and how many there are; read anew instead of kept in registers.
__device__ __forceinline__ u32 thread() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ u32 block() {
  u32 block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}
__device__ __forceinline__ u32 blocks() {
  u32 blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

template <int REGISTERS>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_less() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// After one thread has made the barriers: the CTA meets, or the cluster. A cluster that is not AWAITED only says that
// this CTA is there, and has to `cluster_wait` before it reaches into another.
template <int CLUSTER, bool AWAITED = true>
__device__ __forceinline__ void meet() {
  if constexpr (CLUSTER > 1) cluster_arrive();
  if constexpr (CLUSTER > 1 && AWAITED)
    cluster_wait();
  else
    __syncthreads();
}

// The kernel launched before this one has ended, and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start once every CTA has called this, after `wait_for_previous_kernel`: one that reads what an
// earlier kernel wrote then finds it, whether or not it waits for this one first, as kernels that torch.compile writes
// may not. Nothing is lost: the next one's CTAs find no room before this one's leave.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// --- counters in global memory ---

__device__ __forceinline__ void count_one(u32* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ u32 count_read(const u32* counter) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Until at least `target` have counted themselves, and what they wrote before is visible.
__device__ __forceinline__ void count_await(const u32* counter, u32 target) {
#if BOUNDED
  for (u32 polls = 0; count_read(counter) < target; ++polls)
    if (polls > (1u << 22)) give_up();
#else
  while (count_read(counter) < target) {
  }
#endif
}

// Counts once more; who makes it `last` sets it back to zero, for the next kernel.
__device__ __forceinline__ void count_leave(u32* counter, u32 last) {
  if (atomicAdd(counter, 1) + 1 == last) *counter = 0;
}

}  // namespace ptx
