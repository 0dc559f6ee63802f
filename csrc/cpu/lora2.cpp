// LoRA²: the k×k core of its inner chain. The matrices are tiny, so one thread does.
#include "cpu/gemm.h"

namespace nlora::cpu {
namespace {

// E ⊙ mask in fp32.
const float* weights(const Kernels& kernel, const Core& core, Scratch& scratch) {
  const Matrix E = copied(kernel, core.E, kernel.width, scratch);
  if (!core.mask) return values(E);
  const Matrix mask = copied(kernel, core.mask, kernel.width, scratch);
  for (int64_t i = 0; i < E.cols; ++i) values(E)[i] *= values(mask)[i];
  return values(E);
}

// The factors of diag(by) multiply the columns of m.
void scale_columns(const Matrix& m, const float* by) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) values(m)[i * m.row_stride + j] *= by[j];
}

}  // namespace

void lora2_core(const Core& core, const Matrix& out) {
  const Kernels& kernel = kernels();
  Scratch scratch;
  const int64_t k = core.u.cols;
  const Matrix U = copied(kernel, core.U, kernel.width, scratch);
  scale_columns(U, weights(kernel, core, scratch));
  const Matrix product = fp32(scratch.take(k * k), k, k, k);
  kernel.dots(dots(U, copied(kernel, transposed(core.u), kernel.width, scratch), product));
  kernel.round(values(product), k, out);
}

void lora2_core_backward(const Matrix& dN, const Core& core, const Core& dcore) {
  const Kernels& kernel = kernels();
  Scratch scratch;
  const int64_t r = core.u.rows, k = core.u.cols;
  const float* e = weights(kernel, core, scratch);
  const Matrix u = copied(kernel, core.u, kernel.width, scratch);
  // dU = dN·uᵀ·diag(e)
  const Matrix dU = fp32(scratch.take(k * r), k, r, r);
  kernel.dots(dots(copied(kernel, dN, kernel.width, scratch), u, dU));
  scale_columns(dU, e);
  kernel.round(values(dU), r, dcore.U);
  // Uᵀ·dN: the products of its rows with those of u are the gradient of E; du = diag(e)·Uᵀ·dN.
  const Matrix du = fp32(scratch.take(r * k), r, k, k);
  const Matrix turned = copied(kernel, transposed(core.U), kernel.width, scratch);
  kernel.dots(dots(turned, copied(kernel, transposed(dN), kernel.width, scratch), du));
  const float* mask = core.mask ? values(copied(kernel, core.mask, kernel.width, scratch)) : nullptr;
  const Matrix dE = fp32(scratch.take(r), 1, r, r);
  for (int64_t i = 0; i < r; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      float& value = values(du)[i * k + j];
      sum += value * values(u)[i * u.row_stride + j];
      value *= e[i];
    }
    values(dE)[i] = mask ? sum * mask[i] : sum;
  }
  kernel.round(values(du), k, dcore.u);
  kernel.round(values(dE), r, dcore.E);
}

}  // namespace nlora::cpu
