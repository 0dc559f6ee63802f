// Products of the layer with mma.sync, ldmatrix and cp.async: for sm_80, sm_86 and sm_89.
//
// One kernel, with either operand lying either way: forward reads both along K, dx reads W along N, and the narrow
// gradients read both across the rows that they add up. The adapter follows the sum over K in the same pipeline and
// the same accumulators.
#pragma once

#include "../common/group.cuh"
#include "../common/layer.cuh"
#include "../common/schedule.h"
#include "../common/slice.cuh"
#include "../common/splits.h"

namespace nlora::cuda::sm80 {

// 4 warps, 2 × 2 of them, multiply BLOCK_M × BLOCK_N in steps of 32 along K. More warps with smaller parts would read
// shared memory oftener than it can answer: at 64 × 64 a warp, reads and copies take three quarters of its bandwidth.
template <int BLOCK_M, int BLOCK_N, int Stages>
struct AmpereTile {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kBlockK = AmpereSplits::kRows;
  static constexpr int kStages = Stages, kThreads = 128;
  // With two blocks a processor, one multiplies while the other waits.
  static constexpr int kResident = AmpereSplits::kResident, kRegisters = 255;
  static constexpr int kWarpM = BLOCK_M / 2, kWarpN = BLOCK_N / 2;
  static constexpr uint32_t kBytesA = BLOCK_M * kBlockK * 2, kBytesB = BLOCK_N * kBlockK * 2;
  static constexpr uint32_t kBytesStage = kBytesA + kBytesB;
  static constexpr uint32_t kSharedBytes = Stages * kBytesStage;

  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && BLOCK_M % 64 == 0 && BLOCK_N % 64 == 0);
  static_assert(BLOCK_M * BLOCK_N * 2 <= kSharedBytes, "the result leaves through the slots");
  // sm_86 and sm_89 have 100 KiB a processor, of which the system takes one for each block.
  static_assert(kResident * (kSharedBytes + kSharedAlignment + 1024) <= 100 * 1024);
};

using AmpereLarge = AmpereTile<128, 128, 3>;
using AmpereSmall = AmpereTile<64, 64, 4>;

// Shared address of element (row, column) of a tile of `rows`, held in panels of 64 columns.
__device__ __forceinline__ uint32_t panel_at(uint32_t base, uint32_t rows, uint32_t row, uint32_t column) {
  return swizzled(base + column / 64 * rows * 128 + row * 128 + column % 64 * 2, Swizzle::B128);
}

// One sum over k: of a (m, depth) and b (n, depth), each lying either way.
struct AmpereSum {
  const uint16_t *a, *b;
  int64_t a_stride, b_stride;
  uint32_t depth;
};

struct AmpereProblem {
  AmpereSum sums[2 * kMostProducts];   // of every product the base and the adapter; none is empty
  uint32_t count;                      // of sums
  uint32_t m, n;
  void* c;                 // 16-bit rows of c_stride; for a gradient fp32 slices (splits·m, n)
  const uint16_t* bias;    // (n) or null
  int64_t c_stride;
  uint32_t splits;         // of the sum over k
};

// A tile of Rows × 32 of an operand; `row` counts along M or N, whichever way the operand lies in memory. Slots are
// aligned to 1024 bytes, so a place in one is its address plus the swizzled offset.
template <class Tile, int Rows, Major major>
struct AmpereOperand {
  static constexpr bool kAlongK = major == Major::K;

  __device__ __forceinline__ static uint32_t at(uint32_t row, uint32_t k) {
    return kAlongK ? swizzled(row * (Tile::kBlockK * 2) + k * 2, Swizzle::B64) : panel_at(0, Tile::kBlockK, k, row);
  }

  // What this thread copies of every step: 16 bytes at (row, k), and as many again kApart further on.
  static constexpr int kCopies = Rows * Tile::kBlockK / 8 / Tile::kThreads;
  static constexpr uint32_t kApart = Tile::kThreads / (kAlongK ? Tile::kBlockK / 8 : Rows / 8);

  __device__ __forceinline__ static uint32_t copied_row() {
    return kAlongK ? thread_rank() / (Tile::kBlockK / 8) : thread_rank() % (Rows / 8) * 8;
  }
  __device__ __forceinline__ static uint32_t copied_k() {
    return kAlongK ? thread_rank() % (Tile::kBlockK / 8) * 8 : thread_rank() / (Rows / 8);
  }

  const uint16_t* next;   // this thread's first element of the step
  int64_t stride;
  int32_t rows_left, k_left;   // from there to the ends

  __device__ __forceinline__ void begin(const uint16_t* data, int64_t row_stride, uint32_t row0, uint32_t row_end,
                                        uint32_t k0, uint32_t k_end) {
    const uint32_t row = row0 + copied_row(), k = k0 + copied_k();
    stride = row_stride;
    next = data + (kAlongK ? row * stride + k : k * stride + row);
    rows_left = int32_t(row_end - row);
    k_left = int32_t(k_end - k);
  }

