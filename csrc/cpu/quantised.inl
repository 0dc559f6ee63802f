// Weights in few bits, decoded to the dtype that is multiplied. What vectors.inl says of its including file holds here.
//
// Within a block the scaled values of all sixteen codes fit a register or two, so that a code costs a permutation and no
// multiplication, and a result of half precision is rounded sixteen times a block.

namespace nlora::cpu {
namespace {

constexpr int kSixteen = 16;
typedef uint8_t Sixteen __attribute__((vector_size(16)));

// value as it is now: kept from being contracted with what is added to it.
INLINE float rounded(float value) {
  asm volatile("" : "+m"(value));
  return value;
}

template <class S>
INLINE float scale_of(const Quantised& w, int64_t at) {
  if (!w.nested_values) return to_float(static_cast<const S*>(w.scales)[at]);
  const uint8_t code = static_cast<const uint8_t*>(w.scales)[at];
  return rounded(w.nested_values[code] * w.nested_scales[at / w.nested_block]) + *w.offset;
}

template <class T>
INLINE void round_sixteen(const float* from, T* to) {
#pragma GCC unroll 16
  for (int i = 0; i < kSixteen; i += kWidth) round_vector(from + i, to + i);
}

// Sixteen codes from a row-major pair of nibbles on: of eight bytes.
INLINE Sixteen unpacked(const uint8_t* bytes) {
  uint64_t eight;
  __builtin_memcpy(&eight, bytes, 8);
  // NOTE: half a register filled by way of memory would wait for the store.
  typedef uint64_t Two __attribute__((vector_size(16)));
  const Sixteen pairs = (Sixteen)Two{eight, 0};
  const Sixteen high = pairs >> 4, low = pairs & 15;
  return __builtin_shufflevector(high, low, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

// Sixteen codes of one row of the interleaved layout, from an even column on.
INLINE Sixteen unpacked_interleaved(const uint8_t* bytes, bool high) {
  const auto pair = [&](int i) {
    uint16_t two;
    __builtin_memcpy(&two, bytes + 32 * i, 2);
    return two;
  };
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  const Sixteen codes = (Sixteen)Pairs{pair(0), pair(1), pair(2), pair(3), pair(4), pair(5), pair(6), pair(7)};
  return high ? codes >> 4 : codes & 15;
}

// to[i] = table[codes[i]]
INLINE void look_up(Sixteen codes, const float* table, float* to) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)codes);
  _mm512_storeu_ps(to, _mm512_maskz_permutexvar_ps(0xffff, at, _mm512_loadu_ps(table)));
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  for (int half = 0; half < 2; ++half) {
    const __m128i bytes = half ? _mm_unpackhi_epi64((__m128i)codes, (__m128i)codes) : (__m128i)codes;
    const __m256i at = _mm256_cvtepu8_epi32(bytes);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
    _mm256_storeu_ps(to + 8 * half,
                     _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper));
  }
#else
  for (int i = 0; i < kSixteen; ++i) to[i] = table[codes[i]];
#endif
}

template <class T>
INLINE void look_up(Sixteen codes, const T* table, T* to) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i at = _mm256_cvtepu8_epi16((__m128i)codes);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_permutexvar_epi16(at, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table))));
#elif defined(__AVX2__)
  // The lower and the upper bytes of the sixteen values.
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table)),
                last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
  const __m128i lower =
      _mm_packus_epi16(_mm_and_si128(first, _mm_set1_epi16(255)), _mm_and_si128(last, _mm_set1_epi16(255)));
  const __m128i upper = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8));
  const __m128i low = _mm_shuffle_epi8(lower, (__m128i)codes), high = _mm_shuffle_epi8(upper, (__m128i)codes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm_unpackhi_epi8(low, high));
#else
  for (int i = 0; i < kSixteen; ++i) to[i] = table[codes[i]];
#endif
}

