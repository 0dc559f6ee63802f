// y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ and its gradients.
//
// The rule that picks a product's kernel: up to kSkinny rows or columns on one side go to dots or sums, which read the
// other side in place; everything else is packed and goes to gemm. With x's few rows the whole layer is such a product.
#include <cstring>
#include <optional>

#include "cpu/gemm.h"

namespace nlora::cpu {
namespace {

constexpr int64_t kSkinny = 32;
constexpr int64_t kFewRows = 16;
// Rows read at a time by sums: their pages stay within the first-level TLB.
constexpr int64_t kSumDepth = 64;
// Multiply-adds below which waking the other threads costs more than it saves.
constexpr int64_t kSerial = 1 << 17;

// The few multiply-adds of a product of three sizes are not worth a team of threads.
int team(int threads, int64_t a, int64_t b, int64_t c) { return a * b * c < kSerial ? 1 : threads; }

float* values(const Matrix& m) { return static_cast<float*>(m.data); }

// Into fp32, with zeros up to the end of its rows.
void copy(const Kernels& kernel, const Matrix& from, const Matrix& to) {
  kernel.pack(from.data, from.dtype, from.col_stride, from.row_stride, from.cols, from.rows, int(to.row_stride),
              from.rows * to.row_stride, values(to));
}

// m in fp32, rows padded with zeros to a multiple of unit.
Matrix copied(const Kernels& kernel, const Matrix& m, int64_t unit, Scratch& scratch) {
  const int64_t cols = round_up(m.cols, unit);
  const Matrix result = fp32(scratch.take(m.rows * cols), m.rows, m.cols, cols);
  copy(kernel, m, result);
  return result;
}

void scale(const Matrix& m, float factor) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.row_stride; ++j) values(m)[i * m.row_stride + j] *= factor;
}

// out = rows·colsᵀ for fp32 cols padded to the vector width.
Dots dots(const Matrix& rows, const Matrix& cols, const Matrix& out) {
  Dots d = {};
  d.rows = rows.data, d.dtype = rows.dtype, d.row = rows.row_stride;
  d.cols = values(cols), d.col = cols.row_stride;
  d.out = values(out), d.out_row = out.row_stride, d.out_col = out.col_stride;
  d.m = rows.rows, d.n = cols.rows, d.k = rows.cols;
  return d;
}

// m in fp32 with its columns side by side: m itself, where it is so, or a copy.
const float* row_vector(const Kernels& kernel, const Matrix& m, Scratch& scratch) {
  if (!m) return nullptr;
  if (m.dtype == Dtype::kFloat32 && m.col_stride == 1) return values(m);
  return values(copied(kernel, m, kernel.width, scratch));
}

// A sum over the rows of b, weighted by left: left·b for a left of few rows.
struct Sum {
  Matrix left;    // (m, k)
  Matrix b;       // (k, n), columns side by side
  float* panels;  // of left: [ceil(m / tile_rows)][k][tile_rows]
};

Sum weighted(const Kernels& kernel, const Matrix& left, const Matrix& b, Scratch& scratch) {
  return {left, b, scratch.take(round_up(left.rows, kernel.tile_rows) * left.cols)};
}

// One thread's part of a sum's panels.
void pack(const Kernels& kernel, const Sum& sum, int index, int count) {
  const Range k = part(sum.left.cols, kernel.width, index, count);
  const Matrix from = slice(sum.left, {0, sum.left.rows}, k);
  kernel.pack(from.data, from.dtype, from.row_stride, from.col_stride, from.rows, from.cols, kernel.tile_rows,
              sum.left.cols * kernel.tile_rows, sum.panels + k.first * kernel.tile_rows);
}

