// The large product. A block of right, packed by all threads together, fills the better part of a second-level cache; its
// strips stream past the few rows of left that a thread packs at a time, which stay in the first level.
#include "cpu/gemm.h"

namespace nlora::cpu {
namespace {

// Steps of k at a time. Deeper, sums are written less often; but a longer sum loses more to rounding.
constexpr int64_t kDepth = 384;
// Rows a thread takes at a time, whose sums are kept in fp32 where the result is not.
constexpr int64_t kRows = 1024;

// Rows prepared at a time: a multiple of the rows that dots and packing take together.
constexpr int64_t kPrepared = 48;

// A run of k inside one summand, and its place in the run of all summands that is packed together.
struct Piece {
  const Summand* summand;
  Range range;
  int64_t at;
};

struct Depth {
  std::vector<Piece> pieces;
  int64_t k;
};

struct Problem {
  std::vector<Depth> depths;
  const float* start;
  Matrix out;
  const Prepare* prepare;
  int64_t deepest, block_cols, row_blocks;
  float* right;  // two blocks, one being read while the next is packed: [strip][k][tile_cols] each
};

int64_t block_size(const Problem& p) { return p.block_cols * p.deepest; }

// Rows of left packed at a time: as many as are transposed in registers.
int64_t step_rows(const Kernels& kernel) { return round_up(kernel.width, kernel.tile_rows); }

bool has_sums(const Problem& p) { return p.out.dtype != Dtype::kFloat32 && p.depths.size() > 1; }

// What a thread needs for itself.
int64_t own_size(const Kernels& kernel, const Problem& p) {
  return step_rows(kernel) * p.deepest + (has_sums(p) ? kRows * p.block_cols : 0);
}

// Panels of `size` rows or columns, of one depth.
void pack(const Kernels& kernel, const Depth& depth, Matrix Summand::*side, Range rows, int size, float* panels) {
  for (const Piece& piece : depth.pieces) {
    const Matrix from = slice(piece.summand->*side, rows, piece.range);
    kernel.pack(from.data, from.dtype, from.row_stride, from.col_stride, from.rows, from.cols, size, depth.k * size,
                panels + piece.at * size);
  }
}

// Thread `index` of the `count` that share p.right.
void run(const Kernels& kernel, const Problem& p, int index, int count, float* own) {
  const int64_t tile_cols = kernel.tile_cols;
  const Range all = part(p.out.rows, kernel.tile_rows, index, count);
  float* left = own;
  float* sums = own + step_rows(kernel) * p.deepest;
  int turn = 0;
  for (int64_t col = 0; col < p.out.cols; col += p.block_cols) {
    const int64_t cols = std::min(p.block_cols, p.out.cols - col);
    const Range mine = part(cols, tile_cols, index, count);
    for (int64_t b = 0; b < p.row_blocks; ++b) {
      const Range block = part(all.size, kernel.tile_rows, int(b), int(p.row_blocks));
      const Matrix out = slice(p.out, {all.first + block.first, block.size}, {col, cols});
      const Matrix partial = has_sums(p) ? fp32(sums, block.size, cols, p.block_cols) : out;
      for (size_t i = 0; i < p.depths.size(); ++i) {
        const Depth& depth = p.depths[i];
        const Matrix& to = i + 1 == p.depths.size() ? out : partial;
        // NOTE: no thread is still reading the block before the last one when all have packed the last one.
        float* right = p.right + (turn++ & 1) * block_size(p);
        pack(kernel, depth, &Summand::right, {col + mine.first, mine.size}, int(tile_cols), right + mine.first * depth.k);
        barrier(count);
        for (int64_t row = 0; row < block.size; row += step_rows(kernel)) {
          const Range step = {row, std::min(step_rows(kernel), block.size - row)};
          const Range rows = {all.first + block.first + row, step.size};
          if (p.prepare && !col && !i && row % kPrepared == 0)
            (*p.prepare)({rows.first, std::min(kPrepared, block.size - row)});
          pack(kernel, depth, &Summand::left, rows, kernel.tile_rows, left);
          const Matrix c = slice(to, step, {0, cols}), before = slice(partial, step, {0, cols});
          Product product = {};
          product.a = left;
          product.b = right;
          product.b_strip = depth.k * tile_cols;
          product.b_row = tile_cols;
          product.init = i ? static_cast<const float*>(before.data) : p.start ? p.start + col : nullptr;
          product.init_row = i ? before.row_stride : 0;
          product.c = c.data;
          product.c_dtype = c.dtype;
          product.c_row = c.row_stride;
          product.m = step.size, product.n = cols, product.k = depth.k;
          kernel.multiply(product);
        }
      }
    }
  }
  barrier(count);
}

// The k of all summands in nearly equal runs. A shallow summand goes with the run before it, which saves a pass over out.
std::vector<Depth> depths_of(const std::vector<Summand>& summands, int64_t unit) {
  std::vector<Depth> depths;
  for (const Summand& summand : summands) {
    const int64_t k = summand.left.cols;
    if (!depths.empty() && k <= kDepth / 4) {
      Depth& last = depths.back();
      last.pieces.push_back({&summand, {0, k}, last.k});
      last.k += k;
      continue;
    }
    const int64_t runs = std::max<int64_t>(1, (k + kDepth - 1) / kDepth);
    for (int64_t i = 0; i < runs; ++i) {
      const Range range = part(k, unit, int(i), int(runs));
      if (range.size || runs == 1) depths.push_back({{{&summand, range, 0}}, range.size});
    }
  }
  return depths;
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__) || defined(__i386__)
  switch (tier()) {
    case Tier::kAvx512: return avx512_kernels();
    case Tier::kAvx2: return avx2_kernels();
    case Tier::kPortable: break;
  }
#endif
  return portable_kernels();
}

Matrix slice(const Matrix& m, Range rows, Range cols) {
  const int64_t offset = rows.first * m.row_stride + cols.first * m.col_stride;
  const int64_t bytes = m.dtype == Dtype::kFloat32 ? 4 : 2;
  return {static_cast<char*>(m.data) + offset * bytes, m.dtype, rows.size, cols.size, m.row_stride, m.col_stride};
}

void gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads, Scratch& scratch,
          const Prepare* prepare) {
  if (!out.rows || !out.cols) return;
  const Kernels& kernel = kernels();
  Problem p = {depths_of(summands, kernel.width), start, out, prepare, 1, 0, 0, nullptr};
  for (const Depth& depth : p.depths) p.deepest = std::max(p.deepest, depth.k);
  // With few rows a thread: columns are shared out, and every thread packs its own part of right and all of left.
  const bool by_cols = out.rows < int64_t(threads) * 2 * kernel.tile_rows;
  const int64_t tile_cols = kernel.tile_cols;
  const int64_t rows = by_cols ? out.rows : part(out.rows, kernel.tile_rows, threads - 1, threads).size;
  p.row_blocks = std::max<int64_t>(1, (rows + kRows - kernel.tile_rows) / (kRows - kernel.tile_rows));
  const int64_t cols = by_cols ? round_up((out.cols + threads - 1) / threads, tile_cols) : out.cols;
  const int64_t fitting = std::max(tile_cols, second_level_cache() / 8 * 5 / 4 / p.deepest);
  const int64_t blocks = (cols + fitting - 1) / fitting;
  p.block_cols = round_up((cols + blocks - 1) / blocks, tile_cols);

  const int64_t right = 2 * block_size(p), own = own_size(kernel, p);
  if (!by_cols) {
    p.right = scratch.take(right);
    float* all = scratch.take(own * threads);
    return parallel(threads, [&](int index, int count) { run(kernel, p, index, count, all + index * own); });
  }
  if (prepare) {
    parallel(threads, [&](int index, int count) { (*prepare)(part(out.rows, kernel.tile_rows, index, count)); });
    p.prepare = nullptr;
  }
  float* all = scratch.take((right + own) * threads);
  parallel(threads, [&](int index, int count) {
    const Range mine = part(out.cols, tile_cols, index, count);
    Problem q = p;
    std::vector<Summand> parts = summands;
    for (Summand& summand : parts) summand.right = slice(summand.right, mine, {0, summand.right.cols});
    q.depths = depths_of(parts, kernel.width);
    q.start = start ? start + mine.first : nullptr;
    q.out = slice(out, {0, out.rows}, mine);
    q.right = all + index * (right + own);
    run(kernel, q, 0, 1, q.right + right);
  });
}

}  // namespace nlora::cpu
