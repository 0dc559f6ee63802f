// The large product on a matrix unit. The unit is so fast that splitting values into planes counts: a thread splits its
// columns of right once, however many rows they meet, and as many rows of left at a time as stay in the second-level cache.
#if defined(__x86_64__) || defined(__i386__)
#include "cpu/gemm.h"
#include "cpu/tiles.h"

#include <cstring>

namespace nlora::cpu {
namespace {

// Steps of k that are packed together.
constexpr int64_t kGroupSteps = 24;
// Bytes of packed right that a thread keeps for further blocks of rows. They stream through the second-level cache once
// per block.
constexpr int64_t kKept = 8 << 20;
// Rows of left at a time where out is read too: so few that the pages they lie on stay known from one strip to the next.
constexpr int64_t kUpdateRows = 128;
// Panels of right that are split together, so that a row of right that lies across them is read in longer pieces.
constexpr int64_t kTogether = 2;
// Rows whose sums are kept in fp32 at a time, where the result is not fp32 and k takes more than one group.
constexpr int64_t kSumRows = 1024;
// What splitting a value costs, in multiply-adds of one k.
constexpr int64_t kSplitLeft = 40, kSplitRight = 60;
// What the binary exponents of two operands' largest values may be, together and each, so that neither their planes nor
// their products' leave the range that the unit keeps, by more than is lost to rounding.
constexpr int kLeast = -90, kMost = 110;

int planes(const Matrix& m, int pieces) {
  return m.dtype == Dtype::kFloat32 ? pieces : m.dtype == Dtype::kFloat16 ? 2 : 1;
}

// A run of k inside one summand.
struct Piece {
  int summand;
  Range range;
};

struct Group {
  std::vector<Piece> pieces;
  std::vector<TileRun> runs;
  int64_t steps = 0, left = 0, right = 0;  // values of a panel
};

struct Problem {
  const Kernels& kernel;
  const Tiles& tiles;
  const std::vector<Summand>& summands;
  std::vector<Group> groups;
  const float* start;
  Matrix out;
  bool onto;  // out is added to
  bool in_sums;  // results are rounded or scattered, so they are summed elsewhere
  int64_t rows, cols;  // of a block of left, and of the part of right that may be kept
  int64_t left, right, sums;  // sizes of a thread's buffers, in floats
};

std::vector<Group> groups_of(const std::vector<Summand>& summands, int pieces) {
  std::vector<Group> groups(1);
  for (int i = 0; i < int(summands.size()); ++i) {
    const int64_t k = summands[i].left.cols, steps = round_up(k, kTileStep) / kTileStep;
    // Nearly equal parts; a shallow summand goes with what came before.
    const int64_t parts = (steps + kGroupSteps - 1) / kGroupSteps;
    for (int64_t j = 0; j < parts; ++j) {
      const Range range = part(k, kTileStep, int(j), int(parts));
      const Matrix &left = summands[i].left, &right = summands[i].right;
      // Of fp16 every bit is multiplied.
      const bool exact = left.dtype == Dtype::kFloat16 || right.dtype == Dtype::kFloat16;
      const TileRun run = {round_up(range.size, kTileStep) / kTileStep, planes(left, pieces), planes(right, pieces),
                           exact ? 2 : pieces - 1};
      if (groups.back().steps && groups.back().steps + run.steps > kGroupSteps + kGroupSteps / 4) groups.emplace_back();
      Group& group = groups.back();
      group.pieces.push_back({i, range});
      group.runs.push_back(run);
      group.steps += run.steps;
      group.left += run.steps * panel_values(run.left_planes);
      group.right += run.steps * panel_values(run.right_planes);
    }
  }
  return groups;
}

// The largest magnitudes that a thread saw of a summand, as bits.
struct Seen {
  uint32_t left = 0, right = 0;
};

bool in_range(const Seen& seen) {
  if (!seen.left || !seen.right) return seen.left < 0x7f800000 && seen.right < 0x7f800000;
  const int left = int(seen.left >> 23) - 127, right = int(seen.right >> 23) - 127;
  return std::min({left, right, left + right}) >= kLeast && std::max({left, right, left + right}) <= kMost;
}

// One thread's part of the work, with memory of its own.
class Worker {
 public:
  Worker(const Problem& problem, float* own, Seen* seen)
      : p_(problem),
        left_(reinterpret_cast<uint16_t*>(own)),
        right_(reinterpret_cast<uint16_t*>(own + p_.left)),
        sums_(own + p_.left + p_.right),
        loose_(sums_ + p_.sums),
        seen_(seen) {}