// out[:, cols] = factor · Σ left·b, through `sums` (m, n) in fp32. `edge` holds kSumDepth · tile_cols values.
void sum(const Kernels& kernel, std::initializer_list<Sum> parts, const Matrix& sums, Range cols, float factor,
         float* edge, const Matrix& out) {
  const int64_t m = out.rows, tile = kernel.tile_cols, whole = cols.size / tile * tile;
  bool started = false;
  const auto add = [&](const Sum& part, Range depth, const void* b, Dtype dtype, int64_t b_row, Range at) {
    Product p = {};
    p.a = part.panels + depth.first * kernel.tile_rows, p.a_panel = part.b.rows * kernel.tile_rows;
    p.b = b, p.b_dtype = dtype, p.b_strip = tile, p.b_row = b_row;
    p.c = values(sums) + at.first, p.c_row = sums.row_stride;
    p.init = started ? static_cast<float*>(p.c) : nullptr, p.init_row = sums.row_stride;
    p.m = m, p.n = at.size, p.k = depth.size;
    kernel.multiply(p);
  };
  for (const Sum& part : parts) {
    for (int64_t k = 0; k < part.b.rows || (k == 0 && !started); k += kSumDepth) {
      const Range depth = {k, std::min(kSumDepth, part.b.rows - k)};
      const Matrix inner = slice(part.b, depth, {cols.first, whole});
      if (whole) add(part, depth, inner.data, inner.dtype, inner.row_stride, {cols.first, whole});
      if (whole < cols.size) {
        const Matrix rest = slice(part.b, depth, {cols.first + whole, cols.size - whole});
        kernel.pack(rest.data, rest.dtype, 1, rest.row_stride, rest.cols, depth.size, int(tile), depth.size * tile,
                    edge);
        add(part, depth, edge, Dtype::kFloat32, tile, {cols.first + whole, cols.size - whole});
      }
      started = true;
    }
  }
  const Matrix mine = slice(sums, {0, m}, cols);
  if (factor != 1.0f)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < cols.size; ++j) values(mine)[i * mine.row_stride + j] *= factor;
  const Matrix to = slice(out, {0, m}, cols);
  if (to.dtype == Dtype::kFloat32 && to.row_stride == 1 && to.col_stride == m && m % kernel.width == 0) {
    // NOTE: packing is what transposes in registers.
    kernel.pack(mine.data, mine.dtype, mine.row_stride, 1, m, cols.size, int(m), cols.size * m, values(to));
  } else {
    kernel.round(values(mine), mine.row_stride, to);
  }
}

// y for few rows of x: W is read once, in place, and the adapter's r is a continuation of its k.
void few_rows(const Kernels& kernel, const Matrix& x, const Matrix& weight, const Matrix& A, const Matrix& B,
              const Matrix& core, const float* bias, const Matrix& y, const Matrix& T, float scaling, int threads,
              Scratch& scratch) {
  const int64_t M = x.rows, R = A.rows, N = y.cols, padded = round_up(R, kernel.width);
  const bool fits = x.dtype == Dtype::kFloat32 && x.col_stride == 1 && x.cols % kernel.width == 0;
  const Matrix left = fits ? x : copied(kernel, x, kernel.width, scratch);
  const Matrix sums = fp32(scratch.take(M * padded), M, R, padded);
  std::memset(sums.data, 0, M * padded * sizeof(float));
  kernel.dots(dots(A, left, transposed(sums)));
  kernel.round(values(sums), padded, T);
  Matrix P = sums;
  if (core) {
    P = fp32(scratch.take(M * padded), M, R, padded);
    std::memset(P.data, 0, M * padded * sizeof(float));
    kernel.dots(dots(sums, copied(kernel, core, kernel.width, scratch), P));
  }
  scale(P, scaling);
  const Matrix right = fp32(scratch.take(N * padded), N, R, padded);
  const bool in_place = y.dtype == Dtype::kFloat32;
  const Matrix result = in_place ? y : fp32(scratch.take(M * N), M, N, N);
  parallel(threads, [&](int index, int count) {
    const Range cols = part(N, 16, index, count);
    const Matrix mine = slice(right, cols, {0, R}), from = slice(B, cols, {0, R});
    kernel.pack(from.data, from.dtype, from.col_stride, from.row_stride, R, cols.size, int(padded), cols.size * padded,
                values(mine));
    const Matrix out = slice(result, {0, M}, cols);
    Dots d = dots(slice(weight, cols, {0, weight.cols}), left, transposed(out));
    d.extra_rows = values(mine), d.extra_cols = values(P), d.extra = padded;
    d.start = bias ? bias + cols.first : nullptr;
    kernel.dots(d);
    if (!in_place) kernel.round(values(out), out.row_stride, slice(y, {0, M}, cols));
  });
}

