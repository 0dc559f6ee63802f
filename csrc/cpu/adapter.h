// The narrow products of adapters, and the gradients that follow from them: what a layer and a group of layers share.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>

#include "cpu/gemm.h"

namespace nlora::cpu {

// Up to so many rows or columns on one side, products read the other side in place.
constexpr int64_t kSkinny = 32;
constexpr int64_t kFewRows = 16;
// Multiply-adds below which waking the other threads costs more than it saves.
constexpr int64_t kSerial = 1 << 17;

// The few multiply-adds of a product of three sizes are not worth a team of threads.
inline int team(int threads, int64_t a, int64_t b, int64_t c) { return a * b * c < kSerial ? 1 : threads; }

void scale(const Matrix& m, float factor);

// Memory for an (R, R) matrix.
Matrix square(int64_t R, Scratch& scratch);

// An (M, R) matrix in fp32 whose rows are padded to the vector width.
Matrix padded(const Kernels& kernel, int64_t M, int64_t R, Scratch& scratch);

// Whether the values of a row lie side by side.
inline bool is_rows(const Matrix& m) { return m.col_stride == 1; }

// m in fp32 with its columns side by side: m itself, where it is so, or a copy.
const float* row_vector(const Kernels& kernel, const Matrix& m, Scratch& scratch);

// Inner = left·outerᵀ, or left itself, and outcome = s·inner·coreᵀ. Where inner is wanted outside too, it is rounded to
// `rounded`, or is computed there.
class Chain {
 public:
  Matrix inner, outcome;

  Chain(const Kernels& kernel, const Matrix& left, const Matrix& outer, const Matrix& core, float scaling,
        const Matrix& rounded, int pieces, Scratch& scratch);

  bool skinny() const { return inner.cols <= kSkinny; }

  // Some rows of a skinny chain.
  void operator()(Range rows) const;
  void all(int threads) const;

 private:
  void multiply(const Matrix& left, const Matrix& right, const Matrix& out) const;

  const Kernels* kernel_;
  Matrix left_, outer_, core_, rounded_;
  float scaling_;
  int pieces_;
};

// out = start + left·right for a left (m, r) of few columns: out is written once and never read.
void widen(const Kernels& kernel, const Matrix& left, const Matrix& right, const float* start, const Matrix& out,
           int threads, int pieces, Scratch& scratch);

// The narrow matrices of a backward: those of G = dy·B, H = s·G·N and P = s·T·Nᵀ that a gradient needs.
class Narrow {
 public:
  Matrix G, H, P;

  Narrow(const Kernels& kernel, const Backward& b, Scratch& scratch);

  // Some rows, where the rank is small.
  void operator()(Range rows) const;
  void all(int threads) const;

 private:
  std::optional<Chain> from_dy_, from_T_;
};

// Whether dA, dB and dN are sums over the rows of x and dy as they lie; else these are packed, for rank_gradients.
bool summed(const Kernels& kernel, const Backward& b);

// dA, dB and dN by products of packed panels.
void rank_gradients(const Kernels& kernel, const Backward& b, const Narrow& narrow, Scratch& scratch);

// Gradients that are sums of rows weighted by few columns, all in one parallel region. Each thread has its own columns of
// each, so that nothing is added up across threads.
class Sums {
 public:
  // A result, and what it is a sum by.
  struct Result {
    Matrix out, left;
    float factor;
  };

  Sums(const Kernels& kernel, Scratch& scratch) : kernel_(kernel), scratch_(scratch) {}

  // out = start + Σ left·b for b whose rows lie side by side; start (n,) or nullptr.
  void add(const Matrix& out, const std::vector<std::pair<Matrix, Matrix>>& products, const float* start = nullptr);
  // out = factor·left·b of each that is there, with b read once.
  void add(const std::vector<Result>& results, const Matrix& b);

  void run(int threads);

 private:
  // A left and where its panels go, [ceil(m / tile_rows)][k][tile_rows].
  struct Packed {
    Matrix left;
    float* panels;
  };
  struct Term {
    const float* panels;
    Matrix b;
  };
  // Results below each other, each from a row on that is a multiple of tile_rows, in sums that are theirs.
  struct Task {
    std::vector<Term> terms;
    std::vector<Result> results;
    Matrix sums;
    const float* begin = nullptr;
  };

  int64_t rows_of(const Matrix& left) const { return round_up(left.rows, kernel_.tile_rows); }
  void start(int64_t rows, int64_t cols);
  void pack(const Packed& packed, int index, int count) const;
  void sum(const Task& task, Range cols, float* edge) const;
  void finish(const Task& task, Range cols) const;

  const Kernels& kernel_;
  Scratch& scratch_;
  std::vector<Packed> packed_;
  std::vector<Task> tasks_;
  int64_t work_ = 0;
};

}  // namespace nlora::cpu
