#include "cpu/kernels.h"

namespace nlora::cpu {
namespace {
constexpr int kWidth = 8;
constexpr int kTileRows = 4, kTileVectors = 3;
constexpr int kUnrolled = 1;
constexpr int kDotRows = 3, kDotCols = 4;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/kernels.inl"

namespace nlora::cpu {
const Kernels& avx2_kernels() { return kKernels; }
}  // namespace nlora::cpu
