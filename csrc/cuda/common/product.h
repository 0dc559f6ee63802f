// What the matrix products of a layer are asked to do: plain structs, filled by host code.
#pragma once

#include <cstddef>

#include "../../ops.h"
#include "schedule.h"

namespace nlora::cuda {

// c = a·bᵀ + bias + p[:, :r]·wideᵀ, sums in fp32, everything in the 16-bit dtype of a.
//   a (m, k), c (m, n), p (m, w >= r)    rows contiguous
//   b, wide, shrink                      (n, k), (n, r), (w, k) for Major::K;  (k, n), (r, n), (k, w) for Major::MN
//   bias (1, n)                          contiguous, or none
// p and wide may be none. With shrink, p = a·shrinkᵀ is made by the same launch, else p is given.
//   t (m, v)                             rows contiguous, or none; Major::MN only
//   slices (splits·(w - r), v), fp32     contiguous: slice s = p[:, r:]ᵀ·t over the s-th share of the rows
// With t the launch sums the narrow gradient of what p holds beyond the adapter, w - r <= 128 and v <= 128 columns.
// n, k, r, w and v are multiples of 8, as are row strides; data is aligned to 16 bytes.
//
// Up to kMostProducts go in one launch: those of Major::K read one a and each makes its c and p, those of Major::MN are
// summed into one c, without a bias. Each names what it shares with the others.
struct Product {
  Matrix a, b, c, bias;
  Matrix p, wide;
  Matrix shrink;
  Matrix t, slices;
  Major major = Major::K;
  bool wide_alone_is_new = false;   // of all that is read here, the launch before makes nothing else
  uint32_t* state = nullptr;   // state_words(m) words, zero before the first launch; one launch at a time uses them
};

// Whether TMA and copies of 16 bytes can read a matrix of 16 bits where it lies.
inline bool has_aligned_rows(const Matrix& x) {
  const bool rows_fit = x.rows == 1 || (x.row_stride % 8 == 0 && x.row_stride >= x.cols);
  return x.cols % 8 == 0 && x.col_stride == 1 && rows_fit && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

inline size_t state_words(int64_t m) { return State::size(uint32_t(m)); }

}  // namespace nlora::cuda
