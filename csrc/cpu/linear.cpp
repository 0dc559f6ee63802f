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

void scale(const Matrix& m, float factor) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) values(m)[i * m.row_stride + j] *= factor;
}

// Memory for an (R, R) matrix.
Matrix square(int64_t R, Scratch& scratch) { return fp32(scratch.take(R * R), R, R, R); }

// m in fp32 with its columns side by side: m itself, where it is so, or a copy.
const float* row_vector(const Kernels& kernel, const Matrix& m, Scratch& scratch) {
  if (!m) return nullptr;
  if (m.dtype == Dtype::kFloat32 && m.col_stride == 1) return values(m);
  return values(copied(kernel, m, kernel.width, scratch));
}

// A sum over the rows of b, weighted by left: left·b for a left of few rows.
struct Sum {
  Matrix left;  // (m, k)
  Matrix b;  // (k, n), columns side by side
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
void sum(const Kernels& kernel, const Sum (&parts)[2], const Matrix& sums, Range cols, float factor, float* edge,
         const Matrix& out) {
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
    if (!part.panels) break;
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
  if (factor != 1.0f) scale(mine, factor);
  const Matrix to = slice(out, {0, m}, cols);
  if (to.dtype == Dtype::kFloat32 && to.row_stride == 1 && to.col_stride == m && m % kernel.width == 0) {
    // NOTE: packing is what transposes in registers.
    kernel.pack(mine.data, mine.dtype, mine.row_stride, 1, m, cols.size, int(m), cols.size * m, values(to));
  } else {
    kernel.round(values(mine), mine.row_stride, to);
  }
}

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

// An (M, R) matrix in fp32 whose rows are padded to the vector width.
Matrix padded(const Kernels& kernel, int64_t M, int64_t R, Scratch& scratch) {
  const int64_t cols = round_up(R, kernel.width);
  return fp32(scratch.take(M * cols), M, R, cols);
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
  const Matrix sums = padded(kernel, M, R, scratch);
  const int64_t width = sums.row_stride;
  std::memset(sums.data, 0, M * width * sizeof(float));
  run(times_x(f.A, transposed(sums)));
  kernel.round(values(sums), width, f.T);
  Matrix P = sums;
  if (f.core.N) {
    P = padded(kernel, M, R, scratch);
    std::memset(P.data, 0, M * width * sizeof(float));
    kernel.dots(dots(sums, copied(kernel, f.core.N, kernel.width, scratch), P));
  }
  scale(P, f.scaling);
  const Matrix right = padded(kernel, N, R, scratch);
  const bool in_place = y.dtype == Dtype::kFloat32;
  const Matrix result = in_place ? y : fp32(scratch.take(M * N), M, N, N);
  parallel(team(f.threads, M, x.cols, N), [&](int index, int count) {
    const Range cols = part(N, 16, index, count);
    const Matrix mine = slice(right, cols, {0, R}), from = slice(f.B, cols, {0, R});
    kernel.pack(from.data, from.dtype, from.col_stride, from.row_stride, R, cols.size, int(width), cols.size * width,
                values(mine));
    const Matrix out = slice(result, {0, M}, cols);
    Dots d = times_x(slice(f.weight, cols, {0, x.cols}), transposed(out));
    d.extra_rows = values(mine), d.extra_cols = values(P), d.extra = width;
    d.start = bias ? bias + cols.first : nullptr;
    run(d);
    if (!in_place) kernel.round(values(out), out.row_stride, slice(y, {0, M}, cols));
  });
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
      parallel(team(threads, M, inner.cols, left_.cols),
               [&](int index, int count) { (*this)(part(M, 12, index, count)); });
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

// The narrow matrices of a backward: those of G = dy·B, H = s·G·N and P = s·T·Nᵀ that a gradient needs.
class Narrow {
 public:
  Matrix G, H, P;

  Narrow(const Kernels& kernel, const Backward& b, Scratch& scratch) {
    const Matrix& N = b.core.N;
    if (b.dx || b.dA || b.dcore) {
      from_dy_.emplace(kernel, b.dy, transposed(b.B), N ? transposed(N) : N, b.scaling, Matrix(), scratch);
      G = from_dy_->inner, H = from_dy_->outcome;
    }
    if (b.dB) {
      from_T_.emplace(kernel, b.T, Matrix(), N, b.scaling, Matrix(), scratch);
      P = from_T_->outcome;
    }
  }

  // Some rows, where the rank is small.
  void operator()(Range rows) const {
    if (from_dy_) (*from_dy_)(rows);
    if (from_T_) (*from_T_)(rows);
  }

  void all(int threads) const {
    if (from_dy_) from_dy_->all(threads);
    if (from_T_) from_T_->all(threads);
  }

 private:
  std::optional<Chain> from_dy_, from_T_;
};

// dx = dy·W + H·A, or H·A alone, with `narrow` on the way.
void input_gradient(const Kernels& kernel, const Backward& b, const Narrow& narrow, Scratch& scratch) {
  const auto all = [&](const Prepare* prepare) {
    gemm({{b.dy, transposed(b.weight)}, {narrow.H, transposed(b.A)}}, nullptr, b.dx, b.threads, prepare);
  };
  if (b.dx && b.weight && b.A.rows <= kSkinny) {
    const Prepare prepare = [&](Range rows) { narrow(rows); };
    return all(&prepare);
  }
  narrow.all(b.threads);
  if (b.dx && b.weight) return all(nullptr);
  if (b.dx) widen(kernel, narrow.H, b.A, nullptr, b.dx, b.threads, scratch);
}

// dA, dB and dN of a rank that is not small.
void rank_gradients(const Kernels& kernel, const Backward& b, const Narrow& narrow, Scratch& scratch) {
  if (b.dA) gemm({{transposed(narrow.H), transposed(b.x)}}, nullptr, b.dA, b.threads);
  if (b.dB) gemm({{transposed(b.dy), transposed(narrow.P)}}, nullptr, b.dB, b.threads);
  if (!b.dcore) return;
  const Matrix sums = square(b.A.rows, scratch);
  gemm({{transposed(narrow.G), transposed(b.T)}}, nullptr, sums, b.threads);
  scale(sums, b.scaling);
  kernel.round(values(sums), sums.row_stride, b.dcore.N);
}

// Gradients that are sums of rows weighted by few columns, all in one parallel region. Each thread has its own columns of
// each, so that nothing is added up across threads.
class Sums {
 public:
  Sums(const Kernels& kernel, Scratch& scratch) : kernel_(kernel), scratch_(scratch) {}

  // out = factor · Σ left·b
  void add(const Matrix& out, float factor, std::initializer_list<std::pair<Matrix, Matrix>> products) {
    if (!out) return;
    Task& task = tasks_[count_++];
    task.partial = fp32(scratch_.take(out.rows * out.cols), out.rows, out.cols, out.cols);
    task.out = out, task.factor = factor;
    Sum* sum = task.sums;
    for (const auto& [left, b] : products) {
      *sum++ = weighted(kernel_, left, b, scratch_);
      work_ += left.rows * left.cols * b.cols;
    }
  }

  void run(int threads) {
    if (!count_) return;
    const int64_t edge = kSumDepth * kernel_.tile_cols;
    float* edges = scratch_.take(edge * threads);
    parallel(team(threads, work_, 1, 1), [&](int index, int count) {
      for (int i = 0; i < count_; ++i)
        for (const Sum& each : tasks_[i].sums)
          if (each.panels) pack(kernel_, each, index, count);
      barrier(count);
      for (int i = 0; i < count_; ++i) {
        const Task& task = tasks_[i];
        const Range cols = part(task.out.cols, kernel_.tile_cols, index, count);
        sum(kernel_, task.sums, task.partial, cols, task.factor, edges + edge * index, task.out);
      }
    });
  }

 private:
  struct Task {
    Sum sums[2];
    Matrix partial, out;
    float factor;
  };

  const Kernels& kernel_;
  Scratch& scratch_;
  Task tasks_[5] = {};
  int count_ = 0;
  int64_t work_ = 0;
};

}  // namespace

void forward(Forward f) {
  if (!f.x.rows) return;
  if (forked()) f.threads = 1;
  const Kernels& kernel = kernels();
  Scratch scratch;
  if (f.core.u) f.core.N = square(f.A.rows, scratch), lora2_core(f.core, f.core.N);
  const float* start = row_vector(kernel, f.bias, scratch);
  if (f.weight && f.x.rows <= kFewRows) return few_rows(kernel, f, start, scratch);
  const Chain chain(kernel, f.x, f.A, f.core.N, f.scaling, f.T, scratch);
  const Prepare prepare = [&](Range rows) { chain(rows); };
  const bool fused = f.weight && chain.skinny();
  if (!fused) chain.all(f.threads);
  if (!f.weight) return widen(kernel, chain.outcome, transposed(f.B), start, f.y, f.threads, scratch);
  gemm({{f.x, f.weight}, {chain.outcome, f.B}}, start, f.y, f.threads, fused ? &prepare : nullptr);
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
  if (b.weight && b.dy.rows <= kFewRows) {
    // Of few rows, dx is a sum over those of weight.
    narrow.all(b.threads);
    sums.add(b.dx, 1.0f, {{b.dy, b.weight}, {narrow.H, b.A}});
  } else {
    input_gradient(kernel, b, narrow, scratch);
  }
  if (b.dweight) gemm({{transposed(b.dy), transposed(b.x)}}, nullptr, b.dweight, b.threads);
  if (R > kSkinny) {
    rank_gradients(kernel, b, narrow, scratch);
  } else {
    sums.add(b.dA, 1.0f, {{transposed(narrow.H), b.x}});
    sums.add(transposed(b.dB), 1.0f, {{transposed(narrow.P), b.dy}});
    sums.add(b.dcore.N, b.scaling, {{transposed(narrow.G), b.T}});
  }
  if (b.dbias) {
    const Matrix ones = fp32(scratch.take(b.dy.rows), 1, b.dy.rows, b.dy.rows);
    std::fill_n(values(ones), ones.cols, 1.0f);
    sums.add(b.dbias, 1.0f, {{ones, b.dy}});
  }
  sums.run(b.threads);
  if (b.dcore.u) lora2_core_backward(b.dcore.N, b.core, b.dcore);
}

}  // namespace nlora::cpu
