// Layers that share x: their products are one grid of threads, and the gradient of x one product.
#include "cpu/adapter.h"

namespace nlora::cpu {
namespace {

// Rows of x that all members' narrow products read before the next ones: they stay in the second-level cache.
constexpr int64_t kBlock = 48;
// Values of x up to which it is worth a copy in fp32 that all members read in place.
constexpr int64_t kConvertible = 1 << 22;

// each(rows) for blocks of some rows
template <class Each>
void in_blocks(Range rows, const Each& each) {
  for (int64_t row = 0; row < rows.size; row += kBlock) each({rows.first + row, std::min(kBlock, rows.size - row)});
}

}  // namespace

void forward_group(std::vector<Forward> members) {
  const Matrix& x = members[0].x;
  const int threads = forked() ? 1 : members[0].threads, pieces = members[0].pieces;
  if (!x.rows) return;
  const bool whole = bool(members[0].weight);
  if (whole && x.rows <= kFewRows) {
    for (const Forward& member : members) forward(member);
    return;
  }
  const Kernels& kernel = kernels();
  Scratch scratch;
  std::vector<std::optional<Chain>> chains(members.size());
  std::vector<const Chain*> skinny;
  std::vector<Result> results;
  Matrix read = x;
  const bool converts = x.dtype == Dtype::kFloat16 || (x.dtype == Dtype::kBFloat16 && pieces > 1) || x.col_stride != 1;
  if (whole && converts && x.rows * x.cols <= kConvertible)
    read = fp32(scratch.take(x.rows * x.cols), x.rows, x.cols, x.cols);
  for (size_t i = 0; i < members.size(); ++i) {
    const Forward& f = members[i];
    const float* start = row_vector(kernel, f.bias, scratch);
    std::vector<Summand> summands;
    if (whole) summands.push_back({read, f.weight});
    if (f.A) {
      const Chain& chain = chains[i].emplace(kernel, x, f.A, f.core.N, f.scaling, f.T, pieces, scratch);
      summands.push_back({chain.outcome, f.B});
      if (chain.skinny()) {
        skinny.push_back(&chain);
      } else {
        chain.all(threads);
      }
    }
    results.push_back({summands, start, f.y});
  }
  const Prepare prepare = [&](Range rows) {
    in_blocks(rows, [&](Range block) {
      if (read.data != x.data) copy(kernel, slice(x, block, {0, x.cols}), slice(read, block, {0, x.cols}));
      for (const Chain* chain : skinny) (*chain)(block);
    });
  };
  if (whole) return gemm(results, threads, pieces, &prepare);
  parallel(threads, [&](int index, int count) { prepare(part(x.rows, kernel.tile_rows, index, count)); });
  for (size_t i = 0; i < members.size(); ++i)
    widen(kernel, chains[i]->outcome, transposed(members[i].B), results[i].start, members[i].y, threads, pieces,
          scratch);
}

void backward_group(std::vector<Backward> members, const Matrix& dx) {
  const Matrix& dy = members[0].dy;
  const int threads = forked() ? 1 : members[0].threads, pieces = members[0].pieces;
  const bool whole = bool(members[0].weight);
  const Kernels& kernel = kernels();
  Scratch scratch;
  Sums sums(kernel, scratch);
  std::vector<std::optional<Narrow>> narrows(members.size());
  std::vector<const Narrow*> skinny;
  std::vector<Summand> summands;
  std::vector<std::pair<Matrix, Matrix>> products;
  const auto add = [&](const Matrix& left, const Matrix& right) {
    summands.push_back({left, transposed(right)});
    products.push_back({left, right});
  };
  for (size_t i = 0; i < members.size(); ++i) {
    Backward& b = members[i];
    b.dx = dx, b.threads = threads;
    if (whole) add(b.dy, b.weight);
    if (!b.A) continue;
    const Narrow& narrow = narrows[i].emplace(kernel, b, scratch);
    if (dx) add(narrow.H, b.A);
    if (b.A.rows <= kSkinny) {
      skinny.push_back(&narrow);
    } else {
      narrow.all(threads);
    }
  }
  const Prepare prepare = [&](Range rows) {
    for (const Narrow* narrow : skinny) (*narrow)(rows);
  };
  // Sums read rows of weight where they lie.
  const bool few = whole && dy.rows <= kFewRows &&
                   std::all_of(members.begin(), members.end(), [](const Backward& b) { return is_rows(b.weight); });
  if (dx && !few && !summands.empty()) {
    gemm(summands, nullptr, dx, threads, pieces, &prepare);
  } else {
    parallel(threads, [&](int index, int count) { prepare(part(dy.rows, kernel.tile_rows, index, count)); });
    if (few) sums.add(dx, products);
  }
  std::vector<Sums::Result> of_x;
  for (size_t i = 0; i < members.size(); ++i) {
    const Backward& b = members[i];
    if (b.dweight) gemm({{transposed(b.dy), transposed(b.x)}}, nullptr, b.dweight, threads, pieces);
    if (b.A && !summed(kernel, b)) {
      rank_gradients(kernel, b, *narrows[i], scratch);
    } else if (b.A) {
      of_x.push_back({b.dA, transposed(narrows[i]->H), 1.0f});
      sums.add({{transposed(b.dB), transposed(narrows[i]->P), 1.0f}}, b.dy);
      if (b.dcore.N) sums.add({{b.dcore.N, transposed(narrows[i]->G), b.scaling}}, b.T);
    }
  }
  sums.add(of_x, members[0].x);
  sums.run(threads);
}

}  // namespace nlora::cpu
