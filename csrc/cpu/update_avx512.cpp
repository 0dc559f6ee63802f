#include "cpu/update.h"

#include "cpu/avx512.inl"

namespace nlora::cpu {
namespace {

constexpr int kTileCols = kTileVectors * kWidth;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }

// One register tile of VECTORS·kWidth columns; `next` is the tile of c after it.
template <int VECTORS>
inline __attribute__((always_inline)) void tile(const float* a, const float* b, float* c, int64_t c_row,
                                                const float* next, int64_t k) {
  Vec sum[kTileRows][VECTORS] = {};
  int64_t p = 0;
  for (int row = 0; row < kTileRows; ++row) {
    // NOTE: c comes from memory. The next tile is fetched row by row: all at once, its lines would take the buffers that
    // loads of a and b wait for.
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) __builtin_prefetch(next + row * c_row + j * kWidth, 1);
    for (const int64_t end = k * (row + 1) / kTileRows; p < end; ++p) {
      Vec column[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) column[j] = load(b + p * kTileCols + j * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sum[i][j] += a[p * kTileRows + i] * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * c_row + j * kWidth;
      *reinterpret_cast<LooseVec*>(to) = load(to) + sum[i][j];
    }
}

// A tile that is cut short goes through a copy.
void edge(const float* a, const float* b, float* c, int64_t c_row, int rows, int cols, int64_t k) {
  alignas(64) float copy[kTileRows * kTileCols] = {};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) copy[i * kTileCols + j] = c[i * c_row + j];
  if (cols <= kWidth) {
    tile<1>(a, b, copy, kTileCols, copy, k);
  } else {
    tile<kTileVectors>(a, b, copy, kTileCols, copy, k);
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) c[i * c_row + j] = copy[i * kTileCols + j];
}

}  // namespace

void avx512_update(const float* a, const float* b, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k) {
  for (int64_t col = 0; col < n; col += kTileCols, b += kTileCols * k, c += kTileCols) {
    const int cols = int(n - col < kTileCols ? n - col : kTileCols);
    for (int64_t row = 0; row < m; row += kTileRows) {
      const int rows = int(m - row < kTileRows ? m - row : kTileRows);
      float* to = c + row * c_row;
      if (rows < kTileRows || cols < kTileCols) {
        edge(a + row * k, b, to, c_row, rows, cols, k);
      } else {
        // At the end of a strip it is the first tile of the strip beside it.
        const bool below = row + 2 * kTileRows <= m, beside = col + 2 * kTileCols <= n;
        tile<kTileVectors>(a + row * k, b, to, c_row, below ? to + kTileRows * c_row : c + beside * kTileCols, k);
      }
    }
  }
}

}  // namespace nlora::cpu
