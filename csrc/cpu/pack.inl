// Panels from matrices of any strides. The including file defines kWidth and kTileRows, as for kernels.inl, and what is said
// there holds here.

namespace nlora::cpu {
namespace {

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

// What a lane of a panel holds: a value of one k in fp32.
struct Single {
  static constexpr int kValues = 1;

  // Lanes that follow one another in a row.
  template <class T>
  static INLINE Vec along(const T* p) {
    return load(p);
  }
  // The same lane of rows that lie side by side; `next` are their values of the lane's second k, nullptr past the last one.
  template <class T>
  static INLINE Vec across(const T* p, const T*) {
    return load(p);
  }
  template <class T>
  static INLINE void one(const T* p, const T*, float* to) {
    *to = to_float(*p);
  }
};

// kWidth rows, each with its k side by side, into panels of which LANES lanes are theirs: all of them go to one panel, or,
// where a panel is narrower than a register, to several.
template <class L, int LANES, class T>
void pack_rows(const T* source, int64_t row_stride, int rows, int64_t k, int size, int64_t distance, float* panel) {
  constexpr int kValues = L::kValues;
  int64_t p = 0;
  for (; (p + kWidth) * kValues <= k; p += kWidth) {
    Vec block[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      block[i] = i < rows ? L::along(source + i * row_stride + p * kValues) : Vec{};
      __builtin_prefetch(source + (i + kWidth) * row_stride + p * kValues);
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
  for (; p * kValues < k; ++p)
    for (int i = 0; i < kWidth; ++i) {
      if (i / LANES * LANES >= rows) break;
      float* to = panel + i / LANES * distance + p * size + i % LANES;
      const T* from = source + i * row_stride + p * kValues;
      if (i < rows) {
        L::one(from, (p + 1) * kValues <= k ? from + kValues - 1 : nullptr, to);
      } else {
        *to = 0.0f;
      }
    }
}

// Rows of a source that are fetched ahead.
constexpr int kRowsAhead = 4;

// Panels [lanes of k][size], `distance` lanes apart; see Kernels::pack.
template <class L, class T>
void pack_typed(const T* source, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int size,
                int64_t distance, float* panels) {
  const int64_t lanes = (k + L::kValues - 1) / L::kValues;
  // Lanes are written all or none, so they have to fill the panels.
  constexpr int kFew = kTileRows < kWidth ? kTileRows : kWidth;
  if (k_stride == 1 && size % (size < kWidth ? kFew : kWidth) == 0) {
    for (int64_t row = 0; row < rows; row += kWidth) {
      const int count = int(rows - row < kWidth ? rows - row : kWidth);
      float* panel = panels + row / size * distance + row % size;
      if (size < kWidth) {
        pack_rows<L, kFew>(source + row * row_stride, row_stride, count, k, size, distance, panel);
      } else {
        pack_rows<L, kWidth>(source + row * row_stride, row_stride, count, k, size, distance, panel);
      }
    }
    // Lanes of the last panel that no row reached.
    const int64_t end = (rows + size - 1) / size * size;
    for (int64_t row = (rows + kWidth - 1) / kWidth * kWidth; row < end; ++row)
      for (int64_t p = 0; p < lanes; ++p) panels[row / size * distance + row % size + p * size] = 0.0f;
    return;
  }
  // The source is read along its rows, whatever number of panels they go to. Where these lie far apart, no hardware
  // prefetcher looks for the next one.
  for (int64_t p = 0; p < lanes; ++p) {
    const T* from = source + p * L::kValues * k_stride;
    const T* next = (p + 1) * L::kValues <= k ? from + (L::kValues - 1) * k_stride : nullptr;
    float* to = panels + p * size;
    for (int64_t row = 0; row < rows; row += size, to += distance) {
      const int count = int(rows - row < size ? rows - row : size);
      const auto second = [&](int i) { return next ? next + (row + i) * row_stride : nullptr; };
      const T* first = from + row * row_stride;
      int i = 0;
      if (row_stride == 1)
        for (; i + kWidth <= count; i += kWidth) {
          store(to + i, L::across(first + i, second(i)));
#pragma GCC unroll 2
          for (int j = 0; j < L::kValues; ++j) __builtin_prefetch(first + (kRowsAhead + j) * k_stride + i);
        }
      if (row_stride == 1 && L::kValues == 1 && sizeof(T) == sizeof(float))
        for (; i + 4 <= count; i += 4) __builtin_memcpy(to + i, first + i, 4 * sizeof(float));
      for (; i < count; ++i) L::one(first + i * row_stride, second(i), to + i);
      for (; i < size; ++i) to[i] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace nlora::cpu
