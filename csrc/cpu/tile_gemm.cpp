// The large product on a matrix unit. The unit is so fast that splitting values into planes counts: a thread splits its
// columns of right once, however many rows they meet, and as many rows of left at a time as stay in the second-level cache.
#if defined(__x86_64__) || defined(__i386__)
#include "cpu/gemm.h"
#include "cpu/tiles.h"

namespace nlora::cpu {
namespace {

// Steps of k that are packed together.
constexpr int64_t kGroupSteps = 24;
// Bytes of packed right that a thread keeps for further blocks of rows. They stream through the second-level cache once
// per block.
constexpr int64_t kKept = 8 << 20;
// Panels of right that are split together, so that a row of right that lies across them is read in longer pieces.
constexpr int64_t kTogether = 2;
// Rows whose sums are kept in fp32 at a time, where the result is not fp32 and k takes more than one group.
constexpr int64_t kSumRows = 1024;
// What splitting a value costs, in multiply-adds of one k.
constexpr int64_t kSplitLeft = 40, kSplitRight = 60;
// What the binary exponents of two operands' largest values may be, together and each, so that neither their planes nor
// their products' leave the range that the unit keeps, by more than is lost to rounding.
constexpr int kLeast = -90, kMost = 110;

int planes(const Matrix& m) { return m.dtype == Dtype::kFloat32 ? 3 : m.dtype == Dtype::kFloat16 ? 2 : 1; }

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
  const std::vector<Summand>* summands;
  std::vector<Group> groups;
  const float* start;
  Matrix out;
  int64_t rows, cols;     // of a block of left, of the right that is kept
  bool in_sums;
  int64_t left, right, sums;  // sizes of a thread's buffers, in floats
};

std::vector<Group> groups_of(const std::vector<Summand>& summands) {
  std::vector<Group> groups(1);
  for (int i = 0; i < int(summands.size()); ++i) {
    const int64_t k = summands[i].left.cols, steps = round_up(k, kTileStep) / kTileStep;
    // Nearly equal parts; a shallow summand goes with what came before.
    const int64_t parts = (steps + kGroupSteps - 1) / kGroupSteps;
    for (int64_t j = 0; j < parts; ++j) {
      const Range range = part(k, kTileStep, int(j), int(parts));
      const TileRun run = {round_up(range.size, kTileStep) / kTileStep, planes(summands[i].left), planes(summands[i].right)};
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

// Panels of a group, `distance` values apart: rows of left or columns of right. `loose` holds kTilePanel · kTileStep values.
template <bool LEFT>
void split(const Kernels& kernel, const Tiles& tiles, const Problem& p, const Group& group, Range at, float* loose,
           uint16_t* panels, int64_t distance, Seen* seen) {
  for (size_t i = 0; i < group.pieces.size(); ++i) {
    const Piece& piece = group.pieces[i];
    const Summand& summand = (*p.summands)[piece.summand];
    const int count = LEFT ? group.runs[i].left_planes : group.runs[i].right_planes;
    uint32_t& most = LEFT ? seen[piece.summand].left : seen[piece.summand].right;
    for (int64_t k = 0; k < piece.range.size; k += kTileStep, panels += panel_values(count)) {
      const Range depth = {piece.range.first + k, std::min<int64_t>(kTileStep, piece.range.size - k)};
      for (int64_t j = 0; j < at.size; j += kTilePanel) {
        const Range rows = {at.first + j, std::min<int64_t>(kTilePanel, at.size - j)};
        const Matrix from = slice(LEFT ? summand.left : summand.right, rows, depth);
        const float* values = static_cast<const float*>(from.data);
        int64_t row = LEFT ? from.row_stride : from.col_stride, size = LEFT ? from.cols : from.rows;
        if (from.dtype != Dtype::kFloat32 || (LEFT ? from.col_stride : from.row_stride) != 1) {
          const Matrix source = LEFT ? transposed(from) : from;
          kernel.pack(source.data, source.dtype, source.row_stride, source.col_stride, source.rows, source.cols, kTilePanel,
                      0, loose);
          values = loose, row = size = kTilePanel;
        }
        uint16_t* panel = panels + j / kTilePanel * distance;
        most = std::max(most, LEFT ? tiles.split_left(values, row, from.rows, size, count, panel)
                                   : tiles.split_right(values, row, from.cols, size, count, panel));
      }
    }
  }
}

// The rows and columns of the result that are one thread's.
void run(const Kernels& kernel, const Tiles& tiles, const Problem& p, Range rows, Range cols, float* own, Seen* seen) {
  if (!rows.size || !cols.size) return;
  uint16_t* left = reinterpret_cast<uint16_t*>(own);
  uint16_t* right = reinterpret_cast<uint16_t*>(own + p.left);
  float* sums = own + p.left + p.right;
  float* loose = sums + p.sums;
  const int64_t height = p.in_sums ? std::min(kSumRows, rows.size) : rows.size;
  // Blocks of nearly equal size.
  const int64_t step = round_up((height + (height - 1) / p.rows) / ((height - 1) / p.rows + 1), kTilePanel);
  for (int64_t top = 0; top < rows.size; top += height) {
    const int64_t bottom = std::min(rows.size, top + height);
    for (int64_t first = 0; first < cols.size; first += p.cols) {
      const int64_t width = std::min(p.cols, cols.size - first);
      for (size_t g = 0; g < p.groups.size(); ++g) {
        const Group& group = p.groups[g];
        const bool last = g + 1 == p.groups.size();
        for (int64_t block = top; block < bottom; block += step) {
          const int64_t end = std::min(bottom, block + step);
          split<true>(kernel, tiles, p, group, {rows.first + block, end - block}, loose, left, group.left, seen);
          for (int64_t col = 0; col < width; col += kTilePanel) {
            const int64_t strip = col / kTilePanel, together = strip % kTogether;
            const Range at = {cols.first + first + col, std::min<int64_t>(kTilePanel, width - col)};
            uint16_t* packed = right + (height > step ? strip : together) * group.right;
            if (block == top && together == 0)
              split<false>(kernel, tiles, p, group, {at.first, std::min(kTogether * kTilePanel, width - col)}, loose, packed,
                           group.right, seen);
            for (int64_t row = block; row < end; row += kTilePanel) {
              const Range mine = {rows.first + row, std::min<int64_t>(kTilePanel, end - row)};
              const Matrix out = slice(p.out, mine, at);
              const Matrix partial = !p.in_sums ? out : p.groups.size() == 1 ? fp32(loose, mine.size, at.size, kTilePanel)
                                                      : fp32(sums + (row - top) * p.cols + col, mine.size, at.size, p.cols);
              const float* before = static_cast<const float*>(partial.data);
              TileProduct product = {};
              product.left = left + (row - block) / kTilePanel * group.left, product.right = packed;
              product.runs = group.runs.data(), product.runs_count = int(group.runs.size());
              product.init = g ? before : p.start ? p.start + at.first : nullptr;
              product.init_row = g ? partial.row_stride : 0;
              product.c = static_cast<float*>(partial.data), product.c_row = partial.row_stride;
              product.m = int(mine.size), product.n = int(at.size);
              tiles.multiply(product);
              if (p.in_sums && last) kernel.round(before, partial.row_stride, out);
            }
          }
        }
      }
    }
  }
}

}  // namespace

bool tile_gemm(const std::vector<Summand>& summands, const float* start, const Matrix& out, int threads,
               const Prepare* prepare) {
  const Kernels& kernel = kernels();
  const Tiles& tiles = amx_tiles();
  Problem p = {&summands, groups_of(summands), start, out, 0, 0, out.dtype != Dtype::kFloat32 || out.col_stride != 1, 0, 0, 0};
  int64_t left = 1, right = 1;
  for (const Group& group : p.groups) left = std::max(left, group.left), right = std::max(right, group.right);
  const int64_t panels = std::max<int64_t>(1, second_level_cache() / 8 * 5 / (2 * left));
  p.rows = std::min(panels * kTilePanel, round_up(out.rows, kTilePanel));
  p.cols = std::min(std::max<int64_t>(1, kKept / (2 * right)) * kTilePanel, round_up(out.cols, kTilePanel));
  p.left = p.rows / kTilePanel * left / 2, p.right = p.cols / kTilePanel * right / 2;
  p.sums = p.in_sums && p.groups.size() > 1 ? std::min(kSumRows, out.rows) * p.cols : 0;
  const int64_t own = p.left + p.right + round_up(p.sums, 16) + kTilePanel * std::max(kTilePanel, kTileStep);
  p.sums = round_up(p.sums, 16);
  Scratch scratch;
  float* all = scratch.take(own * threads);
  std::vector<Seen> seen(threads * summands.size());
  parallel(threads, [&](int index, int count) {
    if (prepare) {
      (*prepare)(part(out.rows, 2 * kernel.tile_rows, index, count));
      barrier(count);
    }
    const int by = grid_cols(out, kTilePanel, kTilePanel, kSplitLeft, kSplitRight, count);
    const Range rows = part(out.rows, kTilePanel, index / by, count / by);
    const Range cols = part(out.cols, kTilePanel, index % by, by);
    if (index >= count / by * by) return;
    alignas(64) char saved[64];
    tiles.begin(saved);
    run(kernel, tiles, p, rows, cols, all + index * own, seen.data() + index * summands.size());
    tiles.end(saved);
  });
  for (size_t i = 0; i < summands.size(); ++i) {
    Seen most;
    for (size_t j = i; j < seen.size(); j += summands.size())
      most = {std::max(most.left, seen[j].left), std::max(most.right, seen[j].right)};
    if (!in_range(most)) return false;
  }
  return true;
}

}  // namespace nlora::cpu
#endif
