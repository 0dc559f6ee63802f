#include "cpu/kernels.h"

namespace nlora::cpu {
namespace {
constexpr int kWidth = 16;
constexpr int kTileRows = 8, kTileVectors = 3;
constexpr int kUnrolled = 8;
constexpr int kDotRows = 6, kDotCols = 4;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/kernels.inl"

namespace nlora::cpu {
const Kernels& avx512_kernels() {
  static const Kernels all = [] {
    Kernels kernels = kKernels;
    if (has_avx512_bf16()) kernels.bf16_dots = avx512_bf16_dots;
    return kernels;
  }();
  return all;
}
}  // namespace nlora::cpu