  void run(Range rows, Range cols) {
    if (!rows.size) return;
    const int64_t height = p_.in_sums ? kSumRows : rows.size;
    for (int64_t row = 0; row < rows.size; row += height) {
      const Range some_rows = {rows.first + row, std::min(height, rows.size - row)};
      for (int64_t col = 0; col < cols.size; col += p_.cols) {
        const Range some_cols = {cols.first + col, std::min(p_.cols, cols.size - col)};
        for (size_t group = 0; group < p_.groups.size(); ++group) add(int(group), some_rows, some_cols);
      }
    }
  }

 private:
  // Adds a group's part of k to the sums of these rows and columns.
  void add(int group, Range rows, Range cols) {
    const Group& packed = p_.groups[group];
    // Blocks of nearly equal size.
    const int64_t blocks = (rows.size + p_.rows - 1) / p_.rows;
    const int64_t height = round_up((rows.size + blocks - 1) / blocks, kTilePanel);
    for (int64_t top = 0; top < rows.size; top += height) {
      const Range block = {rows.first + top, std::min(height, rows.size - top)};
      split<true>(packed, block, left_);
      for (int64_t strip = 0; strip * kTilePanel < cols.size; ++strip) {
        const int64_t first = strip * kTilePanel, together = strip % kTogether;
        const Range at = {cols.first + first, std::min<int64_t>(kTilePanel, cols.size - first)};
        // NOTE: what no second block of rows will meet is written over while the cache still holds it.
        uint16_t* right = right_ + (blocks > 1 ? strip : together) * packed.right;
        if (top == 0 && together == 0)
          split<false>(packed, {at.first, std::min(kTogether * kTilePanel, cols.size - first)}, right);
        for (int64_t row = 0; row < block.size; row += kTilePanel) {
          const Range mine = {block.first + row, std::min<int64_t>(kTilePanel, block.size - row)};
          const uint16_t* left = left_ + row / kTilePanel * packed.left;
          multiply(group, left, right, mine, at, sums_ + (top + row) * p_.cols + first);
        }
      }
    }
  }

  // Splits rows of left, or columns of right, into panels of a group.
  template <bool LEFT>
  void split(const Group& group, Range at, uint16_t* panels) {
    for (size_t i = 0; i < group.pieces.size(); ++i) {
      const Piece& piece = group.pieces[i];
      const Summand& summand = p_.summands[piece.summand];
      const TileRun& run = group.runs[i];
      const int planes = LEFT ? run.left_planes : run.right_planes;
      const bool single = run.left_planes == 1 && run.right_planes == 1 && p_.kernel.pairs;
      uint32_t& most = LEFT ? seen_[piece.summand].left : seen_[piece.summand].right;
      for (int64_t k = 0; k < piece.range.size; k += kTileStep, panels += panel_values(planes)) {
        const Range depth = {piece.range.first + k, std::min<int64_t>(kTileStep, piece.range.size - k)};
        for (int64_t j = 0; j < at.size; j += kTilePanel) {
          const Range lines = {at.first + j, std::min<int64_t>(kTilePanel, at.size - j)};
          const Matrix from = slice(LEFT ? summand.left : summand.right, lines, depth);
          uint16_t* panel = panels + j / kTilePanel * (LEFT ? group.left : group.right);
          if (single) {
            LEFT ? place_left(from, panel) : place_right(from, panel);
          } else {
            most = std::max(most, split<LEFT>(from, planes, panel));
          }
        }
      }
    }
  }

