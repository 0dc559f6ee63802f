// F = s·B·N, and casts: the adapter that the products of the layer see, made from whatever A, B and N are stored as.
#pragma once

#include "context.cuh"
#include "gradient.h"
#include "group.cuh"
#include "strided.cuh"

namespace nlora::cuda {

// out = s·B·N by one tile, for matrices in any strides.
template <class Tile>
__device__ __forceinline__ void fold_elements(const Fold& problem, uint32_t row0, uint32_t column0) {
  const Matrix &B = problem.B, &core = problem.core, &out = problem.out;
  const uint32_t n = uint32_t(B.rows), r = uint32_t(B.cols);
  const auto left = [&](uint32_t row, uint32_t k) {
    return row0 + row < n && k < r ? element(B, row0 + row, k) : 0.0f;
  };
  Tile tile;
  if (core.data) {
    tile.multiply(r, single_elements(left), single_elements([&](uint32_t k, uint32_t column) {
                    return k < r && column0 + column < r ? element(core, k, column0 + column) : 0.0f;
                  }));
  } else {
    tile.copy([&](uint32_t row, uint32_t column) { return left(row, column0 + column); });
  }
  tile.store(runs_down(out), [&](uint32_t row, uint32_t column, float value) {
    row += row0;
    column += column0;
    if (row < n && column < r) {
      set_element(out, row, column, problem.scaling * value);
      if (out.cols > B.cols) {
        set_element(out, row, r + column, element(B, row, column));
      }
    }
  });
}

// The same where B and the core have wide rows, of dtypes that the compiler knows.
template <class Tile, class Left>
__device__ __forceinline__ void fold_rows(const Fold& problem, uint32_t row0, uint32_t column0, Left B) {
  const Matrix &core = problem.core, &out = problem.out;
  const bool wide = has_wide_rows(out);
  if (core.data) {
    Tile tile;
    with_wide_rows(core, [&](auto N) {
      tile.multiply(
          B.columns, [&](uint32_t row, uint32_t k) { return B(row0 + row, k); },
          [&](uint32_t k, uint32_t column) { return N(k, column0 + column); });
    });
    tile.store_eights([&](uint32_t row, uint32_t column, Eight eight) {
      if (row0 + row < B.rows && column0 + column < B.columns) {
        set_eight(out, wide, row0 + row, column0 + column, times(problem.scaling, eight));
      }
    });
  }
  if (core.data && out.cols == B.columns) {
    return;
  }
  Eight eights[Tile::kEights];
  uint32_t i = 0;
  Tile::for_eights([&](uint32_t row, uint32_t column) { eights[i++] = B(row0 + row, column0 + column); });
  i = 0;
  Tile::for_eights([&](uint32_t row, uint32_t column) {
    row += row0;
    column += column0;
    if (row < B.rows && column < B.columns) {
      if (!core.data) {
        set_eight(out, wide, row, column, times(problem.scaling, eights[i]));
      }
      if (out.cols > B.columns) {
        set_eight(out, wide, row, B.columns + column, eights[i]);
      }
    }
    ++i;
  });
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) fold_kernel(const __grid_constant__ Group<Fold> group) {
  grid_launch_dependents();
  uint32_t block;
  const Fold& problem = group.of_block(block);
  const StridedGrid grid(problem.B.cols);
  const uint32_t row0 = grid.row(block), column0 = grid.column(block);
  if (has_wide_rows(problem.B) && (!problem.core.data || has_wide_rows(problem.core))) {
    with_wide_rows(problem.B, [&](auto B) { fold_rows<Tile>(problem, row0, column0, B); });
  } else {
    fold_elements<Tile>(problem, row0, column0);
  }
}

// One launch for up to kMostInGroup of them: see Fold.
template <class Context>
void launch_folds(Context& context, const Fold* folds, uint32_t count) {
  check_group(count);
  Group<Fold> group;
  for (uint32_t i = 0; i < count; ++i) {
    group.add(folds[i], StridedGrid::blocks(folds[i].B.rows, folds[i].B.cols));
  }
  launch_strided(context, group.total(), &fold_kernel<StridedTile>, group);
}

}  // namespace nlora::cuda
