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
    const int64_t v = q.t.cols, g = w - r, widest = std::min<int64_t>(128, max_w / State::kMaxPieces);
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

template <class Tile, Major kMajor, class T, class Context>
void launch_gemm(Context& context, const Product& q, uint32_t blocks, uint32_t tall) {
  constexpr uint32_t kCluster = Tile::kCluster;
  const auto right_map = [](const Matrix& x, uint32_t width) {
    return operand_map(x, (kMajor == Major::K ? width : Tile::kBlockK) / kCluster);
  };
  GemmProblem<T> problem;
  problem.m = uint32_t(q.a.rows);
  problem.n = uint32_t(q.c.cols);
  problem.k = uint32_t(q.a.cols);
  problem.r = uint32_t(rank_of(q));
  problem.w = q.shrink ? uint32_t(q.p.cols) : 0;
  problem.p_width = piece_width(problem.w, Tile::kBlockN);
  problem.p_tall = tall;
  problem.a = operand_map(q.a, Tile::kBlockM);
  problem.b = right_map(q.b, Tile::kBlockN);
  problem.c = operand_map(q.c, 64);
  Matrix p = q.p;
  problem.p_out = operand_map(p, 64);
  p.cols = problem.r;
  problem.p = problem.r ? operand_map(p, Tile::kBlockM) : TensorMap{};
  problem.wide = right_map(q.wide, Tile::kBlockN);
  problem.shrink = right_map(q.shrink, problem.p_width);
  problem.splits = problem.g = problem.v = problem.t_width = 0;
  if (q.t) {
    Matrix beyond = q.p;
    beyond.data = static_cast<T*>(q.p.data) + problem.r;
    beyond.cols -= problem.r;
    problem.beyond = operand_map(beyond, 64);
    problem.t = right_map(q.t, 0);
    problem.slices = static_cast<float*>(q.slices.data);
    problem.g = uint32_t(beyond.cols);
    problem.v = uint32_t(q.t.cols);
    problem.splits = uint32_t(q.slices.rows) / problem.g;
    problem.t_width = problem.v <= 64 ? 64 : 128;
  }
  problem.bias = static_cast<const T*>(q.bias.data);
  problem.state = {q.state};
  problem.begins_early = q.wide_alone_is_new;

  const Schedule schedule(problem.m, problem.n, problem.w, Tile::kClusterM, Tile::kBlockN, problem.splits, tall);
  const uint32_t clusters = std::min(std::max(blocks / kCluster, 1u), schedule.count());
  context.launch({clusters * kCluster, Tile::kThreads, kCluster, Tile::kSharedBytes, Tile::kRegisters, true},
                 &gemm_kernel<Tile, kMajor, T>, problem);
}

// The product by tiles of this kind on so many blocks: 0 means one for each processor; items of p so many tiles high.
template <class Tile, class Context>
void launch_product(Context& context, const Product& q, uint32_t blocks = 0, uint32_t tall = 1) {
  check_product(q, State::kMaxPieces * Tile::kBlockN);
  blocks = blocks ? blocks : context.processors();
  if (q.a.dtype == Dtype::kBFloat16) {
    q.major == Major::K ? launch_gemm<Tile, Major::K, bf16>(context, q, blocks, tall)
                        : launch_gemm<Tile, Major::MN, bf16>(context, q, blocks, tall);
  } else {
    q.major == Major::K ? launch_gemm<Tile, Major::K, fp16>(context, q, blocks, tall)
                        : launch_gemm<Tile, Major::MN, fp16>(context, q, blocks, tall);
  }
}

template <uint32_t kIndex>
using PlannedTile = GemmTile<kTiles[kIndex].block_m, kTiles[kIndex].block_n, kTiles[kIndex].stages,
                             kTiles[kIndex].cluster, kTiles[kIndex].boxes>;

inline Plan remembered_plan(const ProductSizes& q, uint32_t processors) {
  static thread_local Remembered<Plan, 7> plans;
  const TileCosts costs;
  return plans.get({double(q.m), double(q.n), double(q.k), double(q.r), double(q.w), double(processors), costs.bytes},
                   [&] { return plan_product(q, processors, costs); });
}

// T is the dtype of all operands, so that each can be compiled on its own.
template <class T, class Context>
void launch_planned(Context& context, const Product& q) {
  const int64_t w = q.shrink ? q.p.cols : 0;
  const ProductSizes sizes = checked_sizes(q.a.rows, q.c.cols, q.a.cols, rank_of(q), w);
  const uint32_t processors = context.processors();
  check_product(q, 256);
  const Plan plan = remembered_plan(sizes, processors);
  const auto launch = [&](auto tile) {
    using Tile = decltype(tile);
    q.major == Major::K ? launch_gemm<Tile, Major::K, T>(context, q, processors, plan.tall)
                        : launch_gemm<Tile, Major::MN, T>(context, q, processors, plan.tall);
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
