// F = s·B·N: the adapter that the products of the layer see, made from whatever B and N are stored as.
#pragma once

#include "context.cuh"
#include "strided.cuh"

namespace hopper {

struct FoldProblem {
    Matrix B, core, out;
    float scaling;
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) fold_kernel(const __grid_constant__ FoldProblem problem) {
    const Matrix &B = problem.B, &core = problem.core, &out = problem.out;
    const uint32_t n = uint32_t(B.rows), r = uint32_t(B.cols);
    const StridedGrid grid(r);
    const uint32_t row0 = grid.row(block_rank()), column0 = grid.column(block_rank());
    const auto left = [&](uint32_t row, uint32_t k) {
        return row0 + row < n && k < r ? element(B, row0 + row, k) : 0.0f;
    };
    Tile tile;
    if (core.data) {
        tile.multiply(r, left, [&](uint32_t k, uint32_t column) {
            return column0 + column < r ? element(core, k, column0 + column) : 0.0f;
        });
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

// out[:, :R] = s·B·N, or s·B without N, and out[:, R:2R] = B if out has 2R columns.
// B (n, R), core = N (R, R), out (n, R) or (n, 2R); each in any dtype and strides, sums in fp32.
template <class Context>
void launch_fold(Context& context, const Matrix& B, const Matrix& core, float scaling, const Matrix& out) {
    launch_strided(context, StridedGrid::blocks(B.rows, B.cols), &fold_kernel<StridedTile>,
                   FoldProblem{B, core, out, scaling});
}

}  // namespace hopper
