// Forward and backward of a layer as launches, for any engine. F = s·B·N, or s·B without N.
//   forward    T = x·Aᵀ                 y = x·Wᵀ + T·Fᵀ + bias
//   backward   H = dy·F, G = dy·B       dx = dy·W + H·A      dA = Hᵀ·x   dN = s·Gᵀ·T   dB = s·(dyᵀ·T)·Nᵀ
//
// An engine (launch.cu) has folds, product, gradients and finishes, one launch each, splits(m, n, w), the slices of a
// gradient, and sums_beyond(), whether its products sum the gradient of what P holds beyond the adapter.
#pragma once

#include <algorithm>

#include "gradient.h"
#include "product.h"

namespace nlora::cuda {

// Shapes as in csrc/ops.h. x, weight, bias, y and T are of one 16-bit dtype, A, B and core of any.
struct Forward {
  Matrix x, weight, A, B, core, bias;
  Matrix y, T;
  void* workspace;   // forward_bytes()
  float scaling;
  uint32_t* state;
};

// dx, dA, dB and dcore are made where they are given, the last three in any dtype. Where x or T would not be used, it
// may be missing.
struct Backward {
  Matrix dy, x, T, weight, A, B, core;
  Matrix dx, dA, dB, dcore;
  void* workspace;   // backward_bytes()
  float scaling;
  uint32_t* state;
};

inline Matrix columns_of(Matrix matrix, int64_t first, int64_t count) {
  matrix.data = static_cast<char*>(matrix.data) + first * (matrix.dtype == Dtype::kFloat32 ? 4 : 2);
  matrix.cols = count;
  return matrix;
}

// Hands out a workspace matrix by matrix. 8 divides their columns, so with rows filled up to 8 each begins on a line of
// 128 bytes.
struct Workspace {
  char* next;

  static int64_t filled_up(int64_t rows) { return (rows + 7) / 8 * 8; }
  Matrix take(Dtype dtype, int64_t rows, int64_t cols) {
    const Matrix matrix{next, dtype, rows, cols, cols, 1};
    next += filled_up(rows) * cols * (dtype == Dtype::kFloat32 ? 4 : 2);
    return matrix;
  }
};

// What the launch before the products makes: F, or [F | B], and A where they cannot read it as it lies.
struct Folds {
  Fold items[2];
  uint32_t count = 0;

