// Small products on the ordinary cores: matrices of any dtype and stride, sums in fp32, always in the same order.
#pragma once

#include "../../ops.h"
#include "layer.cuh"

namespace nlora::cuda {

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

// 8 neighbours: what one thread loads of a factor at a time.
struct Eight {
  float v[8];
};

// Whether the rows of a matrix are whole pieces of 8 elements, side by side and aligned to 16 bytes.
__device__ __forceinline__ bool has_wide_rows(const Matrix& matrix) {
  return matrix.col_stride == 1 && matrix.cols % 8 == 0 && matrix.row_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

// Such rows of a known dtype, as loads of 16 bytes.
template <class T>
struct WideRows {
  const T* data;
  int64_t row_stride;
  uint32_t rows, columns;

  __device__ __forceinline__ explicit WideRows(const Matrix& matrix)
      : data(static_cast<const T*>(matrix.data)),
        row_stride(matrix.row_stride),
        rows(uint32_t(matrix.rows)),
        columns(uint32_t(matrix.cols)) {}

  // Zeros beyond the edges.
  __device__ __forceinline__ Eight operator()(uint32_t row, uint32_t column) const {
    Eight eight = {};
    if (row < rows && column < columns) {
      struct alignas(16) Loaded {
        T v[16 / sizeof(T)];
      };
      constexpr uint32_t kEach = 16 / sizeof(T);
      const auto* from = reinterpret_cast<const Loaded*>(data + row * row_stride + column);
      Loaded loaded[8 / kEach];
#pragma unroll
      for (uint32_t i = 0; i < 8 / kEach; ++i) {
        loaded[i] = ld_global(from + i);
      }
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        if constexpr (sizeof(T) == 4) {
          eight.v[i] = loaded[i / kEach].v[i % kEach];
        } else {
          eight.v[i] = to_float(loaded[i / kEach].v[i % kEach]);
        }
      }
    }
    return eight;
  }
};

// The same of at(row, column), which gives zeros itself.
template <class At>
struct SingleElements {
  At at;

  __device__ __forceinline__ Eight operator()(uint32_t row, uint32_t column) const {
    Eight eight;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      eight.v[i] = at(row, column + i);
    }
    return eight;
  }
};

template <class At>
__device__ __forceinline__ SingleElements<At> single_elements(At at) {
  return {at};
}

// body(rows of the matrix), compiled for each dtype: the choice is made once, not at every element.
template <class Body>
__device__ __forceinline__ void with_wide_rows(const Matrix& matrix, Body body) {
  switch (matrix.dtype) {
    case Dtype::kBFloat16: return body(WideRows<bf16>(matrix));
    case Dtype::kFloat16: return body(WideRows<fp16>(matrix));
    default: return body(WideRows<float>(matrix));
  }
}

__device__ __forceinline__ Eight times(float factor, Eight eight) {
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    eight.v[i] *= factor;
  }
  return eight;
}

struct alignas(16) Words4 {
  uint32_t v[4];
};

template <class T>
__device__ __forceinline__ Words4 rounded(const Eight& eight) {
  Words4 words;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    words.v[i] = pack2<T>(eight.v[2 * i], eight.v[2 * i + 1]);
  }
  return words;
}

// Stores 8 neighbours, in one piece where the matrix is of 16 bits with `wide` rows.
__device__ __forceinline__ void set_eight(const Matrix& matrix, bool wide, uint32_t row, uint32_t column,
                                          const Eight& eight) {
  if (wide && matrix.dtype != Dtype::kFloat32) {
    auto* to = static_cast<uint16_t*>(matrix.data) + row * matrix.row_stride + column;
    st_global(reinterpret_cast<Words4*>(to),
              matrix.dtype == Dtype::kBFloat16 ? rounded<bf16>(eight) : rounded<fp16>(eight));
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    set_element(matrix, row, column + i, eight.v[i]);
  }
}