  // One step of one panel, whose one plane nothing is split for. What bf16 cannot hold comes out as the unit makes it:
  // infinities and NaN as they are, subnormals as zero.
  void place_right(const Matrix& from, uint16_t* panel) {
    constexpr int kHalf = kTilePanel / 2;
    if (from.cols < kTileStep) std::memset(panel, 0, panel_values(1) * sizeof *panel);
    p_.kernel.pairs->pack(from.data, from.dtype, from.row_stride, from.col_stride, from.rows, from.cols, kHalf,
                          kHalf * kTileStep / 2, reinterpret_cast<float*>(panel));
  }

  void place_left(Matrix from, uint16_t* panel) {
    if (from.rows < kTilePanel || from.cols < kTileStep) std::memset(panel, 0, panel_values(1) * sizeof *panel);
    const Matrix to = {panel, Dtype::kBFloat16, from.rows, from.cols, kTileStep, 1};
    if (from.dtype == Dtype::kBFloat16 && from.col_stride == 1) {
      for (int64_t i = 0; i < from.rows; ++i)
        std::memcpy(panel + i * kTileStep, static_cast<uint16_t*>(from.data) + i * from.row_stride,
                    from.cols * sizeof *panel);
      return;
    }
    if (from.dtype != Dtype::kFloat32 || from.col_stride != 1) {
      p_.kernel.pack(from.data, from.dtype, from.col_stride, from.row_stride, from.cols, from.rows, kTilePanel, 0,
                     loose_);
      from = fp32(loose_, from.rows, from.cols, kTilePanel);
    }
    p_.kernel.round(values(from), from.row_stride, to);
  }

  // One step of one panel.
  template <bool LEFT>
  uint32_t split(const Matrix& from, int planes, uint16_t* panel) {
    const float* values = static_cast<const float*>(from.data);
    int64_t row = LEFT ? from.row_stride : from.col_stride, size = LEFT ? from.cols : from.rows;
    if (from.dtype != Dtype::kFloat32 || (LEFT ? from.col_stride : from.row_stride) != 1) {
      const Matrix source = LEFT ? transposed(from) : from;
      p_.kernel.pack(source.data, source.dtype, source.row_stride, source.col_stride, source.rows, source.cols,
                     kTilePanel, 0, loose_);
      values = loose_, row = size = kTilePanel;
    }
    return LEFT ? p_.tiles.split_left(values, row, from.rows, size, planes, panel)
                : p_.tiles.split_right(values, row, from.cols, size, planes, panel);
  }

  // A panel of each side.
  void multiply(int group, const uint16_t* left, const uint16_t* right, Range rows, Range cols, float* sums) {
    const Group& packed = p_.groups[group];
    const Matrix out = slice(p_.out, rows, cols);
    const Matrix elsewhere =
        p_.sums ? fp32(sums, rows.size, cols.size, p_.cols) : fp32(loose_, rows.size, cols.size, kTilePanel);
    const Matrix& partial = p_.in_sums ? elsewhere : out;
    TileProduct product = {};
    product.left = left, product.right = right;
    product.runs = packed.runs.data(), product.runs_count = int(packed.runs.size());
    product.c = static_cast<float*>(partial.data), product.c_row = partial.row_stride;
    const bool adds = group || p_.onto;
    product.init = adds ? product.c : p_.start ? p_.start + cols.first : nullptr;
    product.init_row = adds ? partial.row_stride : 0;
    product.m = int(rows.size), product.n = int(cols.size);
    p_.tiles.multiply(product);
    if (p_.in_sums && group + 1 == int(p_.groups.size())) p_.kernel.round(product.c, partial.row_stride, out);
  }

