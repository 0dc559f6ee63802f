// Narrow gradients on sm_90a: Σ over the rows of wideᵀ·narrow, one fp32 slice for each share of the rows.
//
// A block takes 128 columns of wide, all of narrow and one share of the rows: a warp loads with TMA, two warpgroups
// multiply 64 columns each. wgmma reads both operands across the rows, as they are stored. It is bound by reading wide,
// so the slots hold as many bytes as shared memory does.
#pragma once

#include <algorithm>

#include "../common/context.cuh"
#include "../common/gradient.h"
#include "../common/group.cuh"
#include "../common/slice.cuh"
#include "../common/splits.h"
#include "tile.cuh"

namespace nlora::cuda::sm90 {

// For narrow of up to Width columns.
template <int Width>
struct GradientTile {
  static constexpr uint32_t kWide = GradientSplits::kWide, kNarrow = Width, kRows = GradientSplits::kRows;
  // The two warpgroups that multiply come first, for warpgroups are aligned.
  static constexpr int kConsumerWarps = 8, kThreads = 32 * (kConsumerWarps + 1), kRegisters = 224;
  // One box is 64 × 64.
  static constexpr uint32_t kBytesBox = 64 * kRows * 2;
  static constexpr uint32_t kBytesWide = kWide / 64 * kBytesBox, kBytesNarrow = Width / 64 * kBytesBox;
  static constexpr uint32_t kBytesStage = kBytesWide + kBytesNarrow;
  static constexpr uint32_t kStagesAt = 1024;
  static constexpr int kStages = 192 * 1024 / kBytesStage;
  static constexpr uint32_t kSharedBytes = kStagesAt + kStages * kBytesStage;

  static_assert(Width % 64 == 0 && Width <= 256, "whole boxes, one wgmma wide");
  static_assert(kSharedBytes + kSharedAlignment <= 227 * 1024, "more shared memory than a block can have");
};

struct GradientProblem {
  TensorMap wide, narrow;  // boxes of 64 × 64
  float* slices;
  uint32_t n, w, steps, splits;
};

template <class Tile>
struct GradientShared {
  uint32_t base;

  __device__ uint32_t full(uint32_t stage) const { return base + 16 * stage; }
  __device__ uint32_t empty(uint32_t stage) const { return base + 16 * (Tile::kStages + stage); }
  __device__ uint32_t wide(uint32_t stage) const { return base + Tile::kStagesAt + stage * Tile::kBytesStage; }
  __device__ uint32_t narrow(uint32_t stage) const { return wide(stage) + Tile::kBytesWide; }
};

template <class Tile>
__device__ __forceinline__ void load_rows(const GradientShared<Tile> shared, const GradientProblem& problem,
                                          uint32_t column, uint32_t first, uint32_t last) {
  RingPosition<Tile::kStages> ring;
  for (uint32_t step = first; step < last; ++step) {
    const uint32_t full = shared.full(ring.slot), row = step * Tile::kRows;
    mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
    mbarrier_arrive_expect_tx(full, Tile::kBytesStage);
    for (uint32_t box = 0; box < Tile::kWide / 64; ++box) {
      tma_load(shared.wide(ring.slot) + box * Tile::kBytesBox, &problem.wide, full, column + box * 64, row);
    }
    for (uint32_t box = 0; box < Tile::kNarrow / 64; ++box) {
      tma_load(shared.narrow(ring.slot) + box * Tile::kBytesBox, &problem.narrow, full, box * 64, row);
    }
    ring.advance();
  }
}

// acc = wideᵀ·narrow over the steps, for the 64 columns of wide of this warpgroup.
template <class Tile, class T>
__device__ __forceinline__ void multiply_rows(float (&acc)[Tile::kNarrow / 2], const GradientShared<Tile> shared,
                                              uint32_t steps, uint32_t consumer, bool leader) {
  RingPosition<Tile::kStages> ring;
  uint32_t previous = 0;
  for (uint32_t step = 0; step < steps; ++step) {
    mbarrier_wait(shared.full(ring.slot), ring.parity);
    const uint64_t a = mn_major_descriptor(shared.wide(ring.slot) + consumer * Tile::kBytesBox, Tile::kRows);
    const uint64_t b = mn_major_descriptor(shared.narrow(ring.slot), Tile::kRows);
    wgmma_fence(acc);
#pragma unroll
    for (uint32_t k = 0; k < Tile::kRows; k += 16) {
      wgmma<Tile::kNarrow, T, Major::MN, Major::MN>(acc, advanced(a, k * 128), advanced(b, k * 128), step + k > 0);
    }
    wgmma_commit();
    if (step > 0) {
      // One group stays in flight while the slot of the one before it is refilled.
      wgmma_wait<1>(acc);
      if (leader) {
        mbarrier_arrive(shared.empty(previous));
      }
      sync_warp();
    }
    previous = ring.slot;
    ring.advance();
  }
  // Nothing refills the last slot.
  wgmma_wait<0>(acc);
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gradient_kernel(const __grid_constant__ Group<GradientProblem> group) {
  uint32_t block;
  const GradientProblem& problem = group.of_block(block);
  const GradientShared<Tile> shared{shared_base()};
  const uint32_t warp = warp_rank();
  const bool leader = elect_one();
  const uint32_t tiles = ceil_div(problem.n, Tile::kWide);
  const uint32_t split = block / tiles, column = block % tiles * Tile::kWide;
  const uint32_t first = first_step(split, problem.splits, problem.steps);
  const uint32_t last = first_step(split + 1, problem.splits, problem.steps);

  if (warp == 0 && leader) {
    prefetch_tensor_map(&problem.wide);
    prefetch_tensor_map(&problem.narrow);
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), Tile::kConsumerWarps);
    }
    fence_barrier_init();
  }
  sync_threads();

  if (warp == Tile::kConsumerWarps) {
    if (leader) {
      grid_wait();
      load_rows(shared, problem, column, first, last);
      grid_launch_dependents();
    }
  } else {
    float acc[Tile::kNarrow / 2];
    multiply_rows<Tile, T>(acc, shared, last - first, warp / 4, leader);
    float* slice = problem.slices + size_t(split) * problem.n * problem.w;
#pragma unroll
    for (uint32_t i = 0; i < Tile::kNarrow / 2; i += 2) {
      store_pair(slice, problem.n, problem.w, column + accumulator_row(warp, lane_rank(), i),
                 accumulator_column(lane_rank(), i), acc[i], acc[i + 1]);
    }
  }
}