// An (M, R) matrix in fp32 whose rows are padded to the vector width.
Matrix padded(const Kernels& kernel, int64_t M, int64_t R, Scratch& scratch) {
  const int64_t cols = round_up(R, kernel.width);
  return fp32(scratch.take(M * cols), M, R, cols);
}

// The adapter's narrow products: inner = left·outerᵀ, or left itself, and outcome = s·inner·coreᵀ. Where inner is wanted
// outside too, it is rounded to `rounded`, or is computed there.
class Chain {
 public:
  Matrix inner, outcome;

  Chain(const Kernels& kernel, const Matrix& left, const Matrix& outer, const Matrix& core, float scaling,
        const Matrix& rounded, Scratch& scratch)
      : kernel_(&kernel), left_(left), outer_(outer), core_(core), rounded_(rounded), scaling_(scaling) {
    const int64_t R = outer ? outer.rows : left.cols;
    inner = outcome = padded(kernel, left.rows, R, scratch);
    if (rounded.dtype == Dtype::kFloat32 && rounded.row_stride == inner.row_stride && rounded.col_stride == 1) {
      inner = rounded, rounded_ = {};
    } else {
      inner = padded(kernel, left.rows, R, scratch);
    }
    if (outer && skinny()) outer_ = copied(kernel, outer, kernel.width, scratch);
    if (core) core_ = copied(kernel, core, kernel.width, scratch), scale(core_, scaling);
  }

  bool skinny() const { return inner.cols <= kSkinny; }

  // Some rows of a skinny chain.
  void operator()(Range rows) const {
    const Matrix from = slice(left_, rows, {0, left_.cols}), to = slice(inner, rows, {0, inner.cols});
    if (outer_) {
      multiply(from, outer_, to);
    } else {
      copy(*kernel_, from, to);
    }
    const Matrix next = slice(outcome, rows, {0, outcome.cols});
    if (rounded_) kernel_->round(values(to), to.row_stride, slice(rounded_, rows, {0, inner.cols}));
    // NOTE: inner's padding is multiplied too, so that no row ends within a register.
    if (core_) return multiply(fp32(values(to), to.rows, to.row_stride, to.row_stride), core_, next);
    for (int64_t i = 0; i < rows.size * to.row_stride; ++i) values(next)[i] = scaling_ * values(to)[i];
  }

  void all(int threads) const {
    const int64_t M = left_.rows;
    if (skinny()) {
      parallel(team(threads, M, inner.cols, left_.cols), [&](int index, int count) { (*this)(part(M, 12, index, count)); });
      return;
    }
    if (outer_) gemm({{left_, outer_}}, nullptr, inner, threads);
    const Matrix& from = outer_ ? inner : left_;
    if (rounded_) kernel_->round(values(inner), inner.row_stride, rounded_);
    if (core_) return gemm({{from, core_}}, nullptr, outcome, threads);
    copy(*kernel_, from, outcome);
    scale(outcome, scaling_);
  }

 private:
  void multiply(const Matrix& left, const Matrix& right, const Matrix& out) const {
    if (out.row_stride != out.cols) std::memset(out.data, 0, out.rows * out.row_stride * sizeof(float));
    kernel_->dots(dots(left, right, out));
  }

  const Kernels* kernel_;
  Matrix left_, outer_, core_, rounded_;
  float scaling_;
};

