#include "cpu/kernels.h"

namespace nlora::cpu {
namespace {
constexpr int kWidth = 4;
constexpr int kTileRows = 4, kTileVectors = 2;
constexpr int kUnrolled = 1;
constexpr int kDotRows = 3, kDotCols = 4;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/kernels.inl"

namespace nlora::cpu {
const Kernels& portable_kernels() { return kKernels; }
}  // namespace nlora::cpu
