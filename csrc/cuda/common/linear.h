// Forward and backward of layers that share x, or of one, as launches, for any engine. F = s·B·N, or s·B without N.
//   forward    T = x·Aᵀ                 y = x·Wᵀ + T·Fᵀ + bias
//   backward   H = dy·F, G = dy·B       dx = Σ dy·W + H·A    dA = Hᵀ·x   dN = s·Gᵀ·T   dB = s·(dyᵀ·T)·Nᵀ
//
// An engine (launch.cu) has folds, products, gradients and finishes, one launch each for a layer, splits(m, n, w), the
// slices of a gradient, and sums_beyond(), whether its products sum the gradient of what P holds beyond the adapter.
#pragma once

#include <algorithm>

#include "gradient.h"
#include "product.h"

namespace nlora::cuda {

// What the launches of a call share.
struct Shared {
  void* workspace;   // forward_bytes() or backward_bytes() of all its layers
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
  Fold items[2 * kMostProducts];
  uint32_t count = 0;

  Matrix fold(const Matrix& B, const Matrix& core, float scaling, const Matrix& out) {
    items[count++] = {B, core, out, scaling};
    return out;
  }
  Matrix readable(const Matrix& A, Dtype dtype, Workspace& workspace) {
    return A.dtype == dtype && has_aligned_rows(A) ? A : fold(A, {}, 1, workspace.take(dtype, A.rows, A.cols));
  }
};

// What the launches of a group are given is checked once, here.
inline void check_layers(size_t count) {
  if (count < 1 || count > kMostProducts) {
    throw std::invalid_argument("a group has 1 to " + std::to_string(kMostProducts) + " layers, got " +
                                std::to_string(count));
  }
}

template <class Engine>
void forward(const Engine& engine, const Forward* layers, size_t count, const Shared& shared) {
  check_layers(count);
  Workspace workspace{static_cast<char*>(shared.workspace)};
  Folds folds;
  Product products[kMostProducts];
  uint32_t adapters = 0;
  for (size_t i = 0; i < count; ++i) {
    const Forward& f = layers[i];
    Product& product = products[i];
    product.a = f.x;
    product.b = f.weight;
    product.c = f.y;
    product.bias = f.bias;
    product.major = Major::K;
    product.state = shared.state;
    if (f.A) {
      ++adapters;
      product.p = f.T;
      product.wide = folds.fold(f.B, f.core, f.scaling, workspace.take(f.x.dtype, f.B.rows, f.B.cols));
      product.shrink = folds.readable(f.A, f.x.dtype, workspace);
    }
  }
  if (folds.count) {
    engine.folds(folds.items, folds.count);
  }
  for (size_t i = 0; i < count; ++i) {
    products[i].wide_alone_is_new = adapters && folds.count == adapters;
  }
  engine.products(products, uint32_t(count));
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
  engine.products(&product, 1);
}

// The narrow gradients of all layers, and what makes them of their sums.
struct Narrow {
  // dA, dB and dcore of every layer.
  static constexpr uint32_t kMost = 3 * kMostProducts;

