// The last step of a narrow gradient: its fp32 slices are added in order and go through the core.
#pragma once

#include <utility>

#include "context.cuh"
#include "gradient.h"
#include "strided.cuh"

namespace hopper {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) finish_kernel(const __grid_constant__ Finish problem) {
    const Matrix &core = problem.core, &out = problem.out;
    const uint32_t n = uint32_t(out.rows), w = uint32_t(out.cols);
    const StridedGrid grid(w);
    const uint32_t row0 = grid.row(block_rank()), column0 = grid.column(block_rank());
    const auto sum = [&](uint32_t row, uint32_t column) {
        float total = 0;
        if (row0 + row < n && column < w) {
            const float* from = static_cast<const float*>(problem.slices.data) + size_t(row0 + row) * w + column;
#pragma unroll 4
            for (uint32_t s = 0; s < problem.splits; ++s) {
                total += ld_global(from + s * size_t(n) * w);
            }
        }
        return total;
    };
    Tile tile;
    if (core.data) {
        tile.multiply(w, sum, [&](uint32_t k, uint32_t column) {
            return column0 + column < w ? element(core, column0 + column, k) : 0.0f;
        });
    } else {
        tile.copy([&](uint32_t row, uint32_t column) { return sum(row, column0 + column); });
    }
    tile.store(runs_down(out), [&](uint32_t row, uint32_t column, float value) {
        if (row0 + row < n && column0 + column < w) {
            set_element(out, row0 + row, column0 + column, problem.scaling * value);
        }
    });
}

// One launch: see Finish.
template <class Context>
void launch_finish(Context& context, Finish problem) {
    if (problem.transposed) {
        std::swap(problem.out.rows, problem.out.cols);
        std::swap(problem.out.row_stride, problem.out.col_stride);
    }
    const uint32_t blocks = StridedGrid::blocks(problem.out.rows, problem.out.cols);
    launch_strided(context, blocks, &finish_kernel<StridedTile>, problem);
}

}  // namespace hopper
