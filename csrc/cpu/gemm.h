// Matrix products of views in any strides and dtypes, accumulated in fp32.
#pragma once

#include <functional>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace nlora::cpu {

const Kernels& kernels();

inline Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride}; }

inline Matrix fp32(float* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {data, Dtype::kFloat32, rows, cols, row_stride, 1};
}

// Of a matrix in fp32.
inline float* values(const Matrix& m) { return static_cast<float*>(m.data); }

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows and columns of a view.
Matrix slice(const Matrix& m, Range rows, Range cols);

// Into fp32, with zeros up to the end of its rows.
void copy(const Kernels& kernel, const Matrix& from, const Matrix& to);
// m in fp32, rows padded with zeros to a multiple of unit, itself one of the vector width.
Matrix copied(const Kernels& kernel, const Matrix& m, int64_t unit, Scratch& scratch);
// out = rows·colsᵀ in fp32, for cols padded as `Kernels` asks.
Dots dots(const Matrix& rows, const Matrix& cols, const Matrix& out);

// One summand of a product.
struct Summand {
  Matrix left;   // (m, k)
  Matrix right;  // (n, k)
  // W, where right is W or Wᵀ and has no values to read.
  const Quantised* quantised = nullptr;
  bool is_transposed = false;
};

// Computes some rows of left, called by each thread before any of them multiplies.
using Prepare = std::function<void(Range rows)>;

// The columns of the grid in which `threads` threads do least; the costs are those of packing a row of left and a column of
// right, in multiply-adds of one k.
int grid_cols(const Matrix& out, int64_t row_unit, int64_t col_unit, int64_t left_cost, int64_t right_cost,
              int threads);

// out = start + Σ left·rightᵀ by packed panels. The summands share m and n, each has a k of its own; start (n,) or nullptr.
// `pieces`: of bf16 for an operand of fp32, see Forward.
void gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads, int pieces,
          const Prepare* prepare = nullptr);

// A product among several of as many rows, which threads share out as if they were one.
struct Result {
  std::vector<Summand> summands;
  const float* start;
  Matrix out;
};
void gemm(const std::vector<Result>& results, int threads, int pieces, const Prepare* prepare = nullptr);

// The same by AMX. False where values lie outside what it multiplies as exactly: out is then undefined, left prepared.
bool tile_gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads, int pieces,
               const Prepare* prepare);
// out += left·rightᵀ, all fp32 and out with its columns side by side. False, with nothing done, as above.
bool tile_update(const Matrix& out, const Matrix& left, const Matrix& right, int threads);

}  // namespace nlora::cpu