  // Copies one step to a slot; what lies beyond the ends becomes 0.
  __device__ __forceinline__ void load(uint32_t slot) {
    const uint32_t to = slot + at(copied_row(), copied_k());
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int32_t along = i * kApart;
      const bool inside = kAlongK ? rows_left > along && k_left > 0 : rows_left > 0 && k_left > along;
      // NOTE: rows that are kApart apart, along either side, are swizzled alike.
      cp_async(to + along * (kAlongK ? Tile::kBlockK * 2 : 128), next + along * stride, inside ? 16 : 0);
    }
    next += kAlongK ? Tile::kBlockK : Tile::kBlockK * stride;
    k_left -= Tile::kBlockK;
  }

  // Where this lane reads in the fragments from `row` on. mma takes the 8 × 8 quarters of 16 × 16 in order of rows
  // first for A, and of k first, 8 rows after 8 rows, for B.
  __device__ __forceinline__ static uint32_t lane_at(uint32_t row, bool rows_first) {
    const uint32_t lane = lane_rank();
    const uint32_t second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    row += rows_first ? second : third;
    const uint32_t k = rows_first ? third : second;
    return kAlongK ? at(row + lane % 8, k) : at(row, k + lane % 8);
  }

  // The i-th fragment of 16 × 16 from lane_at's row on; `lane` is that plus the slot's address.
  __device__ __forceinline__ static void fragment(uint32_t (&r)[4], uint32_t lane, uint32_t i, uint32_t k) {
    if constexpr (kAlongK) {
      ldmatrix(r, (lane ^ k * 2) + i * (16 * Tile::kBlockK * 2));
    } else {
      ldmatrix<true>(r, (lane ^ i * 32) + k * 128);
    }
  }
};

template <class T>
struct alignas(4) Pair16 {
  T low, high;
};

struct alignas(16) Chunk {
  uint32_t words[4];
};

template <class Tile, class T, Major MajorA, Major MajorB>
struct AmpereKernel {
  using A = AmpereOperand<Tile, Tile::kBlockM, MajorA>;
  using B = AmpereOperand<Tile, Tile::kBlockN, MajorB>;
  // Without adapter, into slices.
  static constexpr bool kGradient = MajorA == Major::MN;
  static constexpr int kFragmentsM = Tile::kWarpM / 16, kFragmentsN = Tile::kWarpN / 16;
  using Accumulators = float[kFragmentsM][2 * kFragmentsN][4];

  const AmpereProblem& problem;
  uint32_t base;
  uint32_t m, n;             // first row and column of the block's tile
  uint32_t warp_m, warp_n;   // of the warp's part in it

  __device__ __forceinline__ uint32_t slot_a(uint32_t slot) const { return base + slot * Tile::kBytesStage; }
  __device__ __forceinline__ uint32_t slot_b(uint32_t slot) const { return slot_a(slot) + Tile::kBytesA; }

  __device__ __forceinline__ void begin(A& a, B& b, const AmpereSum& sum, uint32_t k) const {
    a.begin(sum.a, sum.a_stride, m, problem.m, k, sum.depth);
    b.begin(sum.b, sum.b_stride, n, problem.n, k, sum.depth);
  }

  __device__ __forceinline__ void multiply(Accumulators& acc, uint32_t lane_a, uint32_t lane_b) const {
#pragma unroll
    for (int k = 0; k < Tile::kBlockK; k += 16) {
      uint32_t a[kFragmentsM][4], b[kFragmentsN][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        A::fragment(a[i], lane_a, i, k);
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
        B::fragment(b[j], lane_b, j, k);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kFragmentsN; ++j) {
          const uint32_t right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<T>(acc[i][j], a[i], right);
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t steps_of(uint32_t sum) const {
    return ceil_div(problem.sums[sum].depth, Tile::kBlockK);
  }

  // acc += the steps [first, last) of the first sum and, but for a gradient, of those that follow it.
  __device__ __forceinline__ void accumulate(Accumulators& acc, uint32_t first, uint32_t last) const {
    A a;
    B b;
    begin(a, b, problem.sums[0], first * Tile::kBlockK);
    uint32_t loaded = first, sum = 0, sum_end = kGradient ? last : steps_of(0);
    auto go_on = [&] {
      if (!kGradient && loaded == sum_end && loaded < last) {
        begin(a, b, problem.sums[++sum], 0);
        sum_end += steps_of(sum);
      }
    };
    auto load = [&](uint32_t slot) {
      a.load(slot_a(slot));
      b.load(slot_b(slot));
      ++loaded;
    };
    for (uint32_t slot = 0; slot < Tile::kStages - 1; ++slot) {
      go_on();
      if (loaded < last) {
        load(slot);
      }
      cp_async_commit();
    }
    const uint32_t lane_a = slot_a(0) + A::lane_at(warp_m, true), lane_b = slot_b(0) + B::lane_at(warp_n, false);
    uint32_t slot = 0, refilled = Tile::kStages - 1;
    auto step = [&](auto load) {
      cp_async_wait<Tile::kStages - 2>();
      // This step's copies of all threads have landed, and all have read the slot that is filled next.
      sync_threads();
      load(refilled);
      cp_async_commit();
      multiply(acc, lane_a + slot * Tile::kBytesStage, lane_b + slot * Tile::kBytesStage);
      refilled = slot;
      slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    };
    uint32_t steps = last - first;
    while (loaded < last) {
      go_on();
      for (; loaded < sum_end; --steps) {
        step(load);
      }
    }
    for (; steps > 0; --steps) {
      step([](uint32_t) {});
    }
  }

  // visit(row, column, low, high) for each pair of neighbours, counted in the block's tile.
  template <class Visit>
  __device__ __forceinline__ void for_each_pair(const Accumulators& acc, Visit visit) const {
    const uint32_t lane = lane_rank();
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 2 * kFragmentsN; ++j) {
          visit(warp_m + i * 16 + half * 8 + lane / 4, warp_n + j * 8 + lane % 4 * 2, acc[i][j][2 * half],
                acc[i][j][2 * half + 1]);
        }
      }
    }
  }

