#include "cpu/kernels.h"

namespace nlora::cpu {
namespace {
constexpr int kWidth = 4;
constexpr int kTileRows = 8, kTileVectors = 3;
constexpr int kUnrolled = 1;
constexpr int kDotRows = 5, kDotCols = 4;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/kernels.inl"

namespace nlora::cpu {
const Kernels& neon_kernels() {
  static const Kernels all = [] {
    Kernels kernels = kKernels;
    if (has_neon_bf16()) kernels.bf16_dots = neon_bf16_dots;
    return kernels;
  }();
  return all;
}
}  // namespace nlora::cpu