// out = start + left·right for a left (m, r) of few columns: out is written once and never read.
void widen(const Kernels& kernel, const Matrix& left, const Matrix& right, const float* start, const Matrix& out,
           int threads, Scratch& scratch) {
  if (left.cols > kSkinny) return gemm({{left, transposed(right)}}, start, out, threads);
  const Matrix b = copied(kernel, right, kernel.tile_cols, scratch);
  const int64_t tile = kernel.tile_rows;
  float* panels = scratch.take(round_up(left.rows, tile) * left.cols);
  parallel(team(threads, out.rows, out.cols, left.cols), [&](int index, int count) {
    const Range rows = part(out.rows, tile, index, count);
    const Matrix mine = slice(left, rows, {0, left.cols}), to = slice(out, rows, {0, out.cols});
    Product p = {};
    float* a = panels + rows.first * left.cols;
    kernel.pack(mine.data, mine.dtype, mine.row_stride, mine.col_stride, mine.rows, mine.cols, kernel.tile_rows,
                mine.cols * kernel.tile_rows, a);
    p.a = a, p.a_panel = left.cols * tile, p.b = b.data, p.b_strip = kernel.tile_cols, p.b_row = b.row_stride;
    p.init = start;
    p.c = to.data, p.c_dtype = to.dtype, p.c_row = to.row_stride;
    p.m = to.rows, p.n = to.cols, p.k = left.cols;
    kernel.multiply(p);
  });
}

}  // namespace

void forward(const Matrix& x, const Matrix& weight, const Matrix& A, const Matrix& B, const Matrix& core,
             const Matrix& bias, const Matrix& y, const Matrix& T, float scaling, int threads) {
  if (!x.rows) return;
  if (forked()) threads = 1;
  const Kernels& kernel = kernels();
  Scratch scratch;
  const float* start = row_vector(kernel, bias, scratch);
  if (weight && x.rows <= kFewRows) {
    threads = team(threads, x.rows, x.cols, y.cols);
    return few_rows(kernel, x, weight, A, B, core, start, y, T, scaling, threads, scratch);
  }
  const Chain chain(kernel, x, A, core, scaling, T, scratch);
  const Prepare prepare = [&](Range rows) { chain(rows); };
  const bool fused = weight && chain.skinny();
  if (!fused) chain.all(threads);
  if (!weight) return widen(kernel, chain.outcome, transposed(B), start, y, threads, scratch);
  gemm({{x, weight}, {chain.outcome, B}}, start, y, threads, fused ? &prepare : nullptr);
}

