// The kernels of one instruction set, written once with the compiler's vector types. The including file defines kWidth,
// kTileRows, kTileVectors, kUnrolled, kDotRows and kDotCols in namespace nlora::cpu::{anonymous}.
//
// NOTE: everything here has internal linkage and nothing of the standard library is used: an inline function shared
// between files of different flags would let the linker put AVX code into the portable path.

#include "cpu/vectors.inl"
#include "cpu/dots.inl"
#include "cpu/quantised.inl"

namespace nlora::cpu {
namespace {

// Product

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
        for (int j = 0; j < VECTORS; ++j) sum[i][j] += (PANELS ? panel[i] : a[i][q]) * column[j];
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

void multiply(const Product& p) {
  switch (p.b_dtype) {
    case Dtype::kFloat32: return multiply_from<float>(p);
    case Dtype::kBFloat16: return multiply_from<BFloat16>(p);
    case Dtype::kFloat16: return multiply_from<Float16>(p);
  }
}

void dots(const Dots& d) {
  switch (d.dtype) {
    case Dtype::kFloat32: return dots_typed<float, float>(d);
    case Dtype::kBFloat16: return dots_typed<BFloat16, float>(d);
    case Dtype::kFloat16: return dots_typed<Float16, float>(d);
  }
}

// Packing

// Exchanges the off-diagonal blocks of STEP lanes of two vectors that lie STEP rows apart in a matrix.
template <int STEP, int... I>
INLINE void exchange(Vec& a, Vec& b, Lanes<I...>) {
  const Vec first = __builtin_shufflevector(a, b, (I & STEP ? kWidth + I - STEP : I)...);
  const Vec second = __builtin_shufflevector(a, b, (I & STEP ? kWidth + I : I + STEP)...);
  a = first;
  b = second;
}

template <int STEP>
INLINE void transpose(Vec (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if (!(i & STEP)) exchange<STEP>(rows[i], rows[i | STEP], AllLanes{});
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

// kWidth rows, each with its k side by side, into panels of which LANES lanes are theirs: all of them go to one panel, or,
// where a panel is narrower than a register, to several.
template <int LANES, class T>
void pack_rows(const T* source, int64_t row_stride, int rows, int64_t k, int size, int64_t distance, float* panel) {
  int64_t p = 0;
  for (; p + kWidth <= k; p += kWidth) {
    Vec block[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      block[i] = i < rows ? load(source + i * row_stride + p) : Vec{};
      __builtin_prefetch(source + (i + kWidth) * row_stride + p);
    }
    transpose<kWidth / 2>(block);
#pragma GCC unroll 16
    for (int q = 0; q < kWidth; ++q) {
      if (LANES == kWidth) {
        store(panel + (p + q) * size, block[q]);
        continue;
      }
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; lane += LANES)
        if (lane < rows)
          __builtin_memcpy(panel + lane / LANES * distance + (p + q) * size, reinterpret_cast<float*>(block + q) + lane,
                           LANES * sizeof(float));
    }
  }
  for (; p < k; ++p)
    for (int i = 0; i < kWidth; ++i)
      if (i / LANES * LANES < rows)
        panel[i / LANES * distance + p * size + i % LANES] = i < rows ? to_float(source[i * row_stride + p]) : 0.0f;
}

// Rows of a source that are fetched ahead.
constexpr int kRowsAhead = 4;

template <class T>
void pack_typed(const T* source, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int size,
                int64_t distance, float* panels) {
  // Lanes are written all or none, so they have to fill the panels.
  constexpr int kFew = kTileRows < kWidth ? kTileRows : kWidth;
  if (k_stride == 1 && size % (size < kWidth ? kFew : kWidth) == 0) {
    for (int64_t row = 0; row < rows; row += kWidth) {
      const int count = int(rows - row < kWidth ? rows - row : kWidth);
      float* panel = panels + row / size * distance + row % size;
      if (size < kWidth) {
        pack_rows<kFew>(source + row * row_stride, row_stride, count, k, size, distance, panel);
      } else {
        pack_rows<kWidth>(source + row * row_stride, row_stride, count, k, size, distance, panel);
      }
    }
    // Lanes of the last panel that no row reached.
    const int64_t end = (rows + size - 1) / size * size;
    for (int64_t row = (rows + kWidth - 1) / kWidth * kWidth; row < end; ++row)
      for (int64_t p = 0; p < k; ++p) panels[row / size * distance + row % size + p * size] = 0.0f;
    return;
  }
  // The source is read along its rows, whatever number of panels they go to. Where these lie far apart, no hardware
  // prefetcher looks for the next one.
  for (int64_t p = 0; p < k; ++p) {
    const T* from = source + p * k_stride;
    float* to = panels + p * size;
    for (int64_t row = 0; row < rows; row += size, from += size * row_stride, to += distance) {
      const int count = int(rows - row < size ? rows - row : size);
      int i = 0;
      if (row_stride == 1)
        for (; i + kWidth <= count; i += kWidth) {
          store(to + i, load(from + i));
          __builtin_prefetch(from + kRowsAhead * k_stride + i);
        }
      if (row_stride == 1 && sizeof(T) == sizeof(float))
        for (; i + 4 <= count; i += 4) __builtin_memcpy(to + i, from + i, 4 * sizeof(float));
      for (; i < count; ++i) to[i] = to_float(from[i * row_stride]);
      for (; i < size; ++i) to[i] = 0.0f;
    }
  }
}

void pack(const void* source, Dtype dtype, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int size,
          int64_t distance, float* panels) {
  switch (dtype) {
    case Dtype::kFloat32:
      return pack_typed(static_cast<const float*>(source), row_stride, k_stride, rows, k, size, distance, panels);
    case Dtype::kBFloat16:
      return pack_typed(static_cast<const BFloat16*>(source), row_stride, k_stride, rows, k, size, distance, panels);
    case Dtype::kFloat16:
      return pack_typed(static_cast<const Float16*>(source), row_stride, k_stride, rows, k, size, distance, panels);
  }
}

template <class T>
void round_typed(const float* from, int64_t from_row, const Matrix& to) {
  for (int64_t i = 0; i < to.rows; ++i, from += from_row) {
    T* row = static_cast<T*>(to.data) + i * to.row_stride;
    if (to.col_stride == 1) {
      round_row(from, row, to.cols);
    } else {
      for (int64_t j = 0; j < to.cols; ++j) round_row(from + j, row + j * to.col_stride, 1);
    }
  }
}

void round(const float* from, int64_t from_row, const Matrix& to) {
  switch (to.dtype) {
    case Dtype::kFloat32: return round_typed<float>(from, from_row, to);
    case Dtype::kBFloat16: return round_typed<BFloat16>(from, from_row, to);
    case Dtype::kFloat16: return round_typed<Float16>(from, from_row, to);
  }
}

constexpr Kernels kKernels = {kWidth, kTileRows, kTileCols, multiply, dots, nullptr, pack, round, dequantise};

}  // namespace
}  // namespace nlora::cpu
