// The passes over a large tensor of a LoRA² adapter, one table of them per instruction set; AVX-512 adds nothing here.
// w stands for a matrix of k rows and n columns that lies as (k, n), or transposed as (n, k).
#pragma once

#include <cstdint>

namespace nlora::cpu {

struct GramKernels {
  // sums (k, k) = w·wᵀ, in fp32 over blocks of columns and in double over the blocks. Scratch holds gram_scratch(k).
  void (*gram)(const float* w, int64_t n, int64_t k, bool transposed, double* sums, float* scratch);
  // out = D·w as w lies, with D symmetric, (k, gram_columns(k)) and zero in the columns past k.
  void (*product)(const float* D, const float* w, int64_t n, int64_t k, bool transposed, float* out);
};

inline int64_t gram_columns(int64_t k) { return (k + 7) / 8 * 8; }
inline int64_t gram_scratch(int64_t k) { return 8 * gram_columns(k); }

const GramKernels& portable_gram();
const GramKernels& avx2_gram();

}  // namespace nlora::cpu
