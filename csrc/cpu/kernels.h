// The innermost loops, one table of them per instruction set. Everything accumulates in fp32.
#pragma once

#include "ops.h"

namespace nlora::cpu {

// C (m, n) = init + a·b over k, then over tail_k with tail for a; b goes on where it was.
struct Product {
  const float* a;  // panels of tile_rows rows: [k][tile_rows] each, rows past m are zero; or rows in place,
  int64_t a_panel;  // distance of two panels
  int64_t a_row;  // distance of two rows, whose k lie side by side; 0 for panels
  const float* tail;  // rows tail_row apart; only where a is in place
  int64_t tail_row, tail_k;
  const float* ahead;  // the rows that the next product reads in place, to be fetched, or nullptr
  const void* b;  // strips of tile_cols columns; a strip's row of k holds them side by side
  Dtype b_dtype;
  int64_t b_strip, b_row;  // distance of two strips, and of two rows of a strip, in elements
  const float* init;  // nullptr for zero
  int64_t init_row;  // 0 to start every row from the same values
  void* c;
  Dtype c_dtype;
  int64_t c_row;
  int64_t m, n, k;
};

// out(i, j) = start(i) + Σ_k rows(i, k)·cols(j, k) + Σ_k extra_rows(i, k)·extra_cols(j, k)
struct Dots {
  const void* rows;  // (m, k), k side by side
  Dtype dtype;
  int64_t row;  // distance of two rows, in elements
  const void* cols;  // (n, padded k), zero past k; fp32, or bf16 for bf16_dots
  int64_t col;
  const float* extra_rows;  // (m, extra), nullptr for none; extra is a multiple of width
  const float* extra_cols;  // (n, extra)
  int64_t extra;
  const float* start;  // (m,) or nullptr
  float* out;
  int64_t out_row, out_col;
  int64_t m, n, k;
};

struct Kernels {
  int width;  // fp32 values in a register
  int tile_rows, tile_cols;  // the register tile of a Product
  // Values in a lane of a panel: one of fp32, or two of bf16 that are neighbours in k, of which subnormals count for zero.
  int lane;
  void (*multiply)(const Product& product);
  void (*dots)(const Dots& dots);
  // The same of bf16 rows and columns, these padded to 2·width, with subnormals for zero; nullptr where no unit does it.
  void (*bf16_dots)(const Dots& dots);
  // Panels [k / lane][size], `distance` lanes apart, from source(i, k) = source[i * row_stride + k * k_stride], zero past
  // rows and k; not of fp16 where a lane holds two. A Product counts k in lanes.
  void (*pack)(const void* source, Dtype dtype, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int size,
               int64_t distance, float* panels);
  // to(i, j) = from[i * from_row + j], rounded to its dtype
  void (*round)(const float* from, int64_t from_row, const Matrix& to);
  // to = W from (row, col) on, its columns side by side.
  void (*dequantise)(const Quantised& weight, int64_t row, int64_t col, const Matrix& to);
  // The same with two values in a lane, or nullptr.
  const Kernels* pairs;
};

const Kernels& portable_kernels();
const Kernels& neon_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// By avx512_bf16, and by Arm's bf16.
bool has_avx512_bf16();
void avx512_bf16_dots(const Dots& dots);
void avx512_bf16_multiply(const Product& product);
void avx512_bf16_pack(const void* source, Dtype dtype, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                      int size, int64_t distance, float* panels);
bool has_neon_bf16();
void neon_bf16_dots(const Dots& dots);

}  // namespace nlora::cpu