// Whether a factor's neighbours lie along its rows as it is asked for them, or across: down the columns of the product.
enum class Lie { Along, Across };

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
  __device__ static uint32_t row() { return thread_rank() / 16 * 4; }
  __device__ static uint32_t column() { return thread_rank() % 16 * 4; }
  __device__ static uint32_t left_at(uint32_t k, uint32_t row) { return shared_base() + k * kLeftBytes + row * 4; }
  __device__ static uint32_t right_at(uint32_t k, uint32_t column) {
    return shared_base() + kDepth * kLeftBytes + k * kRightBytes + column * 4;
  }

  // += Σ left(row, k)·right(k, column) over k < depth; both give 0 beyond the edges of the product and of the depth.
  // left(row, k) are 8 of them from k on, right(k, column) 8 columns, or with Lie::Across right(column, k) 8 along k.
  // A chunk is on its way while the one before it is multiplied.
  template <Lie kRight = Lie::Along, class Left, class Right>
  __device__ __forceinline__ void multiply(uint32_t depth, Left left, Right right) {
    static_assert(kRows * kDepth == 8 * kThreads && kColumns * kDepth == 16 * kThreads, "8 and 16 elements a thread");
    const uint32_t t = thread_rank();
    // Lanes lie side by side where they are stored, or, of a right factor along its rows, where they are loaded.
    const uint32_t left_row = t % kRows, left_k = t / kRows * 8;
    const auto right_k = [&](uint32_t i) {
      const uint32_t e = t + i * kThreads;
      return kRight == Lie::Along ? e / (kColumns / 8) : e / kColumns * 8;
    };
    const auto right_column = [&](uint32_t i) {
      const uint32_t e = t + i * kThreads;
      return kRight == Lie::Along ? e % (kColumns / 8) * 8 : e % kColumns;
    };
    Eight a, b[2];
    const auto load = [&](uint32_t start) {
      a = left(left_row, start + left_k);
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        b[i] = kRight == Lie::Along ? right(start + right_k(i), right_column(i))
                                    : right(right_column(i), start + right_k(i));
      }
    };
    load(0);
    for (uint32_t start = 0; start < depth; start += kDepth) {
      const uint32_t count = depth - start < kDepth ? depth - start : kDepth;
      // All have read what lies there from before.
      sync_threads();
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        st_shared(left_at(left_k + j, left_row), a.v[j]);
      }
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        if constexpr (kRight == Lie::Along) {
          st_shared(right_at(right_k(i), right_column(i)), Float4{b[i].v[0], b[i].v[1], b[i].v[2], b[i].v[3]});
          st_shared(right_at(right_k(i), right_column(i) + 4), Float4{b[i].v[4], b[i].v[5], b[i].v[6], b[i].v[7]});
        } else {
#pragma unroll
          for (uint32_t j = 0; j < 8; ++j) {
            st_shared(right_at(right_k(i) + j, right_column(i)), b[i].v[j]);
          }
        }
      }
      sync_threads();
      if (start + kDepth < depth) {
        load(start + kDepth);
      }
      for (uint32_t k = 0; k < count; ++k) {
        const auto x = ld_shared<Float4>(left_at(k, row()));
        const auto y = ld_shared<Float4>(right_at(k, column()));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc[i][j] += x.v[i] * y.v[j];
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
    stage();
    for (uint32_t e = thread_rank(); e < kRows * kColumns; e += kThreads) {
      const uint32_t row = down ? e % kRows : e / kColumns;
      const uint32_t column = down ? e / kRows : e % kColumns;
      write(row, column, ld_shared<float>(staged_at(row, column)));
    }
  }

  // write(row, column, eight) for every 8 neighbours of a row.
  template <class Write>
  __device__ __forceinline__ void store_eights(Write write) const {
    stage();
    for_eights([&](uint32_t row, uint32_t column) {
      Eight eight;
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        eight.v[i] = ld_shared<float>(staged_at(row, column + i));
      }
      write(row, column, eight);
    });
  }

  // visit(row, column) for the pieces of 8 that are this thread's.
  static constexpr uint32_t kEights = kRows * kColumns / 8 / kThreads;
  template <class Visit>
  __device__ __forceinline__ static void for_eights(Visit visit) {
#pragma unroll
    for (uint32_t i = 0; i < kEights; ++i) {
      const uint32_t e = thread_rank() + i * kThreads;
      visit(e / (kColumns / 8), e % (kColumns / 8) * 8);
    }
  }

 private:
  __device__ static uint32_t staged_at(uint32_t row, uint32_t column) {
    return shared_base() + row * kStageBytes + column * 4;
  }
  __device__ __forceinline__ void stage() const {
    sync_threads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        st_shared(staged_at(row() + i, column() + j), acc[i][j]);
      }
    }
    sync_threads();
  }
};

// Whether neighbours in memory are neighbours in a column.
__device__ __forceinline__ bool runs_down(const Matrix& matrix) { return matrix.row_stride < matrix.col_stride; }

// One block for each tile of (rows, columns), by rows.
struct StridedGrid {
  uint32_t columns;

  NLORA_FN static uint32_t blocks(int64_t rows, int64_t columns) {
    return ceil_div(uint32_t(rows), StridedTile::kRows) * ceil_div(uint32_t(columns), StridedTile::kColumns);
  }
  __device__ explicit StridedGrid(int64_t columns) : columns(ceil_div(uint32_t(columns), StridedTile::kColumns)) {}

  __device__ uint32_t row(uint32_t block) const { return block / columns * StridedTile::kRows; }
  __device__ uint32_t column(uint32_t block) const { return block % columns * StridedTile::kColumns; }
};

template <class Context, class Problem>
void launch_strided(Context& context, uint32_t blocks, void (*kernel)(Problem), const Problem& problem) {
  context.launch({blocks, StridedTile::kThreads, 1, StridedTile::kSharedBytes, 128}, kernel, problem);
}

}  // namespace nlora::cuda
