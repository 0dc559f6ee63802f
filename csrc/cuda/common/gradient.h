// What a narrow gradient is asked to do: plain structs, filled by host code.
#pragma once

#include <stdexcept>
#include <string>

#include "../../ops.h"

namespace nlora::cuda {

// The gradient of a narrow matrix, Σ over the rows of wideᵀ·narrow, left in fp32 slices: slice s is the sum over its
// share of the rows. Nothing is added by atomics, so results repeat to the bit.
//   wide (m, n), narrow (m, w)   of one 16-bit dtype, n and w multiples of 8, rows contiguous and aligned to 16 bytes
//   slices (splits·n, w)         fp32, contiguous
struct Gradient {
  Matrix wide, narrow;
  Matrix slices;
  uint32_t splits;   // from GradientSplits or AmpereSplits: at most one for each step of rows
};

// Every slice has at least one step of rows.
inline void check_splits(const Gradient& gradient, uint32_t step_rows) {
  const int64_t steps = (gradient.wide.rows + step_rows - 1) / step_rows;
  if (gradient.splits < 1 || gradient.splits > steps) {
    throw std::invalid_argument("splits must be 1 to " + std::to_string(steps) + ", got " +
                                std::to_string(gradient.splits));
  }
}

// out = s·(Σ slices)·coreᵀ, or its transpose; the slices are added in order.
//   slices (splits·n, w)     fp32, contiguous
//   core (w, w)              or none
//   out (n, w), or (w, n) if transposed; core and out in any dtype and strides
struct Finish {
  Matrix slices;
  uint32_t splits;
  Matrix core;
  Matrix out;
  float scaling;
  bool transposed;
};

// out[:, :R] = s·B·core, or s·B without core, and out[:, R:2R] = B if out has 2R columns. Without core and with s = 1 it
// is a cast.
//   B (n, R), core (R, R), out (n, R) or (n, 2R)   each in any dtype and strides, sums in fp32
struct Fold {
  Matrix B, core, out;
  float scaling;
};

}  // namespace nlora::cuda
