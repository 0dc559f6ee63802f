// Narrow gradients on sm_90a: Σ over the rows of wideᵀ·narrow, one fp32 slice for each share of the rows.
//
// A block takes 128 columns of wide, all of narrow and one share of the rows: a warp loads with TMA, two warpgroups
// multiply 64 columns each. wgmma reads both operands across the rows, as they are stored. It is bound by reading wide,
// so the slots hold as many bytes as shared memory does, and the narrow matrices of one wide are taken together.
#pragma once

#include <algorithm>

#include "../common/context.cuh"
#include "../common/gradient.h"
#include "../common/group.cuh"
#include "../common/slice.cuh"
#include "../common/splits.h"
#include "tile.cuh"

namespace nlora::cuda::sm90 {

// For narrow of up to Width columns, 64 of a matrix at a time.
template <int Width>
struct GradientTile {
  static constexpr uint32_t kWide = GradientSplits::kWide, kNarrow = Width, kRows = GradientSplits::kRows;
  static constexpr uint32_t kBoxes = Width / 64;
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

template <class Tile>
struct GradientProblem {
  // Boxes of 64 × 64. Of narrow each is that of the matrix with these slices, (splits·n, w), from column `first` on.
  TensorMap wide, narrow[Tile::kBoxes];
  float* slices[Tile::kBoxes];
  uint32_t first[Tile::kBoxes], w[Tile::kBoxes];
  uint32_t n, steps, splits;
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
__device__ __forceinline__ void load_rows(const GradientShared<Tile> shared, const GradientProblem<Tile>& problem,
                                          uint32_t column, uint32_t first, uint32_t last) {
  RingPosition<Tile::kStages> ring;
  for (uint32_t step = first; step < last; ++step) {
    const uint32_t full = shared.full(ring.slot), row = step * Tile::kRows;
    mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
    mbarrier_arrive_expect_tx(full, Tile::kBytesStage);
    for (uint32_t box = 0; box < Tile::kWide / 64; ++box) {
      tma_load(shared.wide(ring.slot) + box * Tile::kBytesBox, &problem.wide, full, column + box * 64, row);
    }
    for (uint32_t box = 0; box < Tile::kBoxes; ++box) {
      tma_load(shared.narrow(ring.slot) + box * Tile::kBytesBox, &problem.narrow[box], full, problem.first[box], row);
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
    gradient_kernel(const __grid_constant__ Group<GradientProblem<Tile>> group) {
  uint32_t block;
  const GradientProblem<Tile>& problem = group.of_block(block);
  const GradientShared<Tile> shared{shared_base()};
  const uint32_t warp = warp_rank();
  const bool leader = elect_one();
  const uint32_t tiles = ceil_div(problem.n, Tile::kWide);
  const uint32_t split = block / tiles, column = block % tiles * Tile::kWide;
  const uint32_t first = first_step(split, problem.splits, problem.steps);
  const uint32_t last = first_step(split + 1, problem.splits, problem.steps);

  if (warp == 0 && leader) {
    prefetch_tensor_map(&problem.wide);
    for (uint32_t box = 0; box < Tile::kBoxes; ++box) {
      prefetch_tensor_map(&problem.narrow[box]);
    }
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
#pragma unroll
    for (uint32_t box = 0; box < Tile::kBoxes; ++box) {
      const uint32_t w = problem.w[box];
      float* slice = problem.slices[box] + size_t(split) * problem.n * w;
#pragma unroll
      for (uint32_t i = 0; i < 32; i += 2) {
        store_pair(slice, problem.n, w, column + accumulator_row(warp, lane_rank(), i),
                   problem.first[box] + accumulator_column(lane_rank(), i), acc[box * 32 + i], acc[box * 32 + i + 1]);
      }
    }
  }
}

// How many gradients from the first on one block makes: those of the same wide and splits, 256 columns of narrow in all.
inline uint32_t made_together(const Gradient* gradients, uint32_t count, uint32_t& columns) {
  uint32_t together = 0;
  columns = 0;
  for (const Matrix& wide = gradients->wide; together < count; ++together) {
    const Gradient& next = gradients[together];
    const uint32_t filled = filled_up(uint32_t(next.narrow.cols), 64);
    const bool same = next.wide.data == wide.data && next.wide.row_stride == wide.row_stride &&
                      next.wide.cols == wide.cols && next.splits == gradients->splits;
    if (together && (!same || columns + filled > 256)) {
      break;
    }
    columns += filled;
  }
  return together;
}

template <class Tile>
GradientProblem<Tile> gradient_problem(const Gradient* gradients, uint32_t count) {
  const auto map = [](const Matrix& matrix) {
    return tensor_map(matrix.data, matrix.rows, matrix.cols, matrix.row_stride * 2, Tile::kRows, 64, Swizzle::B128);
  };
  GradientProblem<Tile> problem;
  problem.wide = map(gradients->wide);
  problem.n = uint32_t(gradients->wide.cols);
  problem.steps = ceil_div(uint32_t(gradients->wide.rows), Tile::kRows);
  problem.splits = gradients->splits;
  uint32_t box = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const Gradient& gradient = gradients[i];
    check_splits(gradient, Tile::kRows);
    const uint32_t w = uint32_t(gradient.narrow.cols);
    // What is left after the last has nothing but zeros, which nobody stores.
    for (uint32_t first = 0; box < Tile::kBoxes && (first < w || i == count - 1); first += 64, ++box) {
      problem.narrow[box] = map(gradient.narrow);
      problem.slices[box] = static_cast<float*>(gradient.slices.data);
      problem.first[box] = first;
      problem.w[box] = w;
    }
  }
  return problem;
}

// Of the gradients those that are made by blocks of this tile, if there are any.
template <class Tile, class Context>
void launch_gradients_of(Context& context, const Gradient* gradients, uint32_t count) {
  Group<GradientProblem<Tile>> group;
  for (uint32_t i = 0, together, columns; i < count; i += together) {
    together = made_together(gradients + i, count - i, columns);
    if (columns <= Tile::kNarrow && (Tile::kNarrow == 64 || columns > Tile::kNarrow / 2)) {
      const auto problem = gradient_problem<Tile>(gradients + i, together);
      group.add(problem, ceil_div(problem.n, Tile::kWide) * problem.splits);
    }
  }
  if (group.count) {
    const auto kernel =
        gradients->wide.dtype == Dtype::kBFloat16 ? &gradient_kernel<Tile, bf16> : &gradient_kernel<Tile, fp16>;
    context.launch({group.total(), Tile::kThreads, 1, Tile::kSharedBytes, Tile::kRegisters, true}, kernel, group);
  }
}

// Up to kMostInGroup gradients of one dtype, narrow of up to 256 columns, in a launch for each width of tile: see
// Gradient.
template <class Context>
void launch_gradients(Context& context, const Gradient* gradients, uint32_t count) {
  check_group(count);
  for (uint32_t i = 0; i < count; ++i) {
    if (gradients[i].narrow.cols > 256) {
      throw std::invalid_argument("narrow must have at most 256 columns, got " +
                                  std::to_string(gradients[i].narrow.cols));
    }
  }
  launch_gradients_of<GradientTile<256>>(context, gradients, count);
  launch_gradients_of<GradientTile<128>>(context, gradients, count);
  launch_gradients_of<GradientTile<64>>(context, gradients, count);
}

}  // namespace nlora::cuda::sm90
