// LoRA²: the k×k core of its inner chain. The matrices are tiny, so one thread and one pass over each do.
#include "ops.h"

namespace nlora::cpu {
namespace {

float* at(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<float*>(m.data) + row * m.row_stride + col * m.col_stride;
}

float masked(const Matrix& E, const Matrix& mask, int64_t i) { return mask ? *at(E, 0, i) * *at(mask, 0, i) : *at(E, 0, i); }

}  // namespace

void lora2_core(const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask, const Matrix& core) {
  const int64_t r = u.rows, k = u.cols;
  for (int64_t a = 0; a < k; ++a) {
    for (int64_t b = 0; b < k; ++b) *at(core, a, b) = 0;
    for (int64_t i = 0; i < r; ++i) {
      const float weight = *at(U, a, i) * masked(E, mask, i);
      for (int64_t b = 0; b < k; ++b) *at(core, a, b) += weight * *at(u, i, b);
    }
  }
}

void lora2_core_backward(const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                         const Matrix& du, const Matrix& dE, const Matrix& dU) {
  const int64_t r = u.rows, k = u.cols;
  for (int64_t i = 0; i < r; ++i) {
    const float e = masked(E, mask, i);
    // Row i of Uᵀ·dC goes to du; its product with row i of u is the gradient of E.
    for (int64_t b = 0; b < k; ++b) *at(du, i, b) = 0;
    for (int64_t a = 0; a < k; ++a) {
      const float weight = *at(U, a, i);
      float product = 0;
      for (int64_t b = 0; b < k; ++b) {
        *at(du, i, b) += weight * *at(dcore, a, b);
        product += *at(dcore, a, b) * *at(u, i, b);
      }
      *at(dU, a, i) = product * e;
    }
    float diagonal = 0;
    for (int64_t b = 0; b < k; ++b) {
      diagonal += *at(du, i, b) * *at(u, i, b);
      *at(du, i, b) *= e;
    }
    *at(dE, 0, i) = mask ? diagonal * *at(mask, 0, i) : diagonal;
  }
}

}  // namespace nlora::cpu
