// The kernel layer: one function for each instruction that a kernel here may use.
//
// Under nvcc each function is a line of PTX. Under a host compiler the same names come from the emulator, which
// runs every CUDA thread as a fiber and checks each call (docs/kernel_layer.md). Kernels include only this file.
// Shared memory is reached through 32-bit addresses; `shared_base()` is where the dynamic part begins.
#pragma once

#ifndef __CUDACC__

#include "../../emulator/layer.h"

#else

#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layout.cuh"
#include "spin.h"

namespace nlora::cuda {

using TensorMap = CUtensorMap;

#define NLORA_OP __device__ __forceinline__

// ---- Thread, block and cluster ----

NLORA_OP uint32_t thread_rank() { return threadIdx.x; }

NLORA_OP uint32_t lane_rank() { return threadIdx.x % 32; }

// The shuffle tells the compiler that the value is uniform in the warp.
NLORA_OP uint32_t warp_rank() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

NLORA_OP uint32_t block_rank() { return blockIdx.x; }

NLORA_OP uint32_t grid_blocks() { return gridDim.x; }

NLORA_OP uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// One lane of the warp, the same one every time.
NLORA_OP bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

// ---- Shared and global memory ----

// First byte of dynamic shared memory, aligned to kSharedAlignment: launch() allocates the slack.
NLORA_OP uint32_t shared_base() {
  extern __shared__ uint8_t dynamic_shared[];
  const uint32_t address = uint32_t(__cvta_generic_to_shared(dynamic_shared));
  return (address + kSharedAlignment - 1) & ~(kSharedAlignment - 1);
}

// Address of the same offset in the shared memory of another block of the cluster.
NLORA_OP uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

template <class T>
NLORA_OP T ld_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
  uint32_t w[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w[0]) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
  }
  T value;
  memcpy(&value, w, sizeof(T));
  return value;
}

template <class T>
NLORA_OP void st_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
  uint32_t w[sizeof(T) / 4];
  memcpy(w, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(w[0]) : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  }
}

