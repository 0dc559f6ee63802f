// The kernels of gram.h, written once with the compiler's vector types; everything here has internal linkage. The
// including file defines kWidth, 4 or 8, in namespace nlora::cpu::{anonymous}.
#include "cpu/gram.h"

namespace nlora::cpu {
namespace {

// Columns of w that are summed in fp32.
constexpr int64_t kBlock = 256;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
INLINE void store(float* p, Vec value) { *reinterpret_cast<LooseVec*>(p) = value; }

// sums[i : i + 4, j : j + 2] of a block; rows past the last one repeat it, and are not stored.
INLINE void gram_tile(const float* w, int64_t stride, int64_t columns, int64_t k, int64_t i, int64_t j, double* sums) {
  const float *left[4], *right[2];
  for (int a = 0; a < 4; ++a) left[a] = w + least(i + a, k - 1) * stride;
  for (int b = 0; b < 2; ++b) right[b] = w + least(j + b, k - 1) * stride;
  Vec sum[4][2] = {};
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    const Vec first = load(right[0] + c), second = load(right[1] + c);
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) {
      const Vec row = load(left[a] + c);
      sum[a][0] += row * first;
      sum[a][1] += row * second;
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a)
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      if (i + a >= k || j + b >= k) continue;
      float total = 0;
      for (int lane = 0; lane < kWidth; ++lane) total += sum[a][b][lane];
      for (int64_t rest = c; rest < columns; ++rest) total += left[a][rest] * right[b][rest];
      sums[(i + a) * k + j + b] += total;
    }
}

// Adds up wᵀ·w of rows of which gram_columns(k) values can be read: what is past k is not stored.
INLINE void gram_transposed(const float* w, int64_t stride, int64_t rows, int64_t k, double* sums) {
  for (int64_t start = 0; start < rows; start += kBlock) {
    const int64_t end = least(rows, start + kBlock);
    for (int64_t i = 0; i < k; i += kWidth)
      for (int64_t j = i; j < k; j += kWidth) {
        Vec sum[kWidth] = {};
        for (int64_t row = start; row < end; ++row) {
          const float* left = w + row * stride + i;
          const Vec right = load(w + row * stride + j);
#pragma GCC unroll 8
          for (int a = 0; a < kWidth; ++a) sum[a] += left[a] * right;
        }
        for (int a = 0; a < least(kWidth, k - i); ++a)
          for (int b = 0; b < least(kWidth, k - j); ++b) sums[(i + a) * k + j + b] += sum[a][b];
      }
  }
}

void gram(const float* w, int64_t n, int64_t k, bool transposed, double* sums, float* scratch) {
  for (int64_t ij = 0; ij < k * k; ++ij) sums[ij] = 0;
  if (transposed) {
    // Vectors reach past the end of a row: the last rows are read from a copy that has the room.
    const int64_t padded = gram_columns(k);
    const int64_t rest = least(n, (padded - 1) / k), whole = n - rest;
    gram_transposed(w, k, whole, k, sums);
    for (int64_t row = 0; row < rest; ++row)
      for (int64_t c = 0; c < padded; ++c) scratch[row * padded + c] = c < k ? w[(whole + row) * k + c] : 0.0f;
    gram_transposed(scratch, padded, rest, k, sums);
  } else {
    for (int64_t start = 0; start < n; start += kBlock)
      for (int64_t i = 0; i < k; i += 4)
        for (int64_t j = i; j < k; j += 2) gram_tile(w + start, n, least(kBlock, n - start), k, i, j, sums);
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < i; ++j) sums[i * k + j] = sums[j * k + i];
}

// out[i : i + 4] at VECTORS·kWidth columns
template <int VECTORS>
INLINE void product_tile(const float* D, const float* w, int64_t n, int64_t k, int64_t i, float* out) {
  const int64_t padded = gram_columns(k);
  Vec sum[4][VECTORS] = {};
  for (int64_t j = 0; j < k; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Vec row = load(w + j * n + v * kWidth);
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) sum[a][v] += D[j * padded + i + a] * row;
    }
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
      if (i + a < k) store(out + (i + a) * n + v * kWidth, sum[a][v]);
}

void product_as_stored(const float* D, const float* w, int64_t n, int64_t k, float* out) {
  const int64_t padded = gram_columns(k);
  int64_t c = 0;
  for (; c + 2 * kWidth <= n; c += 2 * kWidth)
    for (int64_t i = 0; i < k; i += 4) product_tile<2>(D, w + c, n, k, i, out + c);
  for (; c + kWidth <= n; c += kWidth)
    for (int64_t i = 0; i < k; i += 4) product_tile<1>(D, w + c, n, k, i, out + c);
  for (; c < n; ++c)
    for (int64_t i = 0; i < k; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += D[j * padded + i] * w[j * n + c];
      out[i * n + c] = sum;
    }
}

// kWidth rows at a time; those past the last one repeat it, and are not stored.
void product_transposed(const float* D, const float* w, int64_t n, int64_t k, float* out) {
  const int64_t padded = gram_columns(k);
  for (int64_t row = 0; row < n; row += kWidth) {
    const float* left[kWidth];
    for (int a = 0; a < kWidth; ++a) left[a] = w + least(row + a, n - 1) * k;
    for (int64_t j = 0; j < k; j += kWidth) {
      Vec sum[kWidth] = {};
      for (int64_t i = 0; i < k; ++i) {
        const Vec right = load(D + i * padded + j);
#pragma GCC unroll 8
        for (int a = 0; a < kWidth; ++a) sum[a] += left[a][i] * right;
      }
#pragma GCC unroll 8
      for (int a = 0; a < kWidth; ++a) {
        if (row + a >= n) break;
        float* to = out + (row + a) * k + j;
        if (j + kWidth <= k) {
          store(to, sum[a]);
        } else {
          for (int b = 0; j + b < k; ++b) to[b] = sum[a][b];
        }
      }
    }
  }
}

void product(const float* D, const float* w, int64_t n, int64_t k, bool transposed, float* out) {
  (transposed ? product_transposed : product_as_stored)(D, w, n, k, out);
}

constexpr GramKernels kKernels = {gram, product};

}  // namespace
}  // namespace nlora::cpu
