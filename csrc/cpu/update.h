// The innermost loop of a product of low rank that is added to a large matrix. Below AVX-512 it is the library's.
#pragma once

#include <cstdint>

namespace nlora::cpu {

// c (m, n) += a·b over k, with a in panels and b in strips as `Kernels::pack` of AVX-512 writes them.
void avx512_update(const float* a, const float* b, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k);

}  // namespace nlora::cpu
