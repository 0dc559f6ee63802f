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
    if (!has_avx512_bf16()) return kernels;
    kernels.bf16_dots = avx512_bf16_dots;
    static Kernels pairs = kernels;
    pairs.lane = 2, pairs.multiply = avx512_bf16_multiply, pairs.pack = avx512_bf16_pack;
    kernels.pairs = &pairs;
    return kernels;
  }();
  return all;
}
}  // namespace nlora::cpu
