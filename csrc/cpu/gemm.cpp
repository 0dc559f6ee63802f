// The large product: right packed by all threads together, each thread then takes rows of left.
#include "cpu/gemm.h"

namespace nlora::cpu {
namespace {

// Values of a strip of right, which with a panel of left stays in the first cache level: 24 KiB.
constexpr int64_t kStrip = 6144;
// Rows of left that are packed at a time, for the second level.
constexpr int64_t kRows = 128;
// Packed values of right at a time: 16 MiB, and no more columns than keep a half-precision result's sums in the cache.
constexpr int64_t kRightSize = 4 << 20;
constexpr int64_t kCols = 1536;

// A run of k inside one summand.
struct Depth {
  const Summand* summand;
  Range range;
  int64_t before;  // all k in front of it
};

struct Problem {
  std::vector<Depth> depths;
  const float* start;
  Matrix out;
  int64_t k, depth, block_rows, block_cols;
  float* right;  // [depth][strip][k][tile_cols] for block_cols columns
};

int64_t left_size(const Kernels& kernel, const Problem& p) { return round_up(p.block_rows, kernel.tile_rows) * p.depth; }

int64_t sums_size(const Problem& p) { return p.out.dtype == Dtype::kFloat32 ? 0 : p.block_rows * p.block_cols; }

// Thread `index` of the `count` that share p.right. `own` holds left_size + sums_size values.
void run(const Kernels& kernel, const Problem& p, int index, int count, float* own) {
  const int64_t tile_cols = kernel.tile_cols;
  const Range rows = part(p.out.rows, kernel.tile_rows, index, count);
  float* left = own;
  float* sums = own + left_size(kernel, p);
  const bool in_place = p.out.dtype == Dtype::kFloat32;
  for (int64_t col = 0; col < p.out.cols; col += p.block_cols) {
    const int64_t cols = std::min(p.block_cols, p.out.cols - col);
    const int64_t padded = round_up(cols, tile_cols);
    const Range mine = part(cols, tile_cols, index, count);
    for (const Depth& d : p.depths) {
      const Matrix source = slice(d.summand->right, {col + mine.first, mine.size}, d.range);
      kernel.pack(source.data, source.dtype, source.row_stride, source.col_stride, mine.size, d.range.size,
                  kernel.tile_cols, p.right + padded * d.before + mine.first * d.range.size);
    }
    barrier(count);
    for (int64_t row = 0; row < rows.size; row += p.block_rows) {
      const Range block = {rows.first + row, std::min(p.block_rows, rows.size - row)};
      const Matrix out = slice(p.out, block, {col, cols});
      const Matrix partial = in_place ? out : fp32(sums, block.size, cols, p.block_cols);
      for (size_t i = 0; i < p.depths.size(); ++i) {
        const Depth& d = p.depths[i];
        const Matrix source = slice(d.summand->left, block, d.range);
        kernel.pack(source.data, source.dtype, source.row_stride, source.col_stride, block.size, d.range.size,
                    kernel.tile_rows, left);
        const Matrix& to = i + 1 == p.depths.size() ? out : partial;
        Product product = {};
        product.a = left;
        product.b = p.right + padded * d.before;
        product.b_strip = d.range.size * tile_cols;
        product.b_row = tile_cols;
        product.init = i ? static_cast<const float*>(partial.data) : p.start ? p.start + col : nullptr;
        product.init_row = i ? partial.row_stride : 0;
        product.c = to.data;
        product.c_dtype = to.dtype;
        product.c_row = to.row_stride;
        product.m = block.size, product.n = cols, product.k = d.range.size;
        kernel.multiply(product);
      }
    }
    barrier(count);
  }
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

void gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads, Scratch& scratch) {
  if (!out.rows || !out.cols) return;
  const Kernels& kernel = kernels();
  Problem p = {{}, start, out, 0, kStrip / kernel.tile_cols, 0, 0, nullptr};
  for (const Summand& summand : summands) {
    const int64_t k = summand.left.cols, runs = std::max<int64_t>(1, (k + p.depth - 1) / p.depth);
    for (int64_t i = 0; i < runs; ++i) {
      const Range range = part(k, std::min<int64_t>(k ? k : 1, kernel.width), int(i), int(runs));
      if (range.size || runs == 1) p.depths.push_back({&summand, range, p.k});
      p.k += range.size;
    }
  }
  // With few rows a thread: columns are shared out, and every thread packs its own part of right and all of left.
  const bool by_cols = out.rows < int64_t(threads) * 2 * kernel.tile_rows;
  const int64_t fitting = kRightSize / std::max<int64_t>(p.k, 1) / (by_cols ? threads : 1);
  const int64_t limit = std::max(kernel.tile_cols, int(std::min(kCols, fitting)) / kernel.tile_cols * kernel.tile_cols);
  const int64_t rows = by_cols ? out.rows : part(out.rows, kernel.tile_rows, threads - 1, threads).size;
  const int64_t blocks = std::max<int64_t>(1, (rows + kRows - 1) / kRows);
  p.block_rows = round_up((rows + blocks - 1) / blocks, kernel.tile_rows);
  const int64_t cols = by_cols ? round_up((out.cols + threads - 1) / threads, kernel.tile_cols) : out.cols;
  p.block_cols = std::min<int64_t>(limit, round_up(cols, kernel.tile_cols));

  const int64_t right = p.block_cols * std::max<int64_t>(p.k, 1), own = left_size(kernel, p) + sums_size(p);
  if (!by_cols) {
    p.right = scratch.take(right);
    float* all = scratch.take(own * threads);
    return parallel(threads, [&](int index, int count) { run(kernel, p, index, count, all + index * own); });
  }
  float* all = scratch.take((right + own) * threads);
  parallel(threads, [&](int index, int count) {
    const Range mine = part(out.cols, kernel.tile_cols, index, count);
    std::vector<Summand> parts = summands;
    Problem q = p;
    for (Summand& summand : parts) summand.right = slice(summand.right, mine, {0, summand.right.cols});
    for (Depth& d : q.depths) d.summand = &parts[d.summand - summands.data()];
    q.start = start ? start + mine.first : nullptr;
    q.out = slice(out, {0, out.rows}, mine);
    q.right = all + index * (right + own);
    run(kernel, q, 0, 1, q.right + right);
  });
}

}  // namespace nlora::cpu
