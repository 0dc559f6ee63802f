// The last step of a narrow gradient: its fp32 slices are added in order and go through the core.
#pragma once

#include <algorithm>
#include <utility>

#include "context.cuh"
#include "gradient.h"
#include "group.cuh"
#include "strided.cuh"

namespace nlora::cuda {

// A block adds up some rows of the slices, which lie one after another, into shared memory, and makes its part of out
// from there.
struct FinishTile : StridedTile {
  static constexpr uint32_t kSumsAt = StridedTile::kSharedBytes;

  NLORA_FN static constexpr uint32_t shared_bytes(uint32_t w) { return kSumsAt + kRows * w * 4; }
  __device__ static uint32_t sum_at(uint32_t element) { return shared_base() + kSumsAt + element * 4; }

  // Of out (n, w) by one block. A product with the core wants all rows of a tile, and so do many rows; few rows with
  // many slices are divided until each thread adds 4 elements.
  NLORA_FN static constexpr uint32_t rows(uint32_t n, uint32_t w, bool core) {
    const uint32_t few = 4 * kThreads / w;
    return core || n >= 4096 || few >= kRows ? kRows : few ? few : 1;
  }

  // The first `count` elements from `slices` on, of slices that are `apart`. A thread loads 16 bytes 16 times before
  // it adds: Batch times from each slice.
  template <uint32_t Batch>
  __device__ __forceinline__ static void add_up(const float* slices, uint32_t splits, size_t apart, uint32_t count) {
    constexpr uint32_t kAhead = 16 / Batch;
    for (uint32_t first = thread_rank() * 4; first < count; first += kThreads * 4 * Batch) {
      Float4 total[Batch] = {};
      for (uint32_t slice = 0; slice < splits; slice += kAhead) {
        Float4 parts[kAhead][Batch] = {};
#pragma unroll
        for (uint32_t s = 0; s < kAhead; ++s) {
#pragma unroll
          for (uint32_t i = 0; i < Batch; ++i) {
            const uint32_t at = first + i * kThreads * 4;
            if (slice + s < splits && at < count) {
              parts[s][i] = ld_global(reinterpret_cast<const Float4*>(slices + (slice + s) * apart + at));
            }
          }
        }
#pragma unroll
        for (uint32_t s = 0; s < kAhead; ++s) {
#pragma unroll
          for (uint32_t i = 0; i < Batch; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              total[i].v[j] += parts[s][i].v[j];
            }
          }
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < Batch; ++i) {
        if (first + i * kThreads * 4 < count) {
          st_shared(sum_at(first + i * kThreads * 4), total[i]);
        }
      }
    }
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) finish_kernel(const __grid_constant__ Group<Finish> group) {
  grid_wait();
  uint32_t block;
  const Finish& problem = group.of_block(block);
  const Matrix &core = problem.core, &out = problem.out;
  const uint32_t n = uint32_t(out.rows), w = uint32_t(out.cols), most = Tile::rows(n, w, core.data);
  const uint32_t row0 = block * most, rows = n - row0 < most ? n - row0 : most;
  const float* slices = static_cast<const float*>(problem.slices.data) + size_t(row0) * w;
  if (rows * w > 4 * Tile::kThreads) {
    Tile::template add_up<4>(slices, problem.splits, size_t(n) * w, rows * w);
  } else {
    Tile::template add_up<1>(slices, problem.splits, size_t(n) * w, rows * w);
  }
  sync_threads();
  const auto sum = [&](uint32_t row, uint32_t column) {
    return row < rows && column < w ? ld_shared<float>(Tile::sum_at(row * w + column)) : 0.0f;
  };
  for (uint32_t column0 = 0; column0 < w; column0 += Tile::kColumns) {
    Tile tile;
    if (core.data) {
      if (has_wide_rows(core)) {
        with_wide_rows(core, [&](auto N) {
          tile.template multiply<Lie::Across>(w, single_elements(sum),
                                              [&](uint32_t column, uint32_t k) { return N(column0 + column, k); });
        });
      } else {
        tile.template multiply<Lie::Across>(w, single_elements(sum), single_elements([&](uint32_t column, uint32_t k) {
                                              return column0 + column < w && k < w ? element(core, column0 + column, k)
                                                                                   : 0.0f;
                                            }));
      }
    } else {
      tile.copy([&](uint32_t row, uint32_t column) { return sum(row, column0 + column); });
    }
    tile.store(runs_down(out), [&](uint32_t row, uint32_t column, float value) {
      if (row < rows && column0 + column < w) {
        set_element(out, row0 + row, column0 + column, problem.scaling * value);
      }
    });
  }
}

// One launch for up to kMostInGroup gradients of up to 256 columns: see Finish.
template <class Context>
void launch_finishes(Context& context, const Finish* finishes, uint32_t count) {
  check_group(count);
  Group<Finish> group;
  uint32_t widest = 0;
  for (uint32_t i = 0; i < count; ++i) {
    Finish finish = finishes[i];
    if (finish.transposed) {
      std::swap(finish.out.rows, finish.out.cols);
      std::swap(finish.out.row_stride, finish.out.col_stride);
    }
    const uint32_t n = uint32_t(finish.out.rows), w = uint32_t(finish.out.cols);
    widest = std::max(widest, w);
    group.add(finish, ceil_div(n, FinishTile::rows(n, w, bool(finish.core))));
  }
  context.launch({group.total(), FinishTile::kThreads, 1, FinishTile::shared_bytes(widest), 128, true},
                 &finish_kernel<FinishTile>, group);
}

}  // namespace nlora::cuda