  Gradient gradients[kMost];
  Finish finishes[kMost];
  uint32_t gradient_count = 0, finish_count = 0;
};

template <class Engine>
void backward(const Engine& engine, const Backward* layers, size_t count, const Shared& shared) {
  // The widest P that a product makes beside its result.
  constexpr int64_t kWidest = 256;
  check_layers(count);
  Workspace workspace{static_cast<char*>(shared.workspace)};
  // What a layer's adapter is made of: [F | B], [H | G], A, and sums of dcore by the product.
  struct Adapter {
    Matrix folded, shrunk, A, core_sums;
    bool wants_h, wants_g;
  } adapters[kMostProducts];
  Folds folds;
  for (size_t i = 0; i < count; ++i) {
    const Backward& g = layers[i];
    Adapter& adapter = adapters[i];
    adapter.wants_h = g.A && (g.dx || g.dA);
    adapter.wants_g = bool(g.dcore);
    if (adapter.wants_h || adapter.wants_g) {
      const int64_t width = (adapter.wants_g ? 2 : 1) * g.A.rows;
      adapter.folded = folds.fold(g.B, g.core, g.scaling, workspace.take(g.dy.dtype, g.B.rows, width));
      adapter.A = g.dx ? folds.readable(g.A, g.dy.dtype, workspace) : Matrix{};
      adapter.shrunk = workspace.take(g.dy.dtype, g.dy.rows, width);
    }
  }
  if (folds.count) {
    engine.folds(folds.items, folds.count);
  }
  Product products[kMostProducts];
  for (size_t i = 0; i < count; ++i) {
    const Backward& g = layers[i];
    Adapter& adapter = adapters[i];
    const int64_t m = g.dy.rows, r = g.A.rows;
    // G by the product for dx, or by itself.
    const bool beside = g.dx && adapter.wants_g && 2 * r <= kWidest;
    if (g.dx) {
      Product& product = products[i];
      product.a = g.dy;
      product.b = g.weight;
      product.c = g.dx;
      product.major = Major::MN;
      product.state = shared.state;
      if (adapter.wants_h) {
        const int64_t w = beside ? 2 * r : r;
        product.p = columns_of(adapter.shrunk, 0, w);
        product.wide = adapter.A;
        product.shrink = columns_of(adapter.folded, 0, w);
      }
      if (beside && engine.sums_beyond()) {
        adapter.core_sums = workspace.take(Dtype::kFloat32, product_splits(m) * r, r);
        product.t = g.T;
        product.slices = adapter.core_sums;
      }
    }
  }
  if (layers->dx) {
    engine.products(products, uint32_t(count));
  }
  Narrow narrow;
  // out = scaling·wideᵀ·narrow·coreᵀ, or its transpose.
  const auto contract = [&](const Matrix& out, const Matrix& wide, const Matrix& of, const Matrix& core, float scaling,
                            bool transposed) {
    const int64_t n = wide.cols, w = of.cols, splits = engine.splits(wide.rows, n, w);
    const Matrix sums = workspace.take(Dtype::kFloat32, splits * n, w);
    narrow.gradients[narrow.gradient_count++] = {wide, of, sums, uint32_t(splits)};
    narrow.finishes[narrow.finish_count++] = {sums, uint32_t(splits), core, out, scaling, transposed};
  };
  for (size_t i = 0; i < count; ++i) {
    const Backward& g = layers[i];
    const Adapter& adapter = adapters[i];
    const int64_t r = g.A.rows;
    const bool made_h = bool(g.dx), made_g = g.dx && 2 * r <= kWidest;
    const int64_t first = adapter.wants_h && !made_h ? 0 : r, last = adapter.wants_g && !made_g ? 2 * r : r;
    if ((adapter.wants_h || adapter.wants_g) && first < last) {
      multiply(engine, g.dy, columns_of(adapter.folded, first, last - first),
               columns_of(adapter.shrunk, first, last - first), shared.state);
    }
  }
  // Those of x one after the other, for it need be read but once.
  for (size_t i = 0; i < count; ++i) {
    if (layers[i].dA) {
      contract(layers[i].dA, layers[i].x, columns_of(adapters[i].shrunk, 0, layers[i].A.rows), {}, 1, true);
    }
  }
  for (size_t i = 0; i < count; ++i) {
    const Backward& g = layers[i];
    const Adapter& adapter = adapters[i];
    const int64_t r = g.A.rows;
    if (g.dB) {
      contract(g.dB, g.dy, g.T, g.core, g.scaling, false);
    }
    if (adapter.wants_g && !adapter.core_sums) {
      contract(g.dcore, columns_of(adapter.shrunk, r, r), g.T, {}, g.scaling, false);
    }
  }
  if (narrow.gradient_count) {
    engine.gradients(narrow.gradients, narrow.gradient_count);
  }
  for (size_t i = 0; i < count; ++i) {
    if (adapters[i].core_sums) {
      narrow.finishes[narrow.finish_count++] = {adapters[i].core_sums,
                                                uint32_t(product_splits(layers[i].dy.rows)),
                                                {},
                                                layers[i].dcore,
                                                layers[i].scaling,
                                                false};
    }
  }
  if (narrow.finish_count) {
    engine.finishes(narrow.finishes, narrow.finish_count);
  }
}

}  // namespace nlora::cuda