// n values of one block and row, from column col on, whose place in the sequence of all codes is `at`.
template <class T>
void dequantise_run(const Quantised& w, int64_t row, int64_t col, int64_t at, int64_t n, float scale, T* to) {
  int64_t i = 0;
  if (w.layout == Codes::kInt8 || w.layout == Codes::kBytes) {
    const uint8_t* codes = w.codes + at;
    const auto value = [&](int64_t j) {
      return (w.layout == Codes::kInt8 ? float(int8_t(codes[j])) : w.values[codes[j]]) * scale;
    };
    for (; i + kSixteen <= n; i += kSixteen) {
      float part[kSixteen];
      if (w.layout == Codes::kInt8) {
        for (int j = 0; j < kSixteen; ++j) part[j] = float(int8_t(codes[i + j])) * scale;
      } else {
        for (int j = 0; j < kSixteen; ++j) part[j] = w.values[codes[i + j]] * scale;
      }
      round_sixteen(part, to + i);
    }
    for (; i < n; ++i) from_float(value(i), to + i);
    return;
  }
  float scaled[kSixteen];
  for (int code = 0; code < kSixteen; ++code) scaled[code] = w.values[code] * scale;
  T table[kSixteen];
  round_sixteen(scaled, table);
  if (w.layout == Codes::kNibbles) {
    const auto one = [&](int64_t j) {
      to[j] = table[(at + j) % 2 ? w.codes[(at + j) / 2] & 15 : w.codes[(at + j) / 2] >> 4];
    };
    if (at % 2) one(i++);
    for (; i + kSixteen <= n; i += kSixteen) look_up(unpacked(w.codes + (at + i) / 2), table, to + i);
    for (; i < n; ++i) one(i);
    return;
  }
  const bool high = row % 32 >= 16;
  const uint8_t* codes = w.codes + row / 32 * (w.cols / 2) * 32 + row % 16 * 2;
  const auto one = [&](int64_t j) {
    const uint8_t byte = codes[(col + j) / 2 * 32 + (col + j) % 2];
    to[j] = table[high ? byte >> 4 : byte & 15];
  };
  if (col % 2) one(i++);
  for (; i + kSixteen <= n; i += kSixteen)
    look_up(unpacked_interleaved(codes + (col + i) / 2 * 32, high), table, to + i);
  for (; i < n; ++i) one(i);
}

template <class S, class T>
void dequantise_typed(const Quantised& w, int64_t row, int64_t col, const Matrix& to) {
  for (int64_t i = 0; i < to.rows; ++i) {
    T* out = static_cast<T*>(to.data) + i * to.row_stride;
    const int64_t first = (row + i) * w.cols + col;
    for (int64_t j = 0, n; j < to.cols; j += n) {
      // The place in what is cut into blocks.
      const int64_t place = w.row_stride ? col + j : first + j;
      const int64_t block = place / w.block, left = (block + 1) * w.block - place;
      n = left < to.cols - j ? left : to.cols - j;
      const float scale = scale_of<S>(w, w.row_stride ? (row + i) * w.row_stride + block * w.block_stride : block);
      dequantise_run(w, row + i, col + j, first + j, n, scale, out + j);
    }
  }
}

template <class S>
void dequantise_scaled(const Quantised& w, int64_t row, int64_t col, const Matrix& to) {
  switch (to.dtype) {
    case Dtype::kFloat32: return dequantise_typed<S, float>(w, row, col, to);
    case Dtype::kBFloat16: return dequantise_typed<S, BFloat16>(w, row, col, to);
    case Dtype::kFloat16: return dequantise_typed<S, Float16>(w, row, col, to);
  }
}

void dequantise(const Quantised& w, int64_t row, int64_t col, const Matrix& to) {
  switch (w.scale_dtype) {
    case Dtype::kFloat32: return dequantise_scaled<float>(w, row, col, to);
    case Dtype::kBFloat16: return dequantise_scaled<BFloat16>(w, row, col, to);
    case Dtype::kFloat16: return dequantise_scaled<Float16>(w, row, col, to);
  }
}

}  // namespace
}  // namespace nlora::cpu