template <class Tile, class Context>
void launch_gradients_of(Context& context, const Gradient* gradients, uint32_t count) {
  auto map = [](const Matrix& matrix) {
    return tensor_map(matrix.data, matrix.rows, matrix.cols, matrix.row_stride * 2, Tile::kRows, 64, Swizzle::B128);
  };
  Group<GradientProblem> group;
  for (uint32_t i = 0; i < count; ++i) {
    const Gradient& gradient = gradients[i];
    check_splits(gradient, Tile::kRows);
    const uint32_t n = uint32_t(gradient.wide.cols), w = uint32_t(gradient.narrow.cols);
    const uint32_t steps = ceil_div(uint32_t(gradient.wide.rows), Tile::kRows);
    auto slices = static_cast<float*>(gradient.slices.data);
    group.add({map(gradient.wide), map(gradient.narrow), slices, n, w, steps, gradient.splits},
              ceil_div(n, Tile::kWide) * gradient.splits);
  }
  const auto kernel =
      gradients->wide.dtype == Dtype::kBFloat16 ? &gradient_kernel<Tile, bf16> : &gradient_kernel<Tile, fp16>;
  context.launch({group.total(), Tile::kThreads, 1, Tile::kSharedBytes, Tile::kRegisters, true}, kernel, group);
}

// One launch for 1 to 3 gradients of one dtype, narrow of up to 256 columns: see Gradient.
template <class Context>
void launch_gradients(Context& context, const Gradient* gradients, uint32_t count) {
  check_group(count);
  int64_t w = 0;
  for (uint32_t i = 0; i < count; ++i) {
    w = std::max(w, gradients[i].narrow.cols);
  }
  if (w <= 64) {
    launch_gradients_of<GradientTile<64>>(context, gradients, count);
  } else if (w <= 128) {
    launch_gradients_of<GradientTile<128>>(context, gradients, count);
  } else if (w <= 256) {
    launch_gradients_of<GradientTile<256>>(context, gradients, count);
  } else {
    throw std::invalid_argument("narrow must have at most 256 columns, got " + std::to_string(w));
  }
}

}  // namespace nlora::cuda::sm90
