// Products of panels. The including file defines kWidth, kTileRows, kTileVectors and kUnrolled, as for kernels.inl, and what
// is said there holds here.

namespace nlora::cpu {
namespace {

// sum += left·right in every lane, whose one value of left stands for all of them.
template <class B>
INLINE void multiply_add(Vec& sum, const float* left, Vec right) {
  sum += *left * right;
}

// One register tile: kTileRows × VECTORS registers, all of which the compiler must keep in registers. With PANELS a is a
// panel, else it is read in place from its `count` rows.
// Rows of b read in place lie far apart, where no hardware prefetcher looks: with FETCH those of the next strip, b_strip
// further on, are fetched meanwhile.
template <int VECTORS, bool PANELS, bool FETCH, class B>
INLINE void tile(const Product& p, int64_t row, int count, const B* b, const float* init, int64_t init_row, float* c,
                 int64_t c_row) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) __builtin_prefetch(c + i * c_row + j * kWidth, 1);
  Vec sum[kTileRows][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vec{};
  for (int part = 0; part < (PANELS ? 1 : 2); ++part) {
    const int64_t k = part ? p.tail_k : p.k;
    const float* panel = p.a + row / kTileRows * p.a_panel;
    const float* a[kTileRows];
    // NOTE: rows past the last one repeat it: they are computed and not stored.
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const int64_t at = row + (i < count ? i : count - 1);
      a[i] = PANELS ? nullptr : part ? p.tail + at * p.tail_row : p.a + at * p.a_row;
    }
    // NOTE: unrolled, so that counting takes fewer turns on the ports that multiply, where there are registers to spare.
#pragma GCC unroll kUnrolled
    for (int64_t q = 0; q < k; ++q) {
      Vec column[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) {
        column[j] = load(b + j * kWidth);
        if (FETCH) __builtin_prefetch(b + p.b_strip + j * kWidth);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) multiply_add<B>(sum[i][j], PANELS ? panel + i : a[i] + q, column[j]);
      panel += kTileRows;
      b += p.b_row;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) {
      // NOTE: added last, a sum over many blocks of k loses less to rounding than if it were carried along.
      if (init) sum[i][j] += load(init + i * init_row + j * kWidth);
      store(c + i * c_row + j * kWidth, sum[i][j]);
    }
}

constexpr int kTileCols = kTileVectors * kWidth;
// The k up to which a product is bound by writing c.
constexpr int kShallow = 32;

template <int VECTORS, bool PANELS, bool FETCH, class B, class C>
INLINE void multiply_tile(const Product& p, int64_t row, int64_t col) {
  constexpr int kCols = VECTORS * kWidth;
  const int cols = int(p.n - col < kCols ? p.n - col : kCols);
  const int rows = int(p.m - row < kTileRows ? p.m - row : kTileRows);
  const bool whole = rows == kTileRows && cols == kCols;
  const B* b = static_cast<const B*>(p.b) + col / kTileCols * p.b_strip;
  const float* init = p.init ? p.init + row * p.init_row + col : nullptr;
  C* c = static_cast<C*>(p.c) + row * p.c_row + col;
  if constexpr (sizeof(C) == sizeof(float)) {
    if (whole) return tile<VECTORS, PANELS, FETCH>(p, row, rows, b, init, p.init_row, c, p.c_row);
  }
  alignas(64) float start[kTileRows * kCols];
  alignas(64) float result[kTileRows * kCols];
  int64_t init_row = p.init_row;
  if (init && !whole) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < cols; ++j) start[i * kCols + j] = init[i * p.init_row + j];
    init = start, init_row = kCols;
  }
  tile<VECTORS, PANELS, FETCH>(p, row, rows, b, init, init_row, result, kCols);
  for (int i = 0; i < rows; ++i) round_row(result + i * kCols, c + i * p.c_row, cols);
}

// One tile, no wider than its columns ask for.
template <bool PANELS, bool FETCH, class B, class C, int VECTORS = kTileVectors>
INLINE void multiply_strip(const Product& p, int64_t row, int64_t col) {
  if constexpr (VECTORS > 1 && !FETCH) {
    if (p.n - col <= (VECTORS - 1) * kWidth) return multiply_strip<PANELS, FETCH, B, C, VECTORS - 1>(p, row, col);
  }
  multiply_tile<VECTORS, PANELS, FETCH, B, C>(p, row, col);
}

template <bool PANELS, bool FETCH, class B, class C>
void multiply_all(const Product& p) {
  const int64_t rows = (p.m + kTileRows - 1) / kTileRows, strips = (p.n + kTileCols - 1) / kTileCols;
  // A shallow b stays in the first cache level, so c is written row by row.
  const bool by_rows = p.k <= kShallow;
  const int64_t inner = by_rows ? strips : rows;
  for (int64_t i = 0; i < rows * strips; ++i) {
    const int64_t row = (by_rows ? i / inner : i % inner) * kTileRows,
                  col = (by_rows ? i % inner : i / inner) * kTileCols;
    if (!PANELS && p.ahead) {
      // Every tile fetches its share.
      const int64_t end = (i + 1) * p.k / (rows * strips);
      for (int64_t k = i * p.k / (rows * strips); k < end; k += 16)
        for (int64_t r = 0; r < p.m; ++r) __builtin_prefetch(p.ahead + r * p.a_row + k);
    }
    multiply_strip<PANELS, FETCH, B, C>(p, row, col);
  }
}

// NOTE: only the pairs that occur are compiled: packed b is fp32, and only panels meet rows of b in place.
template <class B, class C>
void multiply_typed(const Product& p) {
  if constexpr (sizeof(B) == sizeof(float)) {
    if (p.a_row) return multiply_all<false, false, B, C>(p);
    if (p.k <= kShallow || p.b_row == kTileCols) return multiply_all<true, false, B, C>(p);
  }
  multiply_all<true, true, B, C>(p);
}

template <class B>
void multiply_from(const Product& p) {
  switch (p.c_dtype) {
    case Dtype::kFloat32: return multiply_typed<B, float>(p);
    case Dtype::kBFloat16: return multiply_typed<B, BFloat16>(p);
    case Dtype::kFloat16: return multiply_typed<B, Float16>(p);
  }
}

}  // namespace
}  // namespace nlora::cpu
