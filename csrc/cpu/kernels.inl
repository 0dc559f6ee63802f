// The kernels of one instruction set, written once with the compiler's vector types. The including file defines kWidth,
// kTileRows, kTileVectors, kUnrolled, kDotRows and kDotCols in namespace nlora::cpu::{anonymous}.
//
// NOTE: everything here has internal linkage and nothing of the standard library is used: an inline function shared
// between files of different flags would let the linker put AVX code into the portable path.

#include "cpu/vectors.inl"
#include "cpu/dots.inl"
#include "cpu/pack.inl"
#include "cpu/product.inl"
#include "cpu/quantised.inl"

namespace nlora::cpu {
namespace {

void multiply(const Product& p) {
  switch (p.b_dtype) {
    case Dtype::kFloat32: return multiply_from<float>(p);
    case Dtype::kBFloat16: return multiply_from<BFloat16>(p);
    case Dtype::kFloat16: return multiply_from<Float16>(p);
  }
}

void dots(const Dots& d) {
  switch (d.dtype) {
    case Dtype::kFloat32: return dots_typed<float, float>(d);
    case Dtype::kBFloat16: return dots_typed<BFloat16, float>(d);
    case Dtype::kFloat16: return dots_typed<Float16, float>(d);
  }
}

void pack(const void* source, Dtype dtype, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int size,
          int64_t distance, float* panels) {
  switch (dtype) {
    case Dtype::kFloat32:
      return pack_typed<Single>(static_cast<const float*>(source), row_stride, k_stride, rows, k, size, distance,
                                panels);
    case Dtype::kBFloat16:
      return pack_typed<Single>(static_cast<const BFloat16*>(source), row_stride, k_stride, rows, k, size, distance,
                                panels);
    case Dtype::kFloat16:
      return pack_typed<Single>(static_cast<const Float16*>(source), row_stride, k_stride, rows, k, size, distance,
                                panels);
  }
}

template <class T>
void round_typed(const float* from, int64_t from_row, const Matrix& to) {
  for (int64_t i = 0; i < to.rows; ++i, from += from_row) {
    T* row = static_cast<T*>(to.data) + i * to.row_stride;
    if (to.col_stride == 1) {
      round_row(from, row, to.cols);
    } else {
      for (int64_t j = 0; j < to.cols; ++j) round_row(from + j, row + j * to.col_stride, 1);
    }
  }
}

void round(const float* from, int64_t from_row, const Matrix& to) {
  switch (to.dtype) {
    case Dtype::kFloat32: return round_typed<float>(from, from_row, to);
    case Dtype::kBFloat16: return round_typed<BFloat16>(from, from_row, to);
    case Dtype::kFloat16: return round_typed<Float16>(from, from_row, to);
  }
}

constexpr Kernels kKernels = {kWidth,  kTileRows, kTileCols, 1,          multiply, dots,
                              nullptr, pack,      round,     dequantise, nullptr};

}  // namespace
}  // namespace nlora::cpu
