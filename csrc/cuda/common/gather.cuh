// A = W[I, :],  N = W[I][:, J],  B = W[:, J], batched over layers of one shape. Elements are moved, so only their size
// counts.
#pragma once

#include "context.cuh"
#include "nystrom.h"

namespace nlora::cuda {

template <class T>
struct GatherProblem {
  const T* weight[kMaxLayers];
  const int64_t* rows[kMaxLayers];
  const int64_t* cols[kMaxLayers];
  T *A[kMaxLayers], *core[kMaxLayers], *B[kMaxLayers];   // contiguous
  int64_t row_stride, col_stride;                        // of W, in elements
  uint32_t out, in, r, blocks;                           // blocks of one layer
};

struct GatherTile {
  static constexpr uint32_t kThreads = 256, kColumns = 1024;
};

// to[0 … count) = from[at(0)], from[at(1)], …: a warp side by side.
template <class T, class At>
__device__ __forceinline__ void copy_row(const T* from, T* to, uint32_t count, At at) {
#pragma unroll 8
  for (uint32_t j = lane_rank(); j < count; j += 32) {
    st_global(to + j, ld_global(from + at(j)));
  }
}

template <class T>
__global__ void __launch_bounds__(GatherTile::kThreads)
    gather_kernel(const __grid_constant__ GatherProblem<T> problem) {
  constexpr uint32_t kWarps = GatherTile::kThreads / 32, kColumns = GatherTile::kColumns;
  const uint32_t layer = block_rank() / problem.blocks;
  const uint32_t r = problem.r, parts = ceil_div(problem.in, kColumns);
  const T* weight = problem.weight[layer];
  const int64_t *rows = problem.rows[layer], *cols = problem.cols[layer];
  // An item is a row of N or of B, or a part of a row of A.
  const uint32_t items = r + problem.out + r * parts;
  for (uint32_t item = block_rank() % problem.blocks * kWarps + warp_rank(); item < items;
       item += problem.blocks * kWarps) {
    if (item < r + problem.out) {
      const bool core = item < r;
      const int64_t row = core ? ld_global(rows + item) : int64_t(item - r);
      T* to = core ? problem.core[layer] + uint64_t(item) * r : problem.B[layer] + uint64_t(item - r) * r;
      copy_row(weight + row * problem.row_stride, to, r,
               [&](uint32_t j) { return ld_global(cols + j) * problem.col_stride; });
    } else {
      const uint32_t i = (item - r - problem.out) / parts, begin = (item - r - problem.out) % parts * kColumns;
      const uint32_t left = problem.in - begin;
      copy_row(weight + ld_global(rows + i) * problem.row_stride + begin * problem.col_stride,
               problem.A[layer] + uint64_t(i) * problem.in + begin, left < kColumns ? left : kColumns,
               [&](uint32_t j) { return j * problem.col_stride; });
    }
  }
}

template <class Context, class T>
void launch_gather_of(Context& context, const Gather& g) {
  const Matrix &weight = g.weight[0], &A = g.A[0];
  for_layers(g.weight.size(), [&](size_t first, uint32_t layers) {
    GatherProblem<T> p{};
    for (uint32_t i = 0; i < layers; ++i) {
      p.weight[i] = static_cast<const T*>(g.weight[first + i].data);
      p.rows[i] = g.rows[first + i];
      p.cols[i] = g.cols[first + i];
      p.A[i] = static_cast<T*>(g.A[first + i].data);
      p.core[i] = static_cast<T*>(g.core[first + i].data);
      p.B[i] = static_cast<T*>(g.B[first + i].data);
    }
    p.row_stride = weight.row_stride;
    p.col_stride = weight.col_stride;
    p.out = uint32_t(weight.rows);
    p.in = uint32_t(weight.cols);
    p.r = uint32_t(A.rows);
    const uint32_t items = p.r + p.out + p.r * ceil_div(p.in, GatherTile::kColumns);
    p.blocks = std::min(ceil_div(items, GatherTile::kThreads / 32), 8 * context.processors());
    context.launch({p.blocks * layers, GatherTile::kThreads, 1, 0, 64}, &gather_kernel<T>, p);
  });
}

template <class Context>
void launch_gather(Context& context, const Gather& g) {
  g.weight[0].dtype == Dtype::kFloat32 ? launch_gather_of<Context, uint32_t>(context, g)
                                       : launch_gather_of<Context, uint16_t>(context, g);
}

}  // namespace nlora::cuda
