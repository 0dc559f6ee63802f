// The large product. Threads share out the result as a grid; each packs its own columns of right, as many as fill the
// better part of a second-level cache, and lets them stream past a few rows of left, which stay in the first level.
#include "cpu/gemm.h"

namespace nlora::cpu {
namespace {

// Lanes of k at a time. Deeper, sums are written less often; but a longer sum loses more to rounding.
constexpr int64_t kDepth = 384;
// Rows whose sums are kept in fp32 at a time, where the result is not fp32 and k does not fit the cache.
constexpr int64_t kRows = 1024;
// Rows and columns from which on splitting values for the matrix unit pays.
constexpr int64_t kManyForTiles = 48;
// Values of a quantised right that are decoded at a time, rows of W or columns where it is transposed: within the first
// level.
constexpr int64_t kTile = 6144, kTileRowsAtATime = 16;
// What packing a value costs, in multiply-adds of one k.
constexpr int64_t kPackLeft = 16, kPackRight = 32;

// A run of k inside one summand, and its place in lanes in the run of all summands that is packed together.
struct Piece {
  const Summand* summand;
  Range range;
  int64_t at;
};

struct Depth {
  std::vector<Piece> pieces;
  int64_t k;  // lanes
  bool in_place;  // left is read where it lies
};

struct Problem {
  const Kernels& kernel;
  std::vector<Depth> depths;
  const float* start;
  Matrix out;
  int64_t k, deepest;  // lanes
  int64_t fitting;  // lanes of packed right
  bool quantised;
};

int64_t lanes(const Kernels& kernel, int64_t k) { return (k + kernel.lane - 1) / kernel.lane; }

bool is_rows(const Matrix& m, Dtype dtype) { return m.dtype == dtype && m.col_stride == 1; }

// Whether the rows of a left consist of lanes as they lie. To a kernel, rows no distance apart are panels: a row that is
// expanded to many is packed.
bool readable(const Kernels& kernel, const Matrix& left) {
  return is_rows(left, kernel.lane == 1 ? Dtype::kFloat32 : Dtype::kBFloat16) && left.row_stride != 0 &&
         left.row_stride % kernel.lane == 0 && left.cols % kernel.lane == 0;
}

// The k of all summands in nearly equal runs. A shallow summand goes with the run before it, which saves a pass over out;
// but of what is read in place only one.
std::vector<Depth> depths_of(const Kernels& kernel, const std::vector<Summand>& summands) {
  std::vector<Depth> depths;
  for (const Summand& summand : summands) {
    const int64_t k = summand.left.cols, size = lanes(kernel, k);
    // What has no k adds nothing; the first starts the sum.
    if (!k && !depths.empty()) continue;
    const bool in_place = readable(kernel, summand.left);
    // A shallow one is rounded to lanes on the way.
    const bool as_tail = in_place || (kernel.lane > 1 && is_rows(summand.left, Dtype::kFloat32));
    Depth* before = depths.empty() ? nullptr : &depths.back();
    const bool fits = before && (as_tail && before->in_place ? before->pieces.size() < 2 : before->k < 2 * kDepth);
    if (fits && size <= kDepth / 2) {
      Depth& last = *before;
      last.pieces.push_back({&summand, {0, k}, last.k});
      last.k += size;
      last.in_place = last.in_place && as_tail;
      continue;
    }
    const int64_t runs = std::max<int64_t>(1, (size + kDepth - 1) / kDepth);
    for (int64_t i = 0; i < runs; ++i) {
      const Range range = part(k, kernel.width * kernel.lane, int(i), int(runs));
      if (range.size || runs == 1) depths.push_back({{{&summand, range, 0}}, lanes(kernel, range.size), in_place});
    }
  }
  return depths;
}

// Rows of left multiplied at a time: as many as are transposed in registers when they are packed.
int64_t step_rows(const Kernels& kernel) { return round_up(kernel.width, kernel.tile_rows); }

// As many columns of right as may be packed at a time.
int64_t most_cols(const Kernels& kernel, const Problem& p) {
  return std::max<int64_t>(kernel.tile_cols, p.fitting / p.deepest / kernel.tile_cols * kernel.tile_cols);
}

// Columns of right packed at a time, of `cols` that a thread has. Fewer may be packed more at a time, where they are one
// block and not two.
int64_t block_cols(const Kernels& kernel, const Problem& p, int64_t cols) {
  const int64_t limit = most_cols(kernel, p);
  const int64_t blocks = std::max<int64_t>(1, (cols + limit - 1) / limit);
  return round_up((cols + blocks - 1) / blocks, kernel.tile_cols);
}

int64_t right_size(const Kernels& kernel, const Problem& p) {
  const int64_t all = round_up(p.out.cols, kernel.tile_cols) * p.k;
  return std::min(all, std::max<int64_t>(p.fitting, kernel.tile_cols * p.deepest));
}

// Of whatever share of the columns a thread has.
int64_t sums_size(const Kernels& kernel, const Problem& p) {
  const int64_t width = std::min(most_cols(kernel, p), round_up(p.out.cols, kernel.tile_cols));
  return p.out.dtype == Dtype::kFloat32 ? 0 : std::min(kRows, p.out.rows) * width;
}

// What a thread needs for itself.
int64_t own_size(const Kernels& kernel, const Problem& p) {
  return right_size(kernel, p) + step_rows(kernel) * p.deepest + sums_size(kernel, p) + (p.quantised ? kTile : 0);
}

// Panels of `size` rows or columns.
void pack(const Kernels& kernel, const Depth& depth, Matrix Summand::* side, Range rows, int size, float* panels) {
  for (const Piece& piece : depth.pieces) {
    const Matrix from = slice(piece.summand->*side, rows, piece.range);
    kernel.pack(from.data, from.dtype, from.row_stride, from.col_stride, from.rows, from.cols, size, depth.k * size,
                panels + piece.at * size);
  }
}

// The same of right, by way of `tile` where it is quantised.
void pack_right(const Kernels& kernel, const Depth& depth, Range rows, float* panels, float* tile) {
  const int size = kernel.tile_cols;
  for (const Piece& piece : depth.pieces) {
    const Summand& summand = *piece.summand;
    const auto to = [&](const Matrix& from, int64_t row, int64_t k) {
      kernel.pack(from.data, from.dtype, from.row_stride, from.col_stride, from.rows, from.cols, size, depth.k * size,
                  panels + row * depth.k + (piece.at + lanes(kernel, k)) * size);
    };
    if (!summand.quantised) {
      to(slice(summand.right, rows, piece.range), 0, 0);
      continue;
    }
    const bool across = summand.is_transposed;
    const int64_t height = across ? kTile / kTileRowsAtATime / size * size : size, depth_of_tile = kTile / height;
    for (int64_t row = 0; row < rows.size; row += height)
      for (int64_t k = 0; k < piece.range.size; k += depth_of_tile) {
        const Range of = {rows.first + row, std::min(height, rows.size - row)};
        const Range at = {piece.range.first + k, std::min(depth_of_tile, piece.range.size - k)};
        const Matrix decoded = across ? fp32(tile, at.size, of.size, of.size) : fp32(tile, of.size, at.size, at.size);
        kernel.dequantise(*summand.quantised, across ? at.first : of.first, across ? of.first : at.first, decoded);
        to(across ? transposed(decoded) : decoded, row, k);
      }
  }
}

// The part of a product's k that is `depth`, for some rows of left.
void place_left(const Kernels& kernel, const Depth& depth, Range rows, float* panels, Product& product) {
  product.k = depth.k;
  product.a = panels, product.a_panel = depth.k * kernel.tile_rows;
  if (!depth.in_place) return pack(kernel, depth, &Summand::left, rows, kernel.tile_rows, panels);
  const auto left = [&](const Piece& piece) { return slice(piece.summand->left, rows, piece.range); };
  const Piece& main = depth.pieces[0];
  product.a = values(left(main)), product.a_row = left(main).row_stride / kernel.lane;
  product.k = lanes(kernel, main.range.size);
  if (depth.pieces.size() == 1) return;
  const Matrix tail = left(depth.pieces[1]);
  product.tail = values(tail), product.tail_row = tail.row_stride / kernel.lane;
  product.tail_k = lanes(kernel, tail.cols);
  if (readable(kernel, tail)) return;
  product.tail = panels, product.tail_row = product.tail_k;
  std::fill_n(panels, rows.size * product.tail_k, 0.0f);
  kernel.round(values(tail), tail.row_stride,
               {panels, Dtype::kBFloat16, tail.rows, tail.cols, kernel.lane * product.tail_k, 1});
}

// The rows and columns of the result that are one thread's.
void run(const Problem& p, Range rows, Range cols, float* own) {
  if (!rows.size || !cols.size) return;
  const Kernels& kernel = p.kernel;
  const int64_t tile_cols = kernel.tile_cols, step = step_rows(kernel), count = int64_t(p.depths.size());
  float* right = own;
  float* left = right + right_size(kernel, p);
  float* sums = left + step * p.deepest;
  float* tile = sums + sums_size(kernel, p);
  const int64_t width = block_cols(kernel, p, cols.size);
  for (int64_t col = 0; col < cols.size; col += width) {
    const Range block = {cols.first + col, std::min(width, cols.size - col)};
    const int64_t padded = round_up(block.size, tile_cols);
    const bool in_sums = p.out.dtype != Dtype::kFloat32;
    const int64_t height = in_sums ? std::min(kRows, rows.size) : rows.size;
    for (int64_t top = 0; top < rows.size; top += height) {
      const int64_t bottom = std::min(rows.size, top + height);
      for (int64_t first = 0, last; first < count; first = last) {
        // As many runs of k as fit.
        int64_t k = 0;
        for (last = first; last < count && (last == first || padded * (k + p.depths[last].k) <= p.fitting); ++last) {
          pack_right(kernel, p.depths[last], block, right + padded * k, tile);
          k += p.depths[last].k;
        }
        for (int64_t row = top; row < bottom; row += step) {
          const Range at = {rows.first + row, std::min(step, bottom - row)};
          const Matrix out = slice(p.out, at, block);
          // NOTE: sums that no later run of k adds to stay in the first-level cache.
          float* here = sums + (first == 0 && last == count ? 0 : (row - top) * width);
          const Matrix partial = in_sums ? fp32(here, at.size, block.size, width) : out;
          k = 0;
          for (int64_t i = first; i < last; ++i) {
            const Depth& depth = p.depths[i];
            const Matrix& to = i + 1 == count ? out : partial;
            Product product = {};
            place_left(kernel, depth, at, left, product);
            if (depth.in_place && (i + 1 < last || row + step < bottom)) {
              const Piece& next = p.depths[i + 1 < last ? i + 1 : first].pieces[0];
              const Range rows_ahead = {i + 1 < last ? at.first : at.first + step, 1};
              product.ahead = values(slice(next.summand->left, rows_ahead, next.range));
            }
            product.b = right + padded * k;
            product.b_strip = depth.k * tile_cols;
            product.b_row = tile_cols;
            product.init = i ? values(partial) : p.start ? p.start + block.first : nullptr;
            product.init_row = i ? partial.row_stride : 0;
            product.c = to.data;
            product.c_dtype = to.dtype;
            product.c_row = to.row_stride;
            product.m = at.size, product.n = block.size;
            kernel.multiply(product);
            k += depth.k;
          }
        }
      }
    }
  }
}

bool any_fp16(const std::vector<Summand>& summands) {
  return std::any_of(summands.begin(), summands.end(), [](const Summand& summand) {
    return summand.left.dtype == Dtype::kFloat16 || summand.right.dtype == Dtype::kFloat16;
  });
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__) || defined(__i386__)
  switch (tier()) {
    case Tier::kAmx:
    case Tier::kAvx512: return avx512_kernels();
    case Tier::kAvx2: return avx2_kernels();
    case Tier::kNeon:
    case Tier::kPortable: break;
  }
#elif defined(__aarch64__)
  if (tier() == Tier::kNeon) return neon_kernels();
#endif
  return portable_kernels();
}

Matrix slice(const Matrix& m, Range rows, Range cols) {
  const int64_t offset = rows.first * m.row_stride + cols.first * m.col_stride;
  const int64_t bytes = m.dtype == Dtype::kFloat32 ? 4 : 2;
  return {static_cast<char*>(m.data) + offset * bytes, m.dtype, rows.size, cols.size, m.row_stride, m.col_stride};
}

void copy(const Kernels& kernel, const Matrix& from, const Matrix& to) {
  // A panel of no columns would be cut into infinitely many.
  if (!from.cols) return;
  kernel.pack(from.data, from.dtype, from.col_stride, from.row_stride, from.cols, from.rows, int(to.row_stride),
              from.rows * to.row_stride, values(to));
}

Matrix copied(const Kernels& kernel, const Matrix& m, int64_t unit, Scratch& scratch) {
  const int64_t cols = round_up(m.cols, unit);
  const Matrix result = fp32(scratch.take(m.rows * cols), m.rows, m.cols, cols);
  copy(kernel, m, result);
  return result;
}

void dequantise(const Quantised& weight, int64_t row, int64_t col, const Matrix& to, int threads) {
  const Kernels& kernel = kernels();
  parallel(forked() ? 1 : threads, [&](int index, int count) {
    const Range rows = part(to.rows, 1, index, count);
    if (rows.size) kernel.dequantise(weight, row + rows.first, col, slice(to, rows, {0, to.cols}));
  });
}

Dots dots(const Matrix& rows, const Matrix& cols, const Matrix& out) {
  Dots d = {};
  d.rows = rows.data, d.dtype = rows.dtype, d.row = rows.row_stride;
  d.cols = cols.data, d.col = cols.row_stride;
  d.out = values(out), d.out_row = out.row_stride, d.out_col = out.col_stride;
  d.m = rows.rows, d.n = cols.rows, d.k = rows.cols;
  return d;
}

int grid_cols(const Matrix& out, int64_t row_unit, int64_t col_unit, int64_t left_cost, int64_t right_cost,
              int threads) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int cols = 1; cols <= threads; ++cols) {
    const int rows = threads / cols;
    const auto largest = [](int64_t n, int64_t unit, int parts) {
      return round_up((round_up(n, unit) + parts - 1) / parts, unit);
    };
    const int64_t m = largest(out.rows, row_unit, rows), n = largest(out.cols, col_unit, cols);
    const int64_t cost = m * n + left_cost * m + right_cost * n;
    if (cost < least) least = cost, best = cols;
  }
  return best;
}

void gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads, int pieces,
          const Prepare* prepare) {
  gemm({{summands, start, out}}, threads, pieces, prepare);
}

void gemm(const std::vector<Result>& results, int threads, int pieces, const Prepare* prepare) {
  const int64_t rows = results[0].out.rows;
  if (!rows) return;
  const Kernels& kernel = kernels();
  std::vector<Problem> problems;
  int64_t own = 0, strips = 0;
  bool in_place = true;
  for (const auto& [summands, start, out] : results) {
    if (!out.cols) continue;
    const auto is_quantised = [](const Summand& summand) { return summand.quantised != nullptr; };
    const bool quantised = std::any_of(summands.begin(), summands.end(), is_quantised);
#if defined(__x86_64__) || defined(__i386__)
    if (tier() == Tier::kAmx && !quantised && std::min(out.rows, out.cols) >= kManyForTiles) {
      const bool done = tile_gemm(summands, start, out, threads, pieces, prepare);
      prepare = nullptr;
      if (done) continue;
    }
#endif
    const Kernels& used = kernel.pairs && pieces == 1 && !any_fp16(summands) ? *kernel.pairs : kernel;
    Problem p = {used, depths_of(used, summands), start, out, 0, 1, second_level_cache() / 8 * 5 / 4, quantised};
    for (const Depth& depth : p.depths) p.k += depth.k, p.deepest = std::max(p.deepest, depth.k);
    own = std::max(own, own_size(used, p));
    strips += round_up(out.cols, kernel.tile_cols) / kernel.tile_cols;
    in_place = in_place && p.depths[0].in_place;
    problems.push_back(std::move(p));
  }
  const auto prepared = [&](int index, int count) { (*prepare)(part(rows, 2 * kernel.tile_rows, index, count)); };
  if (problems.empty()) return prepare ? parallel(threads, prepared) : void();
  Scratch scratch;
  float* all = scratch.take(own * threads);
  // The columns of all results side by side.
  const Matrix wide = {nullptr, Dtype::kFloat32, rows, strips * kernel.tile_cols, 0, 1};
  parallel(threads, [&](int index, int count) {
    if (prepare) {
      prepared(index, count);
      barrier(count);
    }
    const int by = grid_cols(wide, kernel.tile_rows, kernel.tile_cols, in_place ? 0 : kPackLeft, kPackRight, count);
    if (index >= count / by * by) return;
    const Range mine = part(rows, kernel.tile_rows, index / by, count / by);
    const Range cols = part(wide.cols, kernel.tile_cols, index % by, by);
    int64_t first = 0;
    for (const Problem& p : problems) {
      const int64_t from = std::clamp<int64_t>(cols.first - first, 0, p.out.cols);
      const int64_t to = std::clamp<int64_t>(cols.first + cols.size - first, 0, p.out.cols);
      run(p, mine, {from, to - from}, all + index * own);
      first += round_up(p.out.cols, kernel.tile_cols);
    }
  });
}

}  // namespace nlora::cpu