  const Problem& p_;
  uint16_t *left_, *right_;
  float *sums_, *loose_;  // kSumRows rows of p.cols where several groups need them; kTilePanel · kTileStep values
  Seen* seen_;
};

// `block`, whole panels, bounds the rows of left that are multiplied at a time.
Problem problem_of(const std::vector<Summand>& summands, const float* start, const Matrix& out, bool onto,
                   int64_t block, int pieces) {
  const bool in_sums = out.dtype != Dtype::kFloat32 || out.col_stride != 1;
  Problem p = {kernels(), amx_tiles(), summands, groups_of(summands, pieces), start, out, onto, in_sums, 0, 0, 0, 0, 0};
  int64_t left = 1, right = 1;
  for (const Group& group : p.groups) left = std::max(left, group.left), right = std::max(right, group.right);
  const auto panels = [](int64_t bytes, int64_t values, int64_t lines) {
    return std::min(std::max(bytes / (2 * values), kTogether) * kTilePanel, round_up(lines, kTogether * kTilePanel));
  };
  p.rows = std::min(block, panels(second_level_cache() / 8 * 5, left, out.rows)),
  p.cols = panels(kKept, right, out.cols);
  p.left = p.rows / kTilePanel * left / 2, p.right = p.cols / kTilePanel * right / 2;
  if (in_sums && p.groups.size() > 1) p.sums = std::min(kSumRows, out.rows) * p.cols;
  return p;
}

// What was seen of every summand.
std::vector<Seen> multiply(const Problem& p, int threads, const Prepare* prepare) {
  const int64_t own = p.left + p.right + p.sums + kTilePanel * kTileStep, count_summands = int64_t(p.summands.size());
  Scratch scratch;
  float* all = scratch.take(own * threads);
  std::vector<Seen> seen(threads * count_summands);
  parallel(threads, [&](int index, int count) {
    if (prepare) {
      (*prepare)(part(p.out.rows, 2 * p.kernel.tile_rows, index, count));
      barrier(count);
    }
    const int by = grid_cols(p.out, kTilePanel, kTilePanel, kSplitLeft, kSplitRight, count);
    const Range rows = part(p.out.rows, kTilePanel, index / by, count / by);
    const Range cols = part(p.out.cols, kTilePanel, index % by, by);
    if (index >= count / by * by) return;
    alignas(64) char saved[64];
    p.tiles.begin(saved);
    Worker(p, all + index * own, seen.data() + index * count_summands).run(rows, cols);
    p.tiles.end(saved);
  });
  for (size_t i = count_summands; i < seen.size(); ++i) {
    Seen& most = seen[i % count_summands];
    most = {std::max(most.left, seen[i].left), std::max(most.right, seen[i].right)};
  }
  seen.resize(count_summands);
  return seen;
}

uint32_t largest(const Matrix& m) {
  int32_t result = 0;
  for (int64_t i = 0; i < m.rows; ++i) {
    const int32_t* row = static_cast<const int32_t*>(m.data) + i * m.row_stride;
    for (int64_t j = 0; j < m.cols; ++j) result = std::max(result, row[j * m.col_stride] & 0x7fffffff);
  }
  return uint32_t(result);
}

}  // namespace

bool tile_gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads, int pieces,
               const Prepare* prepare) {
  const std::vector<Seen> seen = multiply(problem_of(summands, start, out, false, INT64_MAX, pieces), threads, prepare);
  return std::all_of(seen.begin(), seen.end(), in_range);
}

bool tile_update(const Matrix& out, const Matrix& left, const Matrix& right, int threads) {
  // NOTE: before anything is added.
  if (!in_range({largest(left), largest(right)})) return false;
  const std::vector<Summand> summands = {{left, right}};
  multiply(problem_of(summands, nullptr, out, true, kUpdateRows, 3), threads, nullptr);
  return true;
}

}  // namespace nlora::cpu
#endif