  // acc + bias, rounded, through shared memory: rows leave in pieces of 128 bytes.
  __device__ __forceinline__ void store_rounded(Accumulators& acc) const {
#pragma unroll
    for (int j = 0; j < 2 * kFragmentsN; ++j) {
      const uint32_t column = n + warp_n + j * 8 + lane_rank() % 4 * 2;
      if (problem.bias && column < problem.n) {
        const auto pair = ld_global(reinterpret_cast<const Pair16<T>*>(problem.bias + column));
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          acc[i][j][0] += to_float(pair.low);
          acc[i][j][1] += to_float(pair.high);
          acc[i][j][2] += to_float(pair.low);
          acc[i][j][3] += to_float(pair.high);
        }
      }
    }
    sync_threads();
    for_each_pair(acc, [&](uint32_t row, uint32_t column, float low, float high) {
      st_shared(panel_at(base, Tile::kBlockM, row, column), pack2<T>(low, high));
    });
    sync_threads();
#pragma unroll 4
    for (uint32_t i = thread_rank(); i < Tile::kBlockM * Tile::kBlockN / 8; i += Tile::kThreads) {
      const uint32_t row = i / (Tile::kBlockN / 8), column = i % (Tile::kBlockN / 8) * 8;
      if (m + row < problem.m && n + column < problem.n) {
        T* to = static_cast<T*>(problem.c) + (m + row) * problem.c_stride + n + column;
        st_global(reinterpret_cast<Chunk*>(to), ld_shared<Chunk>(panel_at(base, Tile::kBlockM, row, column)));
      }
    }
  }

  __device__ __forceinline__ void store_slice(const Accumulators& acc, uint32_t split) const {
    float* slice = static_cast<float*>(problem.c) + int64_t(split) * problem.m * problem.n;
    for_each_pair(acc, [&](uint32_t row, uint32_t column, float low, float high) {
      store_pair(slice, problem.m, problem.n, m + row, n + column, low, high);
    });
  }
};

// c = Σ a·bᵀ + bias; or, where a lies across K, one slice of it in fp32.
template <class Tile, class T, Major MajorA, Major MajorB>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    ampere_kernel(const __grid_constant__ Group<AmpereProblem> group) {
  using Kernel = AmpereKernel<Tile, T, MajorA, MajorB>;
  uint32_t block;
  const AmpereProblem& problem = group.of_block(block);
  const Schedule schedule(problem.m, problem.n, 0, Tile::kBlockM, Tile::kBlockN);
  const uint32_t split = Kernel::kGradient ? block / schedule.count() : 0;
  const auto place = schedule.at(block - split * schedule.count());
  const uint32_t warp = warp_rank();
  const Kernel kernel{problem, shared_base(), place.m, place.n, warp / 2 * Tile::kWarpM, warp % 2 * Tile::kWarpN};

  typename Kernel::Accumulators acc = {};
  if constexpr (Kernel::kGradient) {
    const uint32_t steps = kernel.steps_of(0);
    kernel.accumulate(acc, first_step(split, problem.splits, steps), first_step(split + 1, problem.splits, steps));
    kernel.store_slice(acc, split);
  } else {
    uint32_t steps = 0;
    for (uint32_t sum = 0; sum < problem.count; ++sum) {
      steps += kernel.steps_of(sum);
    }
    kernel.accumulate(acc, 0, steps);
    kernel.store_rounded(acc);
  }
}

}  // namespace nlora::cuda::sm80
