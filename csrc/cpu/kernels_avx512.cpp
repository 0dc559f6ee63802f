#include "cpu/kernels.h"

#include "cpu/avx512.inl"
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
