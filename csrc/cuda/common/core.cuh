// The core of LoRA² and its gradients, one launch each.
//
// C = U·diag(Λ)·u         Λ = E ⊙ mask          u (r, k), E and mask (1, r), U (k, r), C (k, k)
// dU = dC·uᵀ·diag(Λ),  du = diag(Λ)·Uᵀ·dC,  dE = mask ⊙ diag(Uᵀ·dC·uᵀ)
#pragma once

#include "context.cuh"
#include "strided.cuh"

namespace nlora::cuda {

struct CoreProblem {
  Matrix u, E, U, mask;
  Matrix core;             // C, or dC
  Matrix du, dE, dU;       // of the gradients only

  __device__ float kept(uint32_t i) const { return mask.data ? element(mask, 0, i) : 1.0f; }
  __device__ float lambda(uint32_t i) const { return element(E, 0, i) * kept(i); }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) core_kernel(const __grid_constant__ CoreProblem problem) {
  const uint32_t r = uint32_t(problem.u.rows), k = uint32_t(problem.u.cols);
  const StridedGrid grid(k);
  const uint32_t row0 = grid.row(block_rank()), column0 = grid.column(block_rank());
  Tile tile;
  tile.multiply(r, single_elements([&](uint32_t row, uint32_t i) {
                  return row0 + row < k && i < r ? element(problem.U, row0 + row, i) * problem.lambda(i) : 0.0f;
                }),
                single_elements([&](uint32_t i, uint32_t column) {
                  return i < r && column0 + column < k ? element(problem.u, i, column0 + column) : 0.0f;
                }));
  tile.store(false, [&](uint32_t row, uint32_t column, float value) {
    if (row0 + row < k && column0 + column < k) {
      set_element(problem.core, row0 + row, column0 + column, value);
    }
  });
}

// One tile of du (r, k).
__device__ __forceinline__ void gradient_of_u(const CoreProblem& problem, uint32_t row0, uint32_t column0) {
  const uint32_t r = uint32_t(problem.u.rows), k = uint32_t(problem.u.cols);
  StridedTile tile;
  tile.multiply(k, single_elements([&](uint32_t row, uint32_t a) {
                  return row0 + row < r && a < k ? element(problem.U, a, row0 + row) : 0.0f;
                }),
                single_elements([&](uint32_t a, uint32_t column) {
                  return a < k && column0 + column < k ? element(problem.core, a, column0 + column) : 0.0f;
                }));
  tile.store(false, [&](uint32_t row, uint32_t column, float value) {
    if (row0 + row < r && column0 + column < k) {
      set_element(problem.du, row0 + row, column0 + column, problem.lambda(row0 + row) * value);
    }
  });
}

// Columns of dU (k, r) from column0 on, from top to bottom, and the dE that they add up to.
__device__ __forceinline__ void gradient_of_U_and_E(const CoreProblem& problem, uint32_t column0) {
  const uint32_t r = uint32_t(problem.u.rows), k = uint32_t(problem.u.cols);
  const uint32_t column = column0 + thread_rank() % StridedTile::kColumns;
  float dE = 0;
  for (uint32_t row0 = 0; row0 < k; row0 += StridedTile::kRows) {
    StridedTile tile;
    tile.multiply<Lie::Across>(k, single_elements([&](uint32_t row, uint32_t b) {
                                 return row0 + row < k && b < k ? element(problem.core, row0 + row, b) : 0.0f;
                               }),
                               single_elements([&](uint32_t i, uint32_t b) {
                                 return column0 + i < r && b < k ? element(problem.u, column0 + i, b) : 0.0f;
                               }));
    tile.store(false, [&](uint32_t row, uint32_t, float value) {
      if (row0 + row < k && column < r) {
        dE += element(problem.U, row0 + row, column) * value;
        set_element(problem.dU, row0 + row, column, problem.lambda(column) * value);
      }
    });
  }
  // Two threads have each column: they add in order.
  sync_threads();
  st_shared(shared_base() + thread_rank() * 4, dE);
  sync_threads();
  if (thread_rank() < StridedTile::kColumns && column < r) {
    dE += ld_shared<float>(shared_base() + (thread_rank() + StridedTile::kColumns) * 4);
    set_element(problem.dE, 0, column, problem.kept(column) * dE);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) core_backward_kernel(const __grid_constant__ CoreProblem problem) {
  const uint32_t stripes = ceil_div(uint32_t(problem.u.rows), Tile::kColumns);
  if (block_rank() < stripes) {
    gradient_of_U_and_E(problem, block_rank() * Tile::kColumns);
  } else {
    const StridedGrid grid(problem.u.cols);
    gradient_of_u(problem, grid.row(block_rank() - stripes), grid.column(block_rank() - stripes));
  }
}

// C = U·diag(E ⊙ mask)·u; mask may be none. Any dtypes and strides, sums in fp32.
template <class Context>
void launch_core(Context& context, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                 const Matrix& core) {
  launch_strided(context, StridedGrid::blocks(u.cols, u.cols), &core_kernel<StridedTile>,
                 CoreProblem{u, E, U, mask, core, {}, {}, {}});
}

// du, dE and dU from dC.
template <class Context>
void launch_core_backward(Context& context, const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U,
                          const Matrix& mask, const Matrix& du, const Matrix& dE, const Matrix& dU) {
  const uint32_t stripes = ceil_div(uint32_t(u.rows), StridedTile::kColumns);
  launch_strided(context, stripes + StridedGrid::blocks(u.rows, u.cols), &core_backward_kernel<StridedTile>,
                 CoreProblem{u, E, U, mask, dcore, du, dE, dU});
}

}  // namespace nlora::cuda
