// The narrow products of adapters, and the gradients that follow from them.
#include "cpu/adapter.h"

#include <cstring>

namespace nlora::cpu {
namespace {

// Rows read at a time by sums: their pages stay within the first-level TLB.
constexpr int64_t kSumDepth = 64;
// Register tiles of rows up to which sums pay: for each they read the other side again, and convert it where it is not fp32.
constexpr int64_t kSumTiles = 16, kSumTilesConverted = 8;

// m, rows of fp32 padded with zeros, rounded.
Matrix in_bf16(const Kernels& kernel, const Matrix& m, Scratch& scratch) {
  const int64_t width = m.row_stride;
  const Matrix whole = {scratch.take(m.rows * width / 2), Dtype::kBFloat16, m.rows, width, width, 1};
  kernel.round(values(m), width, whole);
  return slice(whole, {0, m.rows}, {0, m.cols});
}

}  // namespace

void scale(const Matrix& m, float factor) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) values(m)[i * m.row_stride + j] *= factor;
}

Matrix square(int64_t R, Scratch& scratch) { return fp32(scratch.take(R * R), R, R, R); }

const float* row_vector(const Kernels& kernel, const Matrix& m, Scratch& scratch) {
  if (!m) return nullptr;
  if (m.dtype == Dtype::kFloat32 && m.col_stride == 1) return values(m);
  return values(copied(kernel, m, kernel.width, scratch));
}

Matrix padded(const Kernels& kernel, int64_t M, int64_t R, Scratch& scratch) {
  const int64_t cols = round_up(R, kernel.width);
  return fp32(scratch.take(M * cols), M, R, cols);
}

Chain::Chain(const Kernels& kernel, const Matrix& left, const Matrix& outer, const Matrix& core, float scaling,
             const Matrix& rounded, int pieces, Scratch& scratch)
    : kernel_(&kernel), left_(left), outer_(outer), core_(core), rounded_(rounded), scaling_(scaling), pieces_(pieces) {
  const int64_t R = outer ? outer.rows : left.cols;
  inner = outcome = padded(kernel, left.rows, R, scratch);
  if (rounded.dtype == Dtype::kFloat32 && rounded.row_stride == inner.row_stride && rounded.col_stride == 1) {
    inner = rounded, rounded_ = {};
  } else {
    inner = padded(kernel, left.rows, R, scratch);
  }
  const bool pairs = pieces == 1 && kernel.bf16_dots && left.dtype == Dtype::kBFloat16 && left.col_stride == 1;
  if (outer && skinny()) outer_ = copied(kernel, outer, pairs ? 2 * kernel.width : kernel.width, scratch);
  if (outer && skinny() && pairs) outer_ = in_bf16(kernel, outer_, scratch);
  if (core) core_ = copied(kernel, core, kernel.width, scratch), scale(core_, scaling);
}

