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

// A few rows, which meet others of their width that are read once, where they lie.
class Few {
 public:
  Few(const Kernels& kernel, const Matrix& left, Scratch& scratch) : kernel_(kernel), scratch_(scratch) {
    const bool fits = left.dtype == Dtype::kFloat32 && left.col_stride == 1 && left.cols % kernel.width == 0;
    left_ = fits ? left : copied(kernel, left, kernel.width, scratch);
    const bool pairs = kernel.bf16_dots && left.dtype == Dtype::kBFloat16 && left.col_stride == 1;
    if (pairs) pairs_ = padded_bf16(left, 2 * kernel.width, scratch);
  }

  // out = left·rowsᵀ in fp32
  void times(const Matrix& rows, const Matrix& out) const { run(product(rows, out)); }

  // out = start + left·rowsᵀ + narrow·wideᵀ: the adapter's r is a continuation of the rows' k. narrow is in fp32, its rows
  // padded with zeros to the width of a register.
  void times(const Matrix& rows, const Matrix& narrow, const Matrix& wide, const float* start, const Matrix& out,
             int threads) const {
    const int64_t M = out.rows, N = out.cols, R = narrow.cols, width = narrow.row_stride;
    const Matrix right = narrow ? padded(kernel_, N, R, scratch_) : Matrix();
    const bool in_place = out.dtype == Dtype::kFloat32;
    const Matrix result = in_place ? out : fp32(scratch_.take(M * N), M, N, N);
    parallel(team(threads, M, rows.cols, N), [&](int index, int count) {
      const Range cols = part(N, 16, index, count);
      const Matrix here = slice(result, {0, M}, cols);
      Dots d = product(slice(rows, cols, {0, rows.cols}), here);
      if (narrow) {
        const Matrix mine = slice(right, cols, {0, R}), from = slice(wide, cols, {0, R});
        kernel_.pack(from.data, from.dtype, from.col_stride, from.row_stride, R, cols.size, int(width),
                     cols.size * width, values(mine));
        d.extra_rows = values(mine), d.extra_cols = values(narrow), d.extra = width;
      }
      d.start = start ? start + cols.first : nullptr;
      run(d);
      if (!in_place) kernel_.round(values(here), here.row_stride, slice(out, {0, M}, cols));
    });
  }

 private:
  Dots product(const Matrix& rows, const Matrix& out) const {
    return dots(rows, pairs_ && rows.dtype == Dtype::kBFloat16 ? pairs_ : left_, transposed(out));
  }
  void run(const Dots& d) const { (d.cols == pairs_.data ? kernel_.bf16_dots : kernel_.dots)(d); }

  const Kernels& kernel_;
  Scratch& scratch_;
  Matrix left_, pairs_;
};

// y for few rows of x, where those of W lie side by side.
void few_rows(const Kernels& kernel, const Forward& f, const float* bias, Scratch& scratch) {
  const int64_t M = f.x.rows, R = f.A.rows, width = round_up(R, kernel.width);
  const Few x(kernel, f.x, scratch);
  Matrix P;
  if (f.A) {
    const Matrix sums = P = padded(kernel, M, R, scratch);
    std::memset(sums.data, 0, M * width * sizeof(float));
    x.times(f.A, sums);
    kernel.round(values(sums), width, f.T);
    if (f.core.N) {
      P = padded(kernel, M, R, scratch);
      std::memset(P.data, 0, M * width * sizeof(float));
      kernel.dots(dots(sums, copied(kernel, f.core.N, kernel.width, scratch), P));
    }
    scale(P, f.scaling);
  }
  x.times(f.weight, P, f.B, bias, f.y, f.threads);
}

// The same where its columns do: y is a sum over them.
void few_rows_across(const Kernels& kernel, const Forward& f, const float* bias, Scratch& scratch) {
  Sums sums(kernel, scratch);
  std::vector<std::pair<Matrix, Matrix>> products = {{f.x, transposed(f.weight)}};
  if (f.A) {
    const Chain chain(kernel, f.x, f.A, f.core.N, f.scaling, f.T, f.pieces, scratch);
    chain.all(f.threads);
    const Matrix wide = transposed(f.B);
    products.push_back({chain.outcome, wide.col_stride == 1 ? wide : copied(kernel, wide, kernel.width, scratch)});
  }
  sums.add(f.y, products, bias);
  sums.run(f.threads);
}

// Whether a product of so many rows with weight reads it in place.
bool few(const Weight& weight, int64_t rows) { return weight && !weight.quantised && rows <= kFewRows; }

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
  if (few(f.weight, f.x.rows)) {
    if (is_rows(f.weight)) return few_rows(kernel, f, start, scratch);
    if (is_rows(transposed(f.weight))) return few_rows_across(kernel, f, start, scratch);
  }
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
  const bool in_place = few(b.weight, b.dy.rows) && b.dx;
  if (in_place && is_rows(b.weight)) {
    // Of few rows, dx is a sum over those of weight.
    narrow.all(b.threads);
    sums.add(b.dx, {{b.dy, b.weight}, {narrow.H, b.A}});
  } else if (in_place && is_rows(transposed(b.weight))) {
    narrow.all(b.threads);
    const Matrix H = copied(kernel, narrow.H, kernel.width, scratch);
    Few(kernel, b.dy, scratch).times(transposed(b.weight), H, transposed(b.A), nullptr, b.dx, b.threads);
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
