#include "cpu/kernels.h"

namespace nlora::cpu {
namespace {
constexpr int kWidth = 4;
constexpr int kDotRows = 5, kDotCols = 4;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/vectors.inl"
#include "cpu/dots.inl"

namespace nlora::cpu {
void neon_bf16_dots(const Dots& d) { dots_typed<BFloat16, BFloat16>(d); }
}  // namespace nlora::cpu