void Chain::operator()(Range rows) const {
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

void Chain::all(int threads) const {
  const int64_t M = left_.rows;
  if (skinny()) {
    parallel(team(threads, M, inner.cols, left_.cols),
             [&](int index, int count) { (*this)(part(M, 12, index, count)); });
    return;
  }
  if (outer_) gemm({{left_, outer_}}, nullptr, inner, threads, pieces_);
  const Matrix& from = outer_ ? inner : left_;
  if (rounded_) kernel_->round(values(inner), inner.row_stride, rounded_);
  if (core_) return gemm({{from, core_}}, nullptr, outcome, threads, pieces_);
  copy(*kernel_, from, outcome);
  scale(outcome, scaling_);
}

void Chain::multiply(const Matrix& left, const Matrix& right, const Matrix& out) const {
  if (out.row_stride != out.cols) std::memset(out.data, 0, out.rows * out.row_stride * sizeof(float));
  (right.dtype == Dtype::kBFloat16 ? kernel_->bf16_dots : kernel_->dots)(dots(left, right, out));
}

void widen(const Kernels& kernel, const Matrix& left, const Matrix& right, const float* start, const Matrix& out,
           int threads, int pieces, Scratch& scratch) {
  if (left.cols > kSkinny) return gemm({{left, transposed(right)}}, start, out, threads, pieces);
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

Narrow::Narrow(const Kernels& kernel, const Backward& b, Scratch& scratch) {
  const Matrix& N = b.core.N;
  if (b.dx || b.dA || b.dcore) {
    from_dy_.emplace(kernel, b.dy, transposed(b.B), N ? transposed(N) : N, b.scaling, Matrix(), b.pieces, scratch);
    G = from_dy_->inner, H = from_dy_->outcome;
  }
  if (b.dB) {
    from_T_.emplace(kernel, b.T, Matrix(), N, b.scaling, Matrix(), b.pieces, scratch);
    P = from_T_->outcome;
  }
}

void Narrow::operator()(Range rows) const {
  if (from_dy_) (*from_dy_)(rows);
  if (from_T_) (*from_T_)(rows);
}

void Narrow::all(int threads) const {
  if (from_dy_) from_dy_->all(threads);
  if (from_T_) from_T_->all(threads);
}

bool summed(const Kernels& kernel, const Backward& b) {
  const int64_t R = b.A.rows;
  // NOTE: of fewer rows packing costs less than sums in memory, and what is packed AMX multiplies several times as fast, and
  // pairs twice.
  if (R <= kSkinny || b.dy.rows < R || tier() == Tier::kAmx || (kernel.pairs && b.pieces == 1)) return R <= kSkinny;
  return R <= kernel.tile_rows * (b.dy.dtype == Dtype::kFloat32 ? kSumTiles : kSumTilesConverted);
}

void rank_gradients(const Kernels& kernel, const Backward& b, const Narrow& narrow, Scratch& scratch) {
  if (b.dA) gemm({{transposed(narrow.H), transposed(b.x)}}, nullptr, b.dA, b.threads, b.pieces);
  if (b.dB) gemm({{transposed(b.dy), transposed(narrow.P)}}, nullptr, b.dB, b.threads, b.pieces);
  if (!b.dcore) return;
  const Matrix sums = square(b.A.rows, scratch);
  gemm({{transposed(narrow.G), transposed(b.T)}}, nullptr, sums, b.threads, b.pieces);
  scale(sums, b.scaling);
  kernel.round(values(sums), sums.row_stride, b.dcore.N);
}

// Sums

void Sums::start(int64_t rows, int64_t cols) {
  tasks_.push_back({{}, {}, fp32(scratch_.take(rows * cols), rows, cols, cols), nullptr});
}

void Sums::add(const Matrix& out, const std::vector<std::pair<Matrix, Matrix>>& products, const float* start) {
  if (!out) return;
  this->start(out.rows, out.cols);
  tasks_.back().begin = start;
  tasks_.back().results = {{out, {}, 1.0f}};
  for (const auto& [left, b] : products) {
    float* panels = scratch_.take(rows_of(left) * left.cols);
    packed_.push_back({left, panels});
    tasks_.back().terms.push_back({panels, b});
    work_ += left.rows * left.cols * b.cols;
  }
}

void Sums::add(const std::vector<Result>& results, const Matrix& b) {
  int64_t rows = 0;
  for (const Result& result : results)
    if (result.out) rows += rows_of(result.left);
  if (!rows) return;
  start(rows, b.cols);
  float* panels = scratch_.take(rows * b.rows);
  tasks_.back().terms = {{panels, b}};
  for (const Result& result : results) {
    if (!result.out) continue;
    tasks_.back().results.push_back(result);
    packed_.push_back({result.left, panels});
    panels += rows_of(result.left) * b.rows;
    work_ += result.left.rows * b.rows * b.cols;
  }
}

// One thread's part of the panels.
void Sums::pack(const Packed& packed, int index, int count) const {
  const Matrix& left = packed.left;
  const Range k = part(left.cols, kernel_.width, index, count);
  const Matrix from = slice(left, {0, left.rows}, k);
  kernel_.pack(from.data, from.dtype, from.row_stride, from.col_stride, from.rows, from.cols, kernel_.tile_rows,
               left.cols * kernel_.tile_rows, packed.panels + k.first * kernel_.tile_rows);
}

// Some columns of the sums. `edge` holds kSumDepth · tile_cols values.
void Sums::sum(const Task& task, Range cols, float* edge) const {
  const Matrix& sums = task.sums;
  const int64_t tile = kernel_.tile_cols, whole = cols.size / tile * tile;
  bool started = false;
  const auto add = [&](const Term& term, Range depth, const void* b, Dtype dtype, int64_t b_row, Range at) {
    Product p = {};
    p.a = term.panels + depth.first * kernel_.tile_rows, p.a_panel = term.b.rows * kernel_.tile_rows;
    p.b = b, p.b_dtype = dtype, p.b_strip = tile, p.b_row = b_row;
    p.c = values(sums) + at.first, p.c_row = sums.row_stride;
    p.init = started ? static_cast<float*>(p.c) : task.begin ? task.begin + at.first : nullptr;
    p.init_row = started ? sums.row_stride : 0;
    p.m = sums.rows, p.n = at.size, p.k = depth.size;
    kernel_.multiply(p);
  };
  for (const Term& term : task.terms) {
    for (int64_t k = 0; k < term.b.rows || (k == 0 && !started); k += kSumDepth) {
      const Range depth = {k, std::min(kSumDepth, term.b.rows - k)};
      const Matrix inner = slice(term.b, depth, {cols.first, whole});
      if (whole) add(term, depth, inner.data, inner.dtype, inner.row_stride, {cols.first, whole});
      if (whole < cols.size) {
        const Matrix rest = slice(term.b, depth, {cols.first + whole, cols.size - whole});
        kernel_.pack(rest.data, rest.dtype, 1, rest.row_stride, rest.cols, depth.size, int(tile), depth.size * tile,
                     edge);
        add(term, depth, edge, Dtype::kFloat32, tile, {cols.first + whole, cols.size - whole});
      }
      started = true;
    }
  }
}

// Some columns of the results.
void Sums::finish(const Task& task, Range cols) const {
  int64_t row = 0;
  for (const auto& [out, left, factor] : task.results) {
    const int64_t m = out.rows;
    const Matrix mine = slice(task.sums, {row, m}, cols), to = slice(out, {0, m}, cols);
    row += round_up(m, kernel_.tile_rows);
    if (!m) continue;
    if (factor != 1.0f) scale(mine, factor);
    if (to.dtype == Dtype::kFloat32 && to.row_stride == 1 && to.col_stride == m && m % kernel_.width == 0) {
      // NOTE: packing is what transposes in registers.
      kernel_.pack(mine.data, mine.dtype, mine.row_stride, 1, m, cols.size, int(m), cols.size * m, values(to));
    } else {
      kernel_.round(values(mine), mine.row_stride, to);
    }
  }
}

void Sums::run(int threads) {
  if (tasks_.empty()) return;
  const int64_t edge = kSumDepth * kernel_.tile_cols;
  float* edges = scratch_.take(edge * threads);
  parallel(team(threads, work_, 1, 1), [&](int index, int count) {
    for (const Packed& packed : packed_) pack(packed, index, count);
    barrier(count);
    for (const Task& task : tasks_) {
      const Range cols = part(task.sums.cols, kernel_.tile_cols, index, count);
      // As many columns at a time as leave their sums in the cache from one depth to the next.
      const int64_t rows = std::max<int64_t>(1, task.sums.rows);
      const int64_t fitting = second_level_cache() / 4 / int64_t(sizeof(float)) / rows;
      const int64_t width = std::max<int64_t>(1, fitting / kernel_.tile_cols) * kernel_.tile_cols;
      for (int64_t first = 0; first < cols.size; first += width) {
        const Range block = {cols.first + first, std::min(width, cols.size - first)};
        sum(task, block, edges + edge * index);
        finish(task, block);
      }
    }
  });
}

}  // namespace nlora::cpu
