// y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ and its gradients.
//
// The rule that picks a product's kernel: up to kSkinny columns go to dots and, of gradients, some more to sums, which read
// the other side in place; everything else is packed and goes to gemm. With x's few rows the whole layer is such a product.
#include <cstring>

#include "cpu/adapter.h"

namespace nlora::cpu {
namespace {

// m with zeros up to a multiple of unit in every row: m itself, where it is so, or a copy.
Matrix padded_bf16(const Matrix& m, int64_t unit, Scratch& scratch) {
  const int64_t cols = round_up(m.cols, unit);
  if (cols == m.cols) return m;
  uint16_t* to = reinterpret_cast<uint16_t*>(scratch.take(m.rows * cols / 2));
  for (int64_t i = 0; i < m.rows; ++i) {
    std::memcpy(to + i * cols, static_cast<uint16_t*>(m.data) + i * m.row_stride, m.cols * sizeof *to);
    std::fill(to + i * cols + m.cols, to + (i + 1) * cols, uint16_t(0));
  }
  return {to, m.dtype, m.rows, m.cols, cols, 1};
}

// y for few rows of x: W is read once, in place, and the adapter's r is a continuation of its k.
void few_rows(const Kernels& kernel, const Forward& f, const float* bias, Scratch& scratch) {
  const Matrix &x = f.x, &y = f.y;
  const int64_t M = x.rows, R = f.A.rows, N = y.cols;
  const bool fits = x.dtype == Dtype::kFloat32 && x.col_stride == 1 && x.cols % kernel.width == 0;
  const Matrix left = fits ? x : copied(kernel, x, kernel.width, scratch);
  const bool pairs = kernel.bf16_dots && x.dtype == Dtype::kBFloat16 && x.col_stride == 1;
  const Matrix left_pairs = pairs ? padded_bf16(x, 2 * kernel.width, scratch) : Matrix();
  // out = rows·xᵀ
  const auto times_x = [&](const Matrix& rows, const Matrix& out) {
    return dots(rows, pairs && rows.dtype == Dtype::kBFloat16 ? left_pairs : left, out);
  };
  const auto run = [&](const Dots& d) { (d.cols == left_pairs.data ? kernel.bf16_dots : kernel.dots)(d); };
  const int64_t width = round_up(R, kernel.width);
  Matrix P, right;
  if (f.A) {
    const Matrix sums = P = padded(kernel, M, R, scratch);
    std::memset(sums.data, 0, M * width * sizeof(float));
    run(times_x(f.A, transposed(sums)));
    kernel.round(values(sums), width, f.T);
    if (f.core.N) {
      P = padded(kernel, M, R, scratch);
      std::memset(P.data, 0, M * width * sizeof(float));
      kernel.dots(dots(sums, copied(kernel, f.core.N, kernel.width, scratch), P));
    }
    scale(P, f.scaling);
    right = padded(kernel, N, R, scratch);
  }
  const bool in_place = y.dtype == Dtype::kFloat32;
  const Matrix result = in_place ? y : fp32(scratch.take(M * N), M, N, N);
  parallel(team(f.threads, M, x.cols, N), [&](int index, int count) {
    const Range cols = part(N, 16, index, count);
    const Matrix out = slice(result, {0, M}, cols);
    Dots d = times_x(slice(f.weight, cols, {0, x.cols}), transposed(out));
    if (f.A) {
      const Matrix mine = slice(right, cols, {0, R}), from = slice(f.B, cols, {0, R});
      kernel.pack(from.data, from.dtype, from.col_stride, from.row_stride, R, cols.size, int(width), cols.size * width,
                  values(mine));
      d.extra_rows = values(mine), d.extra_cols = values(P), d.extra = width;
    }
    d.start = bias ? bias + cols.first : nullptr;
    run(d);
    if (!in_place) kernel.round(values(out), out.row_stride, slice(y, {0, M}, cols));
  });
}

// dx = dy·W + H·A, or H·A alone, with `narrow` on the way.
void input_gradient(const Kernels& kernel, const Backward& b, const Narrow& narrow, Scratch& scratch) {
  const auto all = [&](const Prepare* prepare) {
    const Summand base = {b.dy, transposed(b.weight), b.weight.quantised, true};
    gemm({base, {narrow.H, transposed(b.A)}}, nullptr, b.dx, b.threads, b.pieces, prepare);
  };
  if (b.dx && b.weight && b.A.rows <= kSkinny) {
    const Prepare prepare = [&](Range rows) { narrow(rows); };
    return all(&prepare);
  }
  narrow.all(b.threads);
  if (b.dx && b.weight) return all(nullptr);
  if (b.dx) widen(kernel, narrow.H, b.A, nullptr, b.dx, b.threads, b.pieces, scratch);
}

}  // namespace

void forward(Forward f) {
  if (!f.x.rows) return;
  if (forked()) f.threads = 1;
  const Kernels& kernel = kernels();
  Scratch scratch;
  if (f.core.u) f.core.N = square(f.A.rows, scratch), lora2_core(f.core, f.core.N);
  const float* start = row_vector(kernel, f.bias, scratch);
  // What reads weight in place reads whole rows of it.
  if (f.weight && !f.weight.quantised && f.x.rows <= kFewRows && f.weight.col_stride == 1)
    return few_rows(kernel, f, start, scratch);
  if (!f.A) return gemm({{f.x, f.weight, f.weight.quantised}}, start, f.y, f.threads, f.pieces);
  const Chain chain(kernel, f.x, f.A, f.core.N, f.scaling, f.T, f.pieces, scratch);
  const Prepare prepare = [&](Range rows) { chain(rows); };
  const bool fused = f.weight && chain.skinny();
  if (!fused) chain.all(f.threads);
  if (!f.weight) return widen(kernel, chain.outcome, transposed(f.B), start, f.y, f.threads, f.pieces, scratch);
  gemm({{f.x, f.weight, f.weight.quantised}, {chain.outcome, f.B}}, start, f.y, f.threads, f.pieces,
       fused ? &prepare : nullptr);
}

void backward(Backward b) {
  if (forked()) b.threads = 1;
  const Kernels& kernel = kernels();
  Scratch scratch;
  const int64_t R = b.A.rows;
  if (b.core.u) b.core.N = square(R, scratch), lora2_core(b.core, b.core.N);
  if (b.dcore.u) b.dcore.N = square(R, scratch);
  const Narrow narrow(kernel, b, scratch);
  Sums sums(kernel, scratch);
  if (b.weight && !b.weight.quantised && b.dy.rows <= kFewRows && b.weight.col_stride == 1) {
    // Of few rows, dx is a sum over those of weight.
    narrow.all(b.threads);
    sums.add(b.dx, {{b.dy, b.weight}, {narrow.H, b.A}});
  } else {
    input_gradient(kernel, b, narrow, scratch);
  }
  if (b.dweight) gemm({{transposed(b.dy), transposed(b.x)}}, nullptr, b.dweight, b.threads, b.pieces);
  if (!summed(kernel, b)) {
    rank_gradients(kernel, b, narrow, scratch);
  } else {
    sums.add({{b.dA, transposed(narrow.H), 1.0f}}, b.x);
    sums.add({{transposed(b.dB), transposed(narrow.P), 1.0f}}, b.dy);
    sums.add({{b.dcore.N, transposed(narrow.G), b.scaling}}, b.T);
  }
  sums.run(b.threads);
  if (b.dcore.u) lora2_core_backward(b.dcore.N, b.core, b.dcore);
}

}  // namespace nlora::cpu
