// Registers of values and their conversions. The including file defines kWidth, as for kernels.inl, and what is said there
// holds here.

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nlora::cpu {
namespace {

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));
typedef uint16_t LooseHalf __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#define INLINE inline __attribute__((always_inline))

// Conversions

INLINE float to_float(float value) { return value; }

INLINE float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

INLINE float to_float(Float16 value) {
  // Scaling by 2^112 moves the exponent from fp16's bias to fp32's, subnormals included.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  float result;
  __builtin_memcpy(&result, &magnitude, 4);
  result *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &result, 4);
  if (magnitude >= 0x7c00u << 13) bits = magnitude | 0x7f800000;
  bits |= uint32_t(value.bits & 0x8000) << 16;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

INLINE void from_float(float value, float* out) { *out = value; }

INLINE void from_float(float value, BFloat16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  out->bits = uint16_t((value != value ? bits | 0x400000 : rounded) >> 16);
}

INLINE void from_float(float value, Float16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // a subnormal: adding 0.5 leaves it, rounded, in the last bits
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&half, &magnitude, 4);
    half -= 0x3f000000;
  } else {
    half = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  }
  out->bits = uint16_t(half | sign);
}

INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
INLINE Vec load(const BFloat16* p) {
  const Half half = *reinterpret_cast<const LooseHalf*>(p);
  return (Vec)(__builtin_convertvector(half, Bits) << 16);
}

INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  // NOTE: the unmasked form draws a false warning from GCC 12.
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)*reinterpret_cast<const LooseHalf*>(p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)*reinterpret_cast<const LooseHalf*>(p));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16((float16x4_t)vld1_u16(&p->bits));
#else
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = to_float(p[i]);
  return result;
#endif
}

INLINE void store(float* p, Vec value) { *reinterpret_cast<LooseVec*>(p) = value; }
INLINE Vec broadcast(float value) { return Vec{} + value; }

// A register of values in the dtype of a result.
INLINE void round_vector(const float* from, float* to) { store(to, load(from)); }

INLINE void round_vector(const float* from, BFloat16* to) {
  const Vec value = load(from);
  const Bits bits = (Bits)value, rounded = bits + 0x7fff + (bits >> 16 & 1), not_a_number = (Bits)(value != value);
  const Bits result = (not_a_number & (bits | 0x400000)) | (~not_a_number & rounded);
  *reinterpret_cast<LooseHalf*>(to) = __builtin_convertvector(result >> 16, Half);
}

INLINE void round_vector(const float* from, Float16* to) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)load(from), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph((__m256)load(from), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof half);
#elif defined(__aarch64__)
  vst1_u16(&to->bits, (uint16x4_t)vcvt_f16_f32((float32x4_t)load(from)));
#else
  for (int i = 0; i < kWidth; ++i) from_float(from[i], to + i);
#endif
}

// A row of a result.
template <class T>
INLINE void round_row(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) round_vector(from + i, to + i);
  for (; i < n; ++i) from_float(from[i], to + i);
}

}  // namespace
}  // namespace nlora::cpu
