// Layers that share out the rows of x: the experts of a mixture.
#include <algorithm>
#include <atomic>

#include "cpu/adapter.h"

namespace nlora::cpu {
namespace {

// An expert with more than this part of a thread's fair share of the rows is computed by all threads.
constexpr int64_t kPart = 4;

Matrix of(const Stack& stack, int64_t expert) {
  if (!stack) return {};
  Matrix matrix = stack.first;
  const int64_t bytes = matrix.dtype == Dtype::kFloat32 ? 4 : 2;
  matrix.data = static_cast<char*>(matrix.data) + expert * stack.stride * bytes;
  return matrix;
}

Matrix rows_of(const Matrix& m, Range rows) { return m ? slice(m, rows, {0, m.cols}) : m; }

// each(expert, rows, threads) for every expert: the large ones one after another by all threads, the others at the same
// time by one thread each, which takes the next largest when it has done one. The bits of a result do not depend on it.
template <class Each>
void share_out(const std::vector<int64_t>& ends, int64_t values, int threads, const Each& each) {
  const int64_t total = ends.back();
  threads = forked() ? 1 : team(threads, total, values, 1);
  std::vector<std::pair<Range, int64_t>> small;
  int64_t first = 0;
  for (int64_t expert = 0; expert < int64_t(ends.size()); ++expert) {
    const Range rows = {first, ends[expert] - first};
    first = ends[expert];
    if (threads > 1 && rows.size * threads * kPart > total) {
      each(expert, rows, threads);
    } else {
      small.push_back({rows, expert});
    }
  }
  std::stable_sort(small.begin(), small.end(),
                   [](const auto& a, const auto& b) { return a.first.size > b.first.size; });
  std::atomic<size_t> next = 0;
  parallel(small.size() > 1 ? threads : 1, [&](int, int) {
    for (size_t i; (i = next++) < small.size();) each(small[i].second, small[i].first, 1);
  });
}

}  // namespace

void forward_experts(const ExpertsForward& f) {
  share_out(f.ends, f.x.cols * f.y.cols, f.threads, [&](int64_t e, Range rows, int threads) {
    const Core core = {of(f.N, e), {}, {}, {}, {}};
    forward({rows_of(f.x, rows), of(f.weight, e), of(f.A, e), of(f.B, e), core, of(f.bias, e), rows_of(f.y, rows),
             rows_of(f.T, rows), f.scaling, threads, f.pieces});
  });
}

void backward_experts(const ExpertsBackward& b) {
  const Matrix& A = b.A.first;
  share_out(b.ends, A.cols * b.dy.cols, b.threads, [&](int64_t e, Range rows, int threads) {
    const Core core = {of(b.N, e), {}, {}, {}, {}}, dcore = {of(b.dN, e), {}, {}, {}, {}};
    backward({rows_of(b.dy, rows), rows_of(b.x, rows), rows_of(b.T, rows), of(b.weight, e), of(b.A, e), of(b.B, e),
              core, rows_of(b.dx, rows), of(b.dweight, e), of(b.dA, e), of(b.dB, e), dcore, b.scaling, threads,
              b.pieces});
  });
}

}  // namespace nlora::cpu