  Matrix fold(const Matrix& B, const Matrix& core, float scaling, const Matrix& out) {
    items[count++] = {B, core, out, scaling};
    return out;
  }
  Matrix readable(const Matrix& A, Dtype dtype, Workspace& workspace) {
    return A.dtype == dtype && has_aligned_rows(A) ? A : fold(A, {}, 1, workspace.take(dtype, A.rows, A.cols));
  }
};

template <class Engine>
void forward(const Engine& engine, const Forward& f) {
  Workspace workspace{static_cast<char*>(f.workspace)};
  Folds folds;
  Product product;
  product.wide = folds.fold(f.B, f.core, f.scaling, workspace.take(f.x.dtype, f.B.rows, f.B.cols));
  product.shrink = folds.readable(f.A, f.x.dtype, workspace);
  product.wide_alone_is_new = folds.count == 1;
  engine.folds(folds.items, folds.count);
  product.a = f.x;
  product.b = f.weight;
  product.c = f.y;
  product.bias = f.bias;
  product.p = f.T;
  product.major = Major::K;
  product.state = f.state;
  engine.product(product);
}

// Slices of dN where the product for dx sums them: enough for its last wave, few enough to be added up soon.
inline int64_t product_splits(int64_t m) { return std::min<int64_t>((m + 63) / 64, 64); }

// Of the gradients that are wanted: dA is K wide, dB N, dN R.
template <class Engine>
int64_t slice_floats(const Engine& engine, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB, bool dcore) {
  const auto floats = [&](int64_t wide, bool wanted) { return wanted ? engine.splits(m, wide, r) * wide * r : 0; };
  return floats(k, dA) + floats(n, dB) + std::max(floats(r, dcore), dcore ? product_splits(m) * r * r : 0);
}

// [F | B] and [H | G], or F and H alone without dcore; room for A; the slices.
template <class Engine>
int64_t backward_bytes(const Engine& engine, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB, bool dcore) {
  const int64_t rows = n + Workspace::filled_up(m);
  return 2 * rows * (dcore ? 2 * r : r) + 2 * r * k + 4 * slice_floats(engine, m, k, n, r, dA, dB, dcore);
}

// c = a·b by tiles of the engine alone.
template <class Engine>
void multiply(const Engine& engine, const Matrix& a, const Matrix& b, const Matrix& c, uint32_t* state) {
  Product product;
  product.a = a;
  product.b = b;
  product.c = c;
  product.major = Major::MN;
  product.state = state;
  engine.product(product);
}

template <class Engine>
void backward(const Engine& engine, const Backward& g) {
  // The widest P that a product makes beside its result.
  constexpr int64_t kWidest = 256;
  const int64_t m = g.dy.rows, r = g.A.rows;
  const bool wants_h = g.dx || g.dA, wants_g = bool(g.dcore);
  const bool sums_core = engine.sums_beyond() && g.dx && wants_g && 2 * r <= kWidest;
  Workspace workspace{static_cast<char*>(g.workspace)};
  const int64_t width = wants_g ? 2 * r : r;
  Matrix folded, shrunk, core_sums, A;
  if (wants_h || wants_g) {
    Folds folds;
    folded = folds.fold(g.B, g.core, g.scaling, workspace.take(g.dy.dtype, g.B.rows, width));
    A = g.dx ? folds.readable(g.A, g.dy.dtype, workspace) : Matrix{};
    shrunk = workspace.take(g.dy.dtype, m, width);
    engine.folds(folds.items, folds.count);
  }
  if (g.dx) {
    const int64_t w = wants_g && 2 * r <= kWidest ? 2 * r : r;
    Product product;
    product.a = g.dy;
    product.b = g.weight;
    product.c = g.dx;
    product.p = columns_of(shrunk, 0, w);
    product.wide = A;
    product.shrink = columns_of(folded, 0, w);
    product.major = Major::MN;
    product.state = g.state;
    if (sums_core) {
      core_sums = workspace.take(Dtype::kFloat32, product_splits(m) * r, r);
      product.t = g.T;
      product.slices = core_sums;
    }
    engine.product(product);
    if (wants_g && w == r) {
      multiply(engine, g.dy, columns_of(folded, r, r), columns_of(shrunk, r, r), g.state);
    }
  } else if (wants_h || wants_g) {
    const int64_t first = wants_h ? 0 : r, count = wants_h && wants_g ? 2 * r : r;
    multiply(engine, g.dy, columns_of(folded, first, count), columns_of(shrunk, first, count), g.state);
  }
  Gradient gradients[3];
  Finish finishes[3];
  uint32_t count = 0;
  // out = scaling·wideᵀ·narrow·coreᵀ, or its transpose.
  const auto contract = [&](const Matrix& out, const Matrix& wide, const Matrix& narrow, const Matrix& core,
                            float scaling, bool transposed) {
    const int64_t n = wide.cols, w = narrow.cols, splits = engine.splits(wide.rows, n, w);
    const Matrix sums = workspace.take(Dtype::kFloat32, splits * n, w);
    gradients[count] = {wide, narrow, sums, uint32_t(splits)};
    finishes[count++] = {sums, uint32_t(splits), core, out, scaling, transposed};
  };
  if (g.dA) {
    contract(g.dA, g.x, columns_of(shrunk, 0, r), {}, 1, true);
  }
  if (g.dB) {
    contract(g.dB, g.dy, g.T, g.core, g.scaling, false);
  }
  if (wants_g && !sums_core) {
    contract(g.dcore, columns_of(shrunk, r, r), g.T, {}, g.scaling, false);
  }
  if (count) {
    engine.gradients(gradients, count);
  }
  if (sums_core) {
    finishes[count++] = {core_sums, uint32_t(product_splits(m)), {}, g.dcore, g.scaling, false};
  }
  if (count) {
    engine.finishes(finishes, count);
  }
}

}  // namespace nlora::cuda