void backward(const Matrix& dy, const Matrix& x, const Matrix& T, const Matrix& weight, const Matrix& A, const Matrix& B,
              const Matrix& core, const Matrix& dx, const Matrix& dweight, const Matrix& dA, const Matrix& dB,
              const Matrix& dcore, const Matrix& dbias, float scaling, int threads) {
  if (forked()) threads = 1;
  const Kernels& kernel = kernels();
  Scratch scratch;
  const int64_t M = dy.rows, K = A.cols, N = dy.cols, R = A.rows;
  const bool few = M <= kFewRows && weight, narrow_rank = R <= kSkinny;
  const Matrix turned = core ? transposed(core) : core;
  std::optional<Chain> to_dy, to_T;
  Matrix G, H, P, ones;
  if (dx || dA || dcore) {
    to_dy.emplace(kernel, dy, transposed(B), turned, scaling, Matrix(), scratch);
    G = to_dy->inner, H = to_dy->outcome;
  }
  if (dB) {
    to_T.emplace(kernel, T, Matrix(), core, scaling, Matrix(), scratch);
    P = to_T->outcome;
  }
  const Prepare prepare = [&](Range rows) {
    if (to_dy) (*to_dy)(rows);
    if (to_T) (*to_T)(rows);
  };

  // Products of many rows.
  if (dx && weight && !few && narrow_rank) {
    gemm({{dy, transposed(weight)}, {H, transposed(A)}}, nullptr, dx, threads, &prepare);
  } else {
    if (narrow_rank) {
      parallel(team(threads, M, N, R), [&](int index, int count) { prepare(part(M, 12, index, count)); });
    } else {
      if (to_dy) to_dy->all(threads);
      if (to_T) to_T->all(threads);
    }
    if (dx && !weight) widen(kernel, H, A, nullptr, dx, threads, scratch);
    if (dx && weight && !few) gemm({{dy, transposed(weight)}, {H, transposed(A)}}, nullptr, dx, threads);
  }
  if (dweight) gemm({{transposed(dy), transposed(x)}}, nullptr, dweight, threads);
  if (!narrow_rank) {
    if (dA) gemm({{transposed(H), transposed(x)}}, nullptr, dA, threads);
    if (dB) gemm({{transposed(dy), transposed(P)}}, nullptr, dB, threads);
    if (dcore) {
      const Matrix sums = fp32(scratch.take(R * R), R, R, R);
      gemm({{transposed(G), transposed(T)}}, nullptr, sums, threads);
      scale(sums, scaling);
      kernel.round(values(sums), R, dcore);
    }
  }

  // Sums over rows, each thread its own columns of each, so that nothing is added up across threads.
  const auto columns = [&](const Matrix& out) { return fp32(scratch.take(out.rows * out.cols), out.rows, out.cols, out.cols); };
  const bool sum_dx = dx && few, sum_dA = dA && narrow_rank, sum_dB = dB && narrow_rank, sum_dcore = dcore && narrow_rank;
  if (!sum_dx && !sum_dA && !sum_dB && !sum_dcore && !dbias) return;
  Sum from_dy = {}, from_H = {}, to_dA = {}, to_dB = {}, to_dcore = {}, to_dbias = {};
  Matrix dx_sums, dA_sums, dB_sums, dcore_sums, dbias_sums;
  if (sum_dx) {
    from_dy = weighted(kernel, dy, weight, scratch), from_H = weighted(kernel, H, A, scratch);
    dx_sums = columns(dx);
  }
  if (sum_dA) to_dA = weighted(kernel, transposed(H), x, scratch), dA_sums = columns(dA);
  if (sum_dB) to_dB = weighted(kernel, transposed(P), dy, scratch), dB_sums = columns(transposed(dB));
  if (sum_dcore) to_dcore = weighted(kernel, transposed(G), T, scratch), dcore_sums = columns(dcore);
  if (dbias) {
    ones = fp32(scratch.take(M), 1, M, M);
    std::fill_n(values(ones), M, 1.0f);
    to_dbias = weighted(kernel, ones, dy, scratch), dbias_sums = columns(dbias);
  }
  const int64_t edge = kSumDepth * kernel.tile_cols;
  float* edges = scratch.take(edge * threads);
  const int64_t rows = (sum_dx ? N : 0) + (sum_dA || sum_dB ? R : 1);
  parallel(team(threads, M, K + N, rows), [&](int index, int count) {
    const Range in = part(K, kernel.tile_cols, index, count), out = part(N, kernel.tile_cols, index, count);
    float* mine = edges + edge * index;
    for (const Sum* each : {&from_dy, &from_H, &to_dA, &to_dB, &to_dcore, &to_dbias})
      if (each->panels) pack(kernel, *each, index, count);
    barrier(count);
    if (sum_dx) sum(kernel, {from_dy, from_H}, dx_sums, in, 1.0f, mine, dx);
    if (sum_dA) sum(kernel, {to_dA}, dA_sums, in, 1.0f, mine, dA);
    if (sum_dB) sum(kernel, {to_dB}, dB_sums, out, 1.0f, mine, transposed(dB));
    if (dbias) sum(kernel, {to_dbias}, dbias_sums, out, 1.0f, mine, dbias);
    if (sum_dcore) sum(kernel, {to_dcore}, dcore_sums, part(R, kernel.tile_cols, index, count), scaling, mine, dcore);
  });
}

}  // namespace nlora::cpu
