// Initialisation: W += L·A in one pass over W.
#include "cpu/gemm.h"
#include "cpu/update.h"

namespace nlora::cpu {
namespace {

// Values of left that a thread packs at a time: 64 KiB. So few rows that the pages of weight they lie on stay known from
// one strip to the next.
constexpr int64_t kLeftSize = 1 << 14;

}  // namespace

#if defined(__x86_64__) || defined(__i386__)
bool add_product(const Matrix& weight, const Matrix& left, const Matrix& right, int threads) {
  const int64_t k = right.rows;
  // Few columns are bound by memory, where whole rows are read faster.
  if (tier() < Tier::kAvx512 || forked() || k <= 32) return false;
  if (!weight.rows || !weight.cols) return true;
  if (tier() == Tier::kAmx && tile_update(weight, left, transposed(right), threads)) return true;
  // Many are not held in the first cache level.
  if (k > 160) return false;
  const Kernels& kernel = avx512_kernels();
  const int64_t rows = kernel.tile_rows, cols = kernel.tile_cols, block = kLeftSize / k / rows * rows;
  Scratch scratch;
  float* strips = scratch.take(round_up(weight.cols, cols) * k);
  float* panels = scratch.take(block * k * threads);
  parallel(threads, [&](int index, int count) {
    const Range shared = part(weight.cols, cols, index, count);
    const Matrix source = slice(right, {0, k}, shared);
    kernel.pack(source.data, source.dtype, source.col_stride, source.row_stride, shared.size, k, int(cols), cols * k,
                strips + shared.first * k);
    barrier(count);
    const Range own = part(weight.rows, rows, index, count);
    float* a = panels + index * block * k;
    for (int64_t row = 0; row < own.size; row += block) {
      const Range taken = {own.first + row, std::min(block, own.size - row)};
      const Matrix from = slice(left, taken, {0, k}), to = slice(weight, taken, {0, weight.cols});
      kernel.pack(from.data, from.dtype, from.row_stride, from.col_stride, taken.size, k, int(rows), rows * k, a);
      avx512_update(a, strips, static_cast<float*>(to.data), to.row_stride, to.rows, to.cols, k);
    }
  });
  return true;
}
#else
bool add_product(const Matrix&, const Matrix&, const Matrix&, int) { return false; }
#endif

}  // namespace nlora::cpu
