// Small products on the ordinary cores: matrices of any dtype and stride, sums in fp32, always in the same order.
#pragma once

#include "../ops.h"
#include "hopper.cuh"

namespace hopper {

using nlora::Dtype;
using nlora::Matrix;

template <class T>
__device__ __forceinline__ float load_as_float(const Matrix& matrix, int64_t at) {
    return to_float(ld_global(static_cast<const T*>(matrix.data) + at));
}

__device__ __forceinline__ float element(const Matrix& matrix, uint32_t row, uint32_t column) {
    const int64_t at = row * matrix.row_stride + column * matrix.col_stride;
    switch (matrix.dtype) {
        case Dtype::kBFloat16: return load_as_float<bf16>(matrix, at);
        case Dtype::kFloat16: return load_as_float<fp16>(matrix, at);
        default: return ld_global(static_cast<const float*>(matrix.data) + at);
    }
}

template <class T>
__device__ __forceinline__ void store_rounded(const Matrix& matrix, int64_t at, float value) {
    st_global(static_cast<T*>(matrix.data) + at, T{uint16_t(pack2<T>(value, 0.0f))});
}

__device__ __forceinline__ void set_element(const Matrix& matrix, uint32_t row, uint32_t column, float value) {
    const int64_t at = row * matrix.row_stride + column * matrix.col_stride;
    switch (matrix.dtype) {
        case Dtype::kBFloat16: return store_rounded<bf16>(matrix, at, value);
        case Dtype::kFloat16: return store_rounded<fp16>(matrix, at, value);
        default: st_global(static_cast<float*>(matrix.data) + at, value);
    }
}

struct alignas(16) Float4 {
    float v[4];
};

// 32 × 64 elements of a product by the 128 threads of a block, 4 × 4 a thread. The factors go through shared memory in
// chunks of 32 along the sum, the result goes through it once more.
struct StridedTile {
    static constexpr uint32_t kRows = 32, kColumns = 64, kDepth = 32, kThreads = 128;
    // Rows are longer than they hold, so that a column of a chunk spreads over the banks.
    static constexpr uint32_t kLeftBytes = (kRows + 4) * 4, kRightBytes = (kColumns + 4) * 4;
    static constexpr uint32_t kStageBytes = (kColumns + 1) * 4;
    static constexpr uint32_t kSharedBytes = kDepth * (kLeftBytes + kRightBytes);
    static_assert(kRows * kStageBytes <= kSharedBytes, "the result takes the place of the factors");

    float acc[4][4] = {};

    // First row and column of this thread.
    __device__ static uint32_t row() {
        return thread_rank() / 16 * 4;
    }
    __device__ static uint32_t column() {
        return thread_rank() % 16 * 4;
    }
    __device__ static uint32_t left_at(uint32_t k, uint32_t row) {
        return shared_base() + k * kLeftBytes + row * 4;
    }
    __device__ static uint32_t right_at(uint32_t k, uint32_t column) {
        return shared_base() + kDepth * kLeftBytes + k * kRightBytes + column * 4;
    }

    // += Σ left(row, k)·right(k, column) over k < depth; both give 0 beyond the edges of the result.
    template <class Left, class Right>
    __device__ __forceinline__ void multiply(uint32_t depth, Left left, Right right) {
        for (uint32_t start = 0; start < depth; start += kDepth) {
            const uint32_t count = depth - start < kDepth ? depth - start : kDepth;
            // All have read what lies there from before.
            sync_threads();
            for (uint32_t e = thread_rank(); e < kRows * kDepth; e += kThreads) {
                const uint32_t k = e % kDepth, row = e / kDepth;
                if (k < count) {
                    st_shared(left_at(k, row), left(row, start + k));
                }
            }
            for (uint32_t e = thread_rank(); e < kColumns * count; e += kThreads) {
                const uint32_t k = e / kColumns, column = e % kColumns;
                st_shared(right_at(k, column), right(start + k, column));
            }
            sync_threads();
            for (uint32_t k = 0; k < count; ++k) {
                const auto a = ld_shared<Float4>(left_at(k, row()));
                const auto b = ld_shared<Float4>(right_at(k, column()));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        acc[i][j] += a.v[i] * b.v[j];
                    }
                }
            }
        }
    }

    // = left(row, column), where there is nothing to multiply by.
    template <class Left>
    __device__ __forceinline__ void copy(Left left) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                acc[i][j] = left(row() + i, column() + j);
            }
        }
    }

    // write(row, column, value) for every element. Neighbouring threads have neighbouring columns, or rows if `down`.
    // Without `down` a thread keeps to the column thread_rank() % kColumns.
    template <class Write>
    __device__ __forceinline__ void store(bool down, Write write) const {
        sync_threads();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                st_shared(shared_base() + (row() + i) * kStageBytes + (column() + j) * 4, acc[i][j]);
            }
        }
        sync_threads();
        for (uint32_t e = thread_rank(); e < kRows * kColumns; e += kThreads) {
            const uint32_t row = down ? e % kRows : e / kColumns;
            const uint32_t column = down ? e / kRows : e % kColumns;
            write(row, column, ld_shared<float>(shared_base() + row * kStageBytes + column * 4));
        }
    }
};

// Whether neighbours in memory are neighbours in a column.
__device__ __forceinline__ bool runs_down(const Matrix& matrix) {
    return matrix.row_stride < matrix.col_stride;
}

// One block for each tile of (rows, columns), by rows.
struct StridedGrid {
    uint32_t columns;

    HOPPER_FN static uint32_t blocks(int64_t rows, int64_t columns) {
        return ceil_div(uint32_t(rows), StridedTile::kRows) * ceil_div(uint32_t(columns), StridedTile::kColumns);
    }
    __device__ explicit StridedGrid(int64_t columns) : columns(ceil_div(uint32_t(columns), StridedTile::kColumns)) {}

    __device__ uint32_t row(uint32_t block) const {
        return block / columns * StridedTile::kRows;
    }
    __device__ uint32_t column(uint32_t block) const {
        return block % columns * StridedTile::kColumns;
    }
};

template <class Context, class Problem>
void launch_strided(Context& context, uint32_t blocks, void (*kernel)(Problem), const Problem& problem) {
    context.launch({blocks, StridedTile::kThreads, 1, StridedTile::kSharedBytes, 128}, kernel, problem);
}

}  // namespace hopper
