// Host side of gemm.cuh: checks a product, chooses its tile by plan.h, builds its tensor maps and launches the persistent
// grid.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/context.cuh"
#include "../common/product.h"
#include "../common/remembered.h"
#include "gemm.cuh"
#include "plan.h"

namespace nlora::cuda::sm90 {

inline void check_operand(const char* name, const Matrix& x, int64_t rows, int64_t columns, Dtype dtype) {
  const auto pair = [](int64_t first, int64_t second) {
    return "(" + std::to_string(first) + ", " + std::to_string(second) + ")";
  };
  if (x.rows != rows || x.cols != columns || x.dtype != dtype) {
    throw std::invalid_argument(std::string(name) + " must be " + pair(rows, columns) + " in the dtype of a, got " +
                                pair(x.rows, x.cols) + (x.dtype == dtype ? "" : " in another"));
  }
  if (!has_aligned_rows(x)) {
    throw std::invalid_argument(std::string(name) +
                                " must have columns in multiples of 8, strides (multiple of 8, "
                                "1) and data aligned to 16 bytes, got " +
                                pair(x.rows, x.cols) + ", strides " + pair(x.row_stride, x.col_stride) +
                                " and data at " + std::to_string(reinterpret_cast<uintptr_t>(x.data) % 16) +
                                " modulo 16");
  }
}

inline int64_t rank_of(const Product& q) { return !q.wide ? 0 : q.major == Major::K ? q.wide.cols : q.wide.rows; }

// What the kernel and its tensor maps take for granted.
inline void check_product(const Product& q, int64_t max_w) {
  const int64_t m = q.a.rows, n = q.c.cols, k = q.a.cols, w = q.p.cols, r = rank_of(q);
  if (q.a.dtype == Dtype::kFloat32) {
    throw std::invalid_argument("a must be bfloat16 or float16, got float32");
  }
  if (std::min({m, n, k}) <= 0 || std::max({m, n, k}) > INT32_MAX) {
    throw std::invalid_argument("m, n and k must be positive and below 2^31, got " + std::to_string(m) + ", " +
                                std::to_string(n) + " and " + std::to_string(k));
  }
  const auto check = [&](const char* name, const Matrix& x, int64_t rows, int64_t columns) {
    check_operand(name, x, rows, columns, q.a.dtype);
  };
  const auto check_right = [&](const char* name, const Matrix& x, int64_t rows, int64_t depth) {
    q.major == Major::K ? check(name, x, rows, depth) : check(name, x, depth, rows);
  };
  check("a", q.a, m, k);
  check_right("b", q.b, n, k);
  check("c", q.c, m, n);
  if (q.bias) {
    check("bias", q.bias, 1, n);
  }
  if (q.wide || q.shrink) {
    check("p", q.p, m, w);
  }
  if (q.wide) {
    check_right("wide", q.wide, n, r);
  }
  if (q.shrink) {
    check_right("shrink", q.shrink, w, k);
  }
  if (r % 8 || r > w || (q.shrink && w > max_w)) {
    throw std::invalid_argument("wide must have a rank in multiples of 8 up to the columns of p, at most " +
                                std::to_string(max_w) + " where p is made, got " + std::to_string(r) + " of " +
                                std::to_string(w));
  }
  if (q.t) {
    const int64_t v = q.t.cols, g = w - r, widest = std::min<int64_t>(128, max_w / State::kPieces);
    check("t", q.t, m, v);
    if (q.major != Major::MN || g % 8 || std::min(g, v) <= 0 || std::max(g, v) > widest) {
      throw std::invalid_argument("a gradient needs Major::MN, 8 to " + std::to_string(widest) +
                                  " columns of p beyond the rank and of t, got " + std::to_string(g) + " and " +
                                  std::to_string(v));
    }
    const Matrix& s = q.slices;
    const bool whole = s.rows > 0 && s.rows % g == 0 && s.rows / g <= (m + 63) / 64 && s.cols == v;
    if (s.dtype != Dtype::kFloat32 || !whole || s.row_stride != v || s.col_stride != 1) {
      throw std::invalid_argument("slices must be contiguous float32 of (1 to " + std::to_string((m + 63) / 64) +
                                  " times " + std::to_string(g) + ", " + std::to_string(v) + "), got (" +
                                  std::to_string(s.rows) + ", " + std::to_string(s.cols) + ")");
    }
  }
  if (!q.state) {
    throw std::invalid_argument("state must be given, got none");
  }
}

inline TensorMap operand_map(const Matrix& x, uint32_t box_rows) {
  if (!x) {
    return {};
  }
  return tensor_map(x.data, x.rows, x.cols, (x.rows == 1 ? x.cols : x.row_stride) * 2, box_rows, 64, Swizzle::B128);
}

// What they share is the same, and what the launch gives the one state has room for.
inline void check_products(const Product* products, uint32_t count, int64_t max_w) {
  if (count < 1 || count > kMostProducts) {
    throw std::invalid_argument("a launch takes 1 to " + std::to_string(kMostProducts) + " products, got " +
                                std::to_string(count));
  }
  const Product& first = products[0];
  const auto same = [](const Matrix& x, const Matrix& y) {
    return x.data == y.data && x.rows == y.rows && x.cols == y.cols && x.row_stride == y.row_stride;
  };
  for (uint32_t i = 0; i < count; ++i) {
    const Product& q = products[i];
    check_product(q, max_w);
    const bool sums = q.major == Major::MN;
    if (q.major != first.major || q.a.dtype != first.a.dtype || q.state != first.state ||
        !(sums ? same(q.c, first.c) : same(q.a, first.a)) || (sums && i > 0 && q.bias)) {
      throw std::invalid_argument("products of one launch must have one state and one " +
                                  std::string(sums ? "c, only the first a bias" : "a") + ", product " +
                                  std::to_string(i) + " has not");
    }
  }
}

inline GroupSizes sizes_of(const Product* products, uint32_t count) {
  ProductSizes sizes[kMostProducts];
  for (uint32_t i = 0; i < count; ++i) {
    const Product& q = products[i];
    sizes[i] = checked_sizes(q.a.rows, q.c.cols, q.a.cols, rank_of(q), q.shrink ? q.p.cols : 0);
  }
  return checked_sizes(sizes, count, products->major == Major::MN);
}

// What the kernel knows of one product; its columns of P are made `p_width` at a time, by tiles that it may share.
template <class Tile, Major kMajor, class T>
GemmProduct<T> gemm_product(const Product& q, const ProductSizes& sizes, uint32_t p_width, bool shares_p) {
  const auto right_map = [](const Matrix& x, uint32_t width) {
    return operand_map(x, (kMajor == Major::K ? width : Tile::kBlockK) / Tile::kCluster);
  };
  GemmProduct<T> product;
  product.n = sizes.n;
  product.k = sizes.k;
  product.r = sizes.r;
  product.w = sizes.w;
  product.p_width = p_width;
  product.a = operand_map(q.a, Tile::kBlockM);
  product.b = right_map(q.b, Tile::kBlockN);
  product.c = operand_map(q.c, 64);
  Matrix p = q.p;
  product.p_out = operand_map(p, 64);
  p.cols = product.r;
  product.p = product.r ? operand_map(p, Tile::kBlockM) : TensorMap{};
  product.wide = right_map(q.wide, Tile::kBlockN);
  product.shrink = right_map(q.shrink, shares_p ? std::min<uint32_t>(p_width, 64 * Tile::kCluster) : p_width);
  product.bias = static_cast<const T*>(q.bias.data);
  product.splits = product.g = product.v = product.t_width = 0;
  if (q.t) {
    Matrix beyond = q.p;
    beyond.data = static_cast<T*>(q.p.data) + product.r;
    beyond.cols -= product.r;
    product.beyond = operand_map(beyond, 64);
    product.t = right_map(q.t, 0);
    product.slices = static_cast<float*>(q.slices.data);
    product.g = uint32_t(beyond.cols);
    product.v = uint32_t(q.t.cols);
    product.splits = uint32_t(q.slices.rows) / product.g;
    product.t_width = product.v <= 64 ? 64 : 128;
  }
  return product;
}

template <class Tile, Major kMajor, class T, uint32_t kProducts, class Context>
void launch_problem(Context& context, const Product* products, const GroupSizes& sizes, uint32_t blocks,
                    uint32_t tall) {
  constexpr uint32_t kNowhere = ~0u;
  GemmProblem<kMajor, T, kProducts> problem;
  const GroupSizes::Columns columns = sizes.columns(Tile::kBlockN);
  problem.state = {products->state};
  problem.m = sizes.products[0].m;
  problem.count = sizes.count;
  problem.columns = columns.all_c;
  problem.p_columns = columns.all_p;
  problem.slices = 0;
  problem.p_tall = tall;
  problem.begins_early = products->wide_alone_is_new;
  for (uint32_t i = 0; i < kProducts; ++i) {
    auto& product = problem.products[i];
    product.first_c = product.first_p = product.first_slice = kNowhere;
    if (i < sizes.count) {
      const uint32_t p_width = sizes.p_width(i, Tile::kBlockN);
      product = gemm_product<Tile, kMajor, T>(products[i], sizes.products[i], p_width, problem.kSharesP);
      product.first_c = columns.c[i];
      product.first_p = product.w ? columns.p[i] : kNowhere;
      product.first_slice = product.splits ? problem.slices : kNowhere;
      problem.slices += product.splits;
    }
  }
  const Schedule schedule(problem.m, problem.columns, problem.p_columns, Tile::kClusterM, Tile::kBlockN, problem.slices,
                          tall);
  const uint32_t clusters = std::min(std::max(blocks / Tile::kCluster, 1u), schedule.count());
  context.launch(
      {clusters * Tile::kCluster, Tile::kThreads, Tile::kCluster, Tile::kSharedBytes, Tile::kRegisters, true},
      &gemm_kernel<Tile, kMajor, T, kProducts>, problem);
}

// NOTE: a product alone has a kernel of its own, without what a group has to look up.
template <class Tile, Major kMajor, class T, class Context>
void launch_gemm(Context& context, const Product* products, const GroupSizes& sizes, uint32_t blocks, uint32_t tall) {
  const auto launch = sizes.count == 1 ? &launch_problem<Tile, kMajor, T, 1, Context>
                                       : &launch_problem<Tile, kMajor, T, kMostProducts, Context>;
  launch(context, products, sizes, blocks, tall);
}

// The products by tiles of this kind on so many blocks: 0 means one for each processor; items of p so many tiles high.
template <class Tile, class Context>
void launch_products(Context& context, const Product* products, uint32_t count, uint32_t blocks = 0,
                     uint32_t tall = 1) {
  check_products(products, count, State::kPieces * Tile::kBlockN);
  const GroupSizes sizes = sizes_of(products, count);
  const bool along = products->major == Major::K;
  const auto launch = products->a.dtype == Dtype::kBFloat16 ? along ? &launch_gemm<Tile, Major::K, bf16, Context>
                                                                    : &launch_gemm<Tile, Major::MN, bf16, Context>
                      : along                               ? &launch_gemm<Tile, Major::K, fp16, Context>
                                                            : &launch_gemm<Tile, Major::MN, fp16, Context>;
  launch(context, products, sizes, blocks ? blocks : context.processors(), tall);
}

template <uint32_t kIndex>
using PlannedTile = GemmTile<kTiles[kIndex].block_m, kTiles[kIndex].block_n, kTiles[kIndex].stages,
                             kTiles[kIndex].cluster, kTiles[kIndex].boxes>;

inline Plan remembered_plan(const GroupSizes& sizes, uint32_t processors) {
  static thread_local Remembered<Plan, 4 * kMostProducts + 5> plans;
  const TileCosts costs;
  std::array<double, 4 * kMostProducts + 5> key{double(processors), costs.bytes, double(sizes.count),
                                                double(sizes.sums), double(sizes.products[0].m)};
  for (uint32_t i = 0; i < sizes.count; ++i) {
    const ProductSizes& q = sizes.products[i];
    const double own[] = {double(q.n), double(q.k), double(q.r), double(q.w)};
    std::copy_n(own, 4, key.begin() + 5 + 4 * i);
  }
  return plans.get(key, [&] { return plan_product(sizes, processors, costs); });
}

// T is the dtype of all operands, so that each can be compiled on its own.
template <class T, class Context>
void launch_planned(Context& context, const Product* products, uint32_t count) {
  check_products(products, count, 256);
  const GroupSizes sizes = sizes_of(products, count);
  const uint32_t processors = context.processors();
  const Plan plan = remembered_plan(sizes, processors);
  const auto launch = [&](auto tile) {
    using Tile = decltype(tile);
    products->major == Major::K ? launch_gemm<Tile, Major::K, T>(context, products, sizes, processors, plan.tall)
                                : launch_gemm<Tile, Major::MN, T>(context, products, sizes, processors, plan.tall);
  };
  switch (plan.tile) {
    case 0: return launch(PlannedTile<0>());
    case 1: return launch(PlannedTile<1>());
    case 2: return launch(PlannedTile<2>());
    case 3: return launch(PlannedTile<3>());
  }
  static_assert(std::size(kTiles) == 4, "a case for every tile");
}

}  // namespace nlora::cuda::sm90
