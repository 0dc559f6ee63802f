// The products of a few columns with rows that are read in place. The including file defines kWidth, kDotRows and kDotCols,
// as for kernels.inl, and what is said there holds here.

namespace nlora::cpu {
namespace {

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using Type = Lanes<I...>;
};
using AllLanes = Count<kWidth>::Type;

// Halves two vectors by adding neighbours; the sums of `a` come first.
template <int... I>
INLINE Vec add_neighbours(Vec a, Vec b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// What is multiplied at a time of rows of T and columns of C.
template <class T, class C>
struct Step {
  static constexpr int kSize = kWidth;
  static INLINE Vec read(const T* p) { return load(p); }
  static INLINE Vec read_col(const C* p) { return load(p); }
  static INLINE void add(Vec& sum, Vec left, Vec right) { sum += left * right; }
};

#if defined(__AVX512BF16__)
// Pairs of neighbours: nothing is converted.
template <>
struct Step<BFloat16, BFloat16> {
  static constexpr int kSize = 2 * kWidth;
  static INLINE __m512bh read(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE __m512bh read_col(const BFloat16* p) { return read(p); }
  static INLINE void add(Vec& sum, __m512bh left, __m512bh right) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, left, right);
  }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Step<BFloat16, BFloat16> {
  static constexpr int kSize = 2 * kWidth;
  static INLINE bfloat16x8_t read(const BFloat16* p) { return (bfloat16x8_t)vld1q_u16(&p->bits); }
  static INLINE bfloat16x8_t read_col(const BFloat16* p) { return read(p); }
  static INLINE void add(Vec& sum, bfloat16x8_t left, bfloat16x8_t right) {
    sum = (Vec)vbfdotq_f32((float32x4_t)sum, left, right);
  }
};
#endif

// So many bytes ahead of what is read rows are fetched, where a few columns are all that they meet: multiplying leaves the
// CPU less room to run ahead by itself, and its prefetchers do not keep up with several rows at a time.
constexpr int64_t kDotsAhead = 2048;

template <int ROWS, int COLS, class T, class C>
INLINE void dot_tile(const Dots& d, int64_t row, int64_t col) {
  using S = Step<T, C>;
  using Operand = decltype(S::read(nullptr));
  Vec sum[ROWS][COLS] = {};
  const T* rows = static_cast<const T*>(d.rows) + row * d.row;
  const C* cols = static_cast<const C*>(d.cols) + col * d.col;
  const bool fetch = COLS > 1 && d.n <= kDotCols;
  int64_t k = 0;
  for (; k + S::kSize <= d.k; k += S::kSize) {
    if (fetch) {
      constexpr int64_t kAhead = kDotsAhead / sizeof(T);
      // Past their end, the rows of the next tile.
      const T* ahead = rows + k + kAhead + (k + kAhead < d.k ? 0 : ROWS * d.row - d.k);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) __builtin_prefetch(ahead + i * d.row);
    }
    Operand left[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) left[i] = S::read(rows + i * d.row + k);
#pragma GCC unroll 16
    for (int j = 0; j < COLS; ++j) {
      const Operand right = S::read_col(cols + j * d.col + k);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) S::add(sum[i][j], left[i], right);
    }
  }
  if (k < d.k) {
    // What is left of a row, padded with zeros: nothing past the row is read.
    T tail[ROWS][S::kSize] = {};
    for (int i = 0; i < ROWS; ++i)
      for (int64_t l = k; l < d.k; ++l) tail[i][l - k] = rows[i * d.row + l];
#pragma GCC unroll 16
    for (int j = 0; j < COLS; ++j) {
      const Operand right = S::read_col(cols + j * d.col + k);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) S::add(sum[i][j], S::read(tail[i]), right);
    }
  }
  if (d.extra_rows) {
    const float* extra_rows = d.extra_rows + row * d.extra;
    const float* extra_cols = d.extra_cols + col * d.extra;
    for (k = 0; k < d.extra; k += kWidth) {
#pragma GCC unroll 16
      for (int j = 0; j < COLS; ++j) {
        const Vec right = load(extra_cols + j * d.extra + k);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i][j] += load(extra_rows + i * d.extra + k) * right;
      }
    }
  }
  // COLS sums of kWidth lanes become one vector of COLS groups of lanes, and GROUP such vectors again one.
  constexpr int kLanes = kWidth / COLS, GROUP = kLanes < 4 ? kLanes : 4;
  Vec groups[(ROWS + GROUP - 1) / GROUP * GROUP] = {};
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int step = COLS / 2; step > 0; step /= 2)
#pragma GCC unroll 16
      for (int j = 0; j < step; ++j) sum[i][j] = add_neighbours(sum[i][2 * j], sum[i][2 * j + 1], AllLanes{});
    groups[i] = sum[i][0];
  }
#pragma GCC unroll 16
  for (int first = 0; first < ROWS; first += GROUP) {
#pragma GCC unroll 16
    for (int step = GROUP / 2; step > 0; step /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < step; ++i)
        groups[first + i] = add_neighbours(groups[first + 2 * i], groups[first + 2 * i + 1], AllLanes{});
    alignas(64) float lanes[kWidth];
    store(lanes, groups[first]);
    for (int i = first; i < first + GROUP && i < ROWS; ++i) {
      const float start = d.start ? d.start[row + i] : 0.0f;
      for (int j = 0; j < COLS; ++j) {
        float total = start;
        const float* from = lanes + ((i - first) * COLS + j) * (kLanes / GROUP);
        for (int l = 0; l < kLanes / GROUP; ++l) total += from[l];
        d.out[(row + i) * d.out_row + (col + j) * d.out_col] = total;
      }
    }
  }
}

template <int ROWS, class T, class C>
INLINE void dot_rows(const Dots& d, int64_t row) {
  int64_t col = 0;
  for (; col + kDotCols <= d.n; col += kDotCols) dot_tile<ROWS, kDotCols, T, C>(d, row, col);
  if (kDotCols > 4 && col + 4 <= d.n) dot_tile<ROWS, 4, T, C>(d, row, col), col += 4;
  if (col + 2 <= d.n) dot_tile<ROWS, 2, T, C>(d, row, col), col += 2;
  if (col < d.n) dot_tile<ROWS, 1, T, C>(d, row, col);
}

template <class T, class C>
void dots_typed(const Dots& d) {
  int64_t row = 0;
  for (; row + kDotRows <= d.m; row += kDotRows) dot_rows<kDotRows, T, C>(d, row);
  for (; row + 2 <= d.m; row += 2) dot_rows<2, T, C>(d, row);
  for (; row < d.m; ++row) dot_rows<1, T, C>(d, row);
}

}  // namespace
}  // namespace nlora::cpu