// Store into another block of the cluster; `address` comes from map_to_rank.
NLORA_OP void st_cluster(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

template <class T>
NLORA_OP T ld_global(const T* address) {
  return *address;
}

template <class T>
NLORA_OP void st_global(T* address, T value) {
  if constexpr (sizeof(T) == 16) {
    // The compiler would store the members of a struct one by one.
    uint32_t w[4];
    memcpy(w, &value, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(w[0]),
                 "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  } else {
    *address = value;
  }
}

// ---- Warps: shuffles, barriers, registers ----

template <class T>
NLORA_OP T shuffle(T value, uint32_t lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <class T>
NLORA_OP T shuffle_xor(T value, uint32_t mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
NLORA_OP T shuffle_up(T value, uint32_t delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}

template <class T>
NLORA_OP T shuffle_down(T value, uint32_t delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}

NLORA_OP void sync_warp() { __syncwarp(); }

NLORA_OP void sync_threads() { __syncthreads(); }

// Named barriers 1 to 15; `threads` counts both those that sync and those that only arrive.
NLORA_OP void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

NLORA_OP void bar_arrive(uint32_t id, uint32_t threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <uint32_t Registers>
NLORA_OP void setmaxnreg_increase() {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "24 to 256 in steps of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <uint32_t Registers>
NLORA_OP void setmaxnreg_decrease() {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "24 to 256 in steps of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- Clusters ----

NLORA_OP void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

NLORA_OP void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

NLORA_OP void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// ---- Grids: one launched with LaunchShape::waits may begin before the launch before it has ended ----

// Blocks that follow may be launched when every block of this grid has come here or has ended. Orders nothing.
NLORA_OP void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the launch before has ended; this thread then sees all that it wrote, by TMA too. Each grid must come here in
// some thread: what follows it waits for it alone.
NLORA_OP void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Waits: endless, or in builds with NLORA_BOUND_SPINS a trap after kSpinSeconds ----

#ifdef NLORA_BOUND_SPINS

struct Site {
  const char* file;
  uint32_t line;

  NLORA_OP static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, uint32_t(line)};
  }
  // Four of the last characters of the file's name: a constant.
  NLORA_OP uint32_t end(uint32_t word) const {
    uint32_t length = 0, four = 0;
    while (file[length]) {
      ++length;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t at = length + 4 * word + i;
      four |= uint32_t(at < kSpinName ? ' ' : file[at - kSpinName]) << 8 * i;
    }
    return four;
  }
};

// Memory of the host, which outlives a trap; null until it is told of it (context.cuh). NOTE: printf and assertions are
// calls, for which ptxas gives up setmaxnreg and serialises wgmma.
extern "C" {
// NOTE: not static, for that would take away the name by which the host looks for it.
__device__ volatile SpinRecord* nlora_spin_records;
}

#define NLORA_SPIN_SITE , Site site = Site::here()
#define NLORA_SPIN_CALLER , site
#define NLORA_SPIN_CHECK(bound, ...) bound.check(site, __VA_ARGS__)

struct SpinBound {
  uint32_t start = 0;

  // Modulo 4 s.
  NLORA_OP static uint32_t nanoseconds() {
    uint32_t now;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
    return now;
  }

  NLORA_OP void check(Site site, SpinRecord::Kind kind, uint64_t place, uint32_t wanted, uint32_t seen) {
    const uint32_t now = nanoseconds();
    start = start ? start : now;
    if (now - start <= kSpinSeconds * 1000000000u) {
      return;
    }
    if (volatile SpinRecord* record = nlora_spin_records) {
      record += (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) % kSpinRecords;
      record->line = site.line;
      record->block = blockIdx.x;
      record->thread = threadIdx.x;
      record->wanted = wanted;
      record->seen = seen;
      record->place = place;
#pragma unroll
      for (uint32_t word = 0; word < kSpinName / 4; ++word) {
        record->file[word] = site.end(word);
      }
      __threadfence_system();
      record->kind = kind;
      __threadfence_system();
    }
    __trap();
  }
};

#else

#define NLORA_SPIN_SITE
#define NLORA_SPIN_CALLER
#define NLORA_SPIN_CHECK(bound, ...) (void)bound

struct SpinBound {};

#endif

// ---- mbarriers: a phase ends when all arrivals are in and all expected bytes have landed ----

NLORA_OP void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the async proxy and to the cluster; a barrier must follow.
NLORA_OP void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

NLORA_OP void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at a barrier anywhere in the cluster; `barrier` comes from map_to_rank. Waiters use mbarrier_wait_cluster.
NLORA_OP void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same for operands of wgmma alone, which the caller has waited for: it orders nothing else, and waiters use
// mbarrier_wait. NOTE: a release for the cluster is a fence of the whole device, in every stage of a main loop.
NLORA_OP void mbarrier_arrive_operands(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

NLORA_OP void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

NLORA_OP bool mbarrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

NLORA_OP bool mbarrier_passed_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Blocks until the phase of this parity is over. A fresh barrier passes parity 1: producers start there.
NLORA_OP void mbarrier_wait(uint32_t barrier, uint32_t parity NLORA_SPIN_SITE) {
  SpinBound bound;
  while (!mbarrier_passed(barrier, parity)) {
    NLORA_SPIN_CHECK(bound, SpinRecord::kBarrier, barrier - shared_base(), parity, parity);
  }
}

// The same for barriers at which other blocks of the cluster arrive.
NLORA_OP void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity NLORA_SPIN_SITE) {
  SpinBound bound;
  while (!mbarrier_passed_cluster(barrier, parity)) {
    NLORA_SPIN_CHECK(bound, SpinRecord::kBarrier, barrier - shared_base(), parity, parity);
  }
}

// In clusters of kBlocks: arrives at the barrier of block `rank`, and waits for such arrivals at one's own.
template <int kBlocks>
NLORA_OP void mbarrier_arrive_in(uint32_t barrier, uint32_t rank) {
  if constexpr (kBlocks == 1) {
    mbarrier_arrive(barrier);
  } else {
    mbarrier_arrive_cluster(map_to_rank(barrier, rank));
  }
}

template <int kBlocks>
NLORA_OP void mbarrier_wait_in(uint32_t barrier, uint32_t parity NLORA_SPIN_SITE) {
  if constexpr (kBlocks == 1) {
    mbarrier_wait(barrier, parity NLORA_SPIN_CALLER);
  } else {
    mbarrier_wait_cluster(barrier, parity NLORA_SPIN_CALLER);
  }
}

// ---- TMA ----

NLORA_OP void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Box at (column, row) of the mapped matrix -> shared memory; completes its bytes on `barrier`.
NLORA_OP void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// One read, written at the same offset of every block in `ranks` (a bit each), completing on each one's barrier.
NLORA_OP void tma_load_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                                 uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}

// Shared memory -> box at (column, row), clipped at the edges; belongs to this thread's open bulk group.
NLORA_OP void tma_store(const TensorMap* map, uint32_t from, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}

NLORA_OP void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the newest Pending groups of this thread have read their shared memory.
template <int Pending>
NLORA_OP void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// All but the newest Pending groups of this thread are written and visible to it.
template <int Pending>
NLORA_OP void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// Orders this thread's ordinary shared-memory writes before async-proxy accesses (TMA, wgmma).
NLORA_OP void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders what this thread has seen of global memory before its own TMA accesses, and its own TMA stores that it has
// waited for before what it releases.
NLORA_OP void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- Flags and tickets in global memory ----

NLORA_OP void flag_release_add(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// The same where one thread alone writes the flag: nothing has to be known of its old value.
NLORA_OP void flag_release_store(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

NLORA_OP uint32_t flag_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// Blocks until the flag is `target`. No order is made of values: one that is as old as 2^31 launches is not ahead.
NLORA_OP void flag_wait(const uint32_t* flag, uint32_t target NLORA_SPIN_SITE) {
  SpinBound bound;
  while (flag_acquire(flag) != target) {
    NLORA_SPIN_CHECK(bound, SpinRecord::kFlag, reinterpret_cast<uint64_t>(flag), target, flag_acquire(flag));
  }
}

// Takes the next ticket: orders nothing else.
NLORA_OP uint32_t ticket_take(uint32_t* counter) {
  uint32_t ticket;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(counter) : "memory");
  return ticket;
}

NLORA_OP void ticket_reset(uint32_t* counter) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(counter) : "memory");
}

// ---- wgmma: 64 × N × 16, both operands in shared memory, fp32 accumulators ----

// Before the first wgmma of every commit group. Taking the accumulators keeps the compiler from writing them later.
template <int Count>
NLORA_OP void wgmma_fence(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

NLORA_OP void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the newest Pending groups are done. Taking the accumulators keeps the compiler from reading them earlier.
template <int Pending, int Count>
NLORA_OP void wgmma_wait(float (&d)[Count]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

// clang-format off
// Names and operands of the first n accumulators.
#define NLORA_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NLORA_R16 NLORA_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NLORA_R32 NLORA_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NLORA_R48 NLORA_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NLORA_R64 NLORA_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NLORA_R96                                                                                           \
    NLORA_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "\
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NLORA_R128                                                                                          \
    NLORA_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "\
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define NLORA_D8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),              \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define NLORA_D16(i) NLORA_D8(i), NLORA_D8(i + 8)
#define NLORA_D32(i) NLORA_D16(i), NLORA_D16(i + 16)
#define NLORA_D48(i) NLORA_D32(i), NLORA_D16(i + 32)
#define NLORA_D64(i) NLORA_D32(i), NLORA_D32(i + 32)
#define NLORA_D96(i) NLORA_D64(i), NLORA_D32(i + 64)
#define NLORA_D128(i) NLORA_D64(i), NLORA_D64(i + 64)

// r registers: operands r and r + 1 are the descriptors, r + 2 the accumulate flag, then the two majors.
#define NLORA_WGMMA(n, r, type, a, b, use, ta, tb)                                                          \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #use ", 0; "                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NLORA_R##r "}, "      \
                 "%" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb "; }"                                          \
                 : NLORA_D##r(0)                                                                            \
                 : "l"(a_descriptor), "l"(b_descriptor), "r"(uint32_t(accumulate)), "n"(int(MajorA)),        \
                   "n"(int(MajorB)))

#define NLORA_WGMMA_WIDTH(n, r, ...)                                                                        \
    if constexpr (N == n && std::is_same_v<T, bf16>) NLORA_WGMMA(n, r, "bf16", __VA_ARGS__);                \
    if constexpr (N == n && std::is_same_v<T, fp16>) NLORA_WGMMA(n, r, "f16", __VA_ARGS__)
// clang-format on

// d = a·bᵀ (+ d), in the first N / 2 of d: issued by all 128 threads of a warpgroup, complete after commit and wait.
template <int N, class T, Major MajorA = Major::K, Major MajorB = Major::K, int Count>
NLORA_OP void wgmma(float (&d)[Count], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(Count >= N / 2, "too few accumulators");
  static_assert(N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "unsupported width");
  NLORA_WGMMA_WIDTH(16, 8, 8, 9, 10, 11, 12);
  NLORA_WGMMA_WIDTH(32, 16, 16, 17, 18, 19, 20);
  NLORA_WGMMA_WIDTH(64, 32, 32, 33, 34, 35, 36);
  NLORA_WGMMA_WIDTH(96, 48, 48, 49, 50, 51, 52);
  NLORA_WGMMA_WIDTH(128, 64, 64, 65, 66, 67, 68);
  NLORA_WGMMA_WIDTH(192, 96, 96, 97, 98, 99, 100);
  NLORA_WGMMA_WIDTH(256, 128, 128, 129, 130, 131, 132);
}
#undef NLORA_WGMMA_WIDTH
#undef NLORA_WGMMA

// ---- Matrix fragments: stmatrix, ldmatrix, mma.sync ----

// Four 8×8 matrices of 16-bit elements: lanes 8j to 8j + 7 address the rows of matrix j (16 bytes each).
template <bool Transposed = false>
NLORA_OP void stmatrix(uint32_t row, const uint32_t (&r)[4]) {
  if constexpr (Transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  }
}

template <bool Transposed = false>
NLORA_OP void ldmatrix(uint32_t (&r)[4], uint32_t row) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
}

// d += a·b on registers, m16n8k16; a as ldmatrix gives it for rows of A, b for rows of Bᵀ.
template <class T>
NLORA_OP void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Two floats, rounded to nearest even, as the low and high half of a register.
template <class T>
NLORA_OP uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <class T>
NLORA_OP float to_float(T value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __uint_as_float(uint32_t(value.bits) << 16);
  } else {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
  }
}

// ---- cp.async (sm_80): 16 bytes a thread, the tail beyond `bytes` filled with zeros ----

NLORA_OP void cp_async(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}

NLORA_OP void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
NLORA_OP void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace nlora::cuda

#endif
