// Products of bf16 by pairs. Subnormals count as zero.
#include "cpu/kernels.h"

#include "cpu/avx512.inl"
#include "cpu/vectors.inl"
#include "cpu/dots.inl"
#include "cpu/pack.inl"
#include "cpu/product.inl"

namespace nlora::cpu {
namespace {

typedef uint16_t Halves __attribute__((vector_size(64)));

// Two neighbours in k, the first in the lower half.
struct Pair {
  uint32_t bits;
};

INLINE Vec load(const Pair* p) { return *reinterpret_cast<const LooseVec*>(p); }

template <>
INLINE void multiply_add<Pair>(Vec& sum, const float* left, Vec right) {
  int bits;
  __builtin_memcpy(&bits, left, 4);
  sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)right);
}

INLINE uint32_t bits_of(BFloat16 value) { return value.bits; }
INLINE uint32_t bits_of(float value) {
  BFloat16 rounded;
  from_float(value, &rounded);
  return rounded.bits;
}

// What a lane of a panel holds: the values of two k, rounded to bf16.
struct Pairs {
  static constexpr int kValues = 2;

  static INLINE Vec along(const BFloat16* p) { return (Vec)_mm512_loadu_si512(p); }
  static INLINE Vec along(const float* p) {
    return (Vec)_mm512_cvtne2ps_pbh((__m512)load(p + kWidth), (__m512)load(p));
  }
  static INLINE Vec across(const BFloat16* p, const BFloat16* next) {
    const auto lower = [](const BFloat16* p) {
      return __builtin_convertvector(*reinterpret_cast<const LooseHalf*>(p), Bits);
    };
    return (Vec)(next ? lower(p) | lower(next) << 16 : lower(p));
  }
  static INLINE Vec across(const float* p, const float* next) {
    const Halves both = (Halves)_mm512_cvtne2ps_pbh(next ? (__m512)load(next) : __m512{}, (__m512)load(p));
    return (Vec)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                        25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  template <class T>
  static INLINE void one(const T* p, const T* next, float* to) {
    const uint32_t bits = bits_of(*p) | (next ? bits_of(*next) << 16 : 0);
    __builtin_memcpy(to, &bits, 4);
  }
};

}  // namespace

void avx512_bf16_dots(const Dots& d) { dots_typed<BFloat16, BFloat16>(d); }

void avx512_bf16_multiply(const Product& p) {
  const auto to = [&](auto value) {
    using C = decltype(value);
    p.a_row ? multiply_all<false, false, Pair, C>(p) : multiply_all<true, false, Pair, C>(p);
  };
  switch (p.c_dtype) {
    case Dtype::kFloat32: return to(float());
    case Dtype::kBFloat16: return to(BFloat16());
    case Dtype::kFloat16: return to(Float16());
  }
}

void avx512_bf16_pack(const void* source, Dtype dtype, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                      int size, int64_t distance, float* panels) {
  const auto pack = [&](const auto* from) {
    pack_typed<Pairs>(from, row_stride, k_stride, rows, k, size, distance, panels);
  };
  dtype == Dtype::kFloat32 ? pack(static_cast<const float*>(source)) : pack(static_cast<const BFloat16*>(source));
}

}  // namespace nlora::cpu
