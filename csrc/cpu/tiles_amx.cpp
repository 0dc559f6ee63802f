#include <immintrin.h>

#include "cpu/tiles.h"

#define INLINE inline __attribute__((always_inline))

namespace nlora::cpu {
namespace {

typedef float Vec __attribute__((vector_size(64), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), may_alias));
typedef uint16_t Halves __attribute__((vector_size(64)));

// Rows of a tile register, and its fp32 columns or pairs of bf16.
constexpr int kTile = 16;
constexpr int64_t kTileValues = kTile * 2 * kTile, kPlaneValues = 2 * kTileValues;

// Registers 0 to 3 hold the sums, row half · 2 + column half; 4 and 5 the halves of left, 6 and 7 those of right.
#if !defined(__SANITIZE_ADDRESS__)

// NOTE: the intrinsics take the number of a register as a token, which a template cannot give.
struct Unit {
  template <int T>
  static INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static INLINE void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(T) : "memory");
  }
  template <int T>
  static INLINE void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int SUM, int LEFT, int RIGHT>
  static INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
  }
  static INLINE void configure(const void* from) { asm volatile("ldtilecfg (%0)" ::"r"(from) : "memory"); }
  static INLINE void save(void* to) { asm volatile("sttilecfg (%0)" ::"r"(to) : "memory"); }
};

#else

// The same without the unit: what is read and written is seen by the sanitizers, on any CPU with AVX-512.
struct Unit {
  static thread_local Bits tiles[8][kTile];

  template <int T>
  static void zero() {
    __builtin_memset(tiles[T], 0, sizeof tiles[T]);
  }
  template <int T>
  static void load(const void* from) {
    for (int i = 0; i < kTile; ++i) tiles[T][i] = static_cast<const Bits*>(from)[i];
  }
  template <int T>
  static void store(void* to, int64_t row_bytes) {
    for (int i = 0; i < kTile; ++i) *reinterpret_cast<Bits*>(static_cast<char*>(to) + i * row_bytes) = tiles[T][i];
  }
  template <int SUM, int LEFT, int RIGHT>
  static void multiply() {
    for (int i = 0; i < kTile; ++i) {
      Vec sum = (Vec)tiles[SUM][i];
      for (int k = 0; k < kTile; ++k) {
        const Bits left = Bits{} + tiles[LEFT][i][k], right = tiles[RIGHT][k];
        sum += (Vec)(left << 16) * (Vec)(right << 16);
        sum += (Vec)(left & 0xffff0000) * (Vec)(right & 0xffff0000);
      }
      tiles[SUM][i] = (Bits)sum;
    }
  }
  static void configure(const void*) {}
  static void save(void*) {}
};

thread_local Bits Unit::tiles[8][kTile];

#endif

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void begin(void* saved) {
  static constexpr Configuration all;
  Unit::save(saved);
  Unit::configure(&all);
}

// NOTE: a configuration found is put back, for others keep theirs from call to call.
void end(const void* saved) { Unit::configure(saved); }

INLINE void store(uint16_t* to, Bits value) { *reinterpret_cast<Bits*>(to) = value; }

// The planes of 16 values, each in the upper halves of its lanes.
// NOTE: rounding is to nearest with ties away from zero, which leaves as few bits for the rest as ties to even.
template <int PLANES>
INLINE void split(Bits value, Bits (&plane)[PLANES]) {
#pragma GCC unroll 3
  for (int i = 0; i < PLANES; ++i) {
    // Of a third plane nothing is left to round.
    plane[i] = i == 2 ? value : (value + 0x8000) & 0xffff0000;
    if (i + 1 < PLANES) value = (Bits)((Vec)value - (Vec)plane[i]);
  }
}

// Keeps the largest magnitudes of 16 values.
INLINE Bits largest(Bits so_far, Bits value) {
  const Bits magnitude = value & 0x7fffffff;
  return magnitude > so_far ? magnitude : so_far;
}

INLINE uint32_t largest(Bits values) {
  uint32_t result = 0;
  for (int i = 0; i < kTile; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// Up to 16 of the values from `first` to `end`, then zeros.
INLINE Bits some(const float* from, int64_t first, int64_t end) {
  const int64_t count = end - first;
  return (Bits)_mm512_maskz_loadu_ps(__mmask16(count >= kTile ? 0xffff
                                               : count <= 0   ? 0
                                                              : (1 << count) - 1),
                                     from + first);
}

template <int PLANES>
uint32_t split_left(const float* from, int64_t from_row, int64_t rows, int64_t k, uint16_t* panel) {
  Bits most = {};
  for (int64_t first = 0; first < k; first += kTileStep, panel += PLANES * kPlaneValues) {
    for (int64_t row = 0; row < kTilePanel; ++row) {
      Bits low[PLANES] = {}, high[PLANES] = {};
      if (row < rows) {
        const Bits values[2] = {some(from + row * from_row, first, k), some(from + row * from_row, first + kTile, k)};
        most = largest(largest(most, values[0]), values[1]);
        split(values[0], low);
        split(values[1], high);
      }
#pragma GCC unroll 3
      for (int i = 0; i < PLANES; ++i) {
        const Halves both =
            __builtin_shufflevector((Halves)low[i], (Halves)high[i], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27,
                                    29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
        store(panel + i * kPlaneValues + row * kTileStep, (Bits)both);
      }
    }
  }
  return largest(most);
}

template <int PLANES>
uint32_t split_right(const float* from, int64_t from_row, int64_t k, int64_t cols, uint16_t* panel) {
  Bits most = {};
  for (int64_t first = 0; first < k; first += kTileStep, panel += PLANES * kPlaneValues) {
    for (int64_t pair = 0; pair < kTile; ++pair) {
      for (int64_t half = 0; half < 2; ++half) {
        Bits part[2][PLANES] = {};
        for (int i = 0; i < 2; ++i) {
          const int64_t row = first + 2 * pair + i;
          if (row >= k) break;
          const Bits values = some(from + row * from_row, half * kTile, cols);
          most = largest(most, values);
          split(values, part[i]);
        }
        // A lane holds a column of both rows of k.
#pragma GCC unroll 3
        for (int i = 0; i < PLANES; ++i)
          store(panel + i * kPlaneValues + half * kTileValues + pair * kTileStep,
                part[0][i] >> 16 | (part[1][i] & 0xffff0000));
      }
    }
  }
  return largest(most);
}

uint32_t split_left_all(const float* from, int64_t from_row, int64_t rows, int64_t k, int planes, uint16_t* panel) {
  return (planes == 1 ? split_left<1> : planes == 2 ? split_left<2> : split_left<3>)(from, from_row, rows, k, panel);
}

uint32_t split_right_all(const float* from, int64_t from_row, int64_t k, int64_t cols, int planes, uint16_t* panel) {
  return (planes == 1 ? split_right<1> : planes == 2 ? split_right<2> : split_right<3>)(from, from_row, k, cols, panel);
}

// One or both halves of a panel's plane.
template <int T, int HALVES>
INLINE void load(const uint16_t* plane) {
  Unit::load<T>(plane);
  if (HALVES == 2) Unit::load<T + 1>(plane + kTileValues);
}

template <int ROWS, int COLS>
INLINE void multiply_planes() {
  Unit::multiply<0, 4, 6>();
  if (COLS == 2) Unit::multiply<1, 4, 7>();
  if (ROWS == 2) Unit::multiply<2, 5, 6>();
  if (ROWS == 2 && COLS == 2) Unit::multiply<3, 5, 7>();
}

// The pairs of planes, of which neighbours share one, the largest last.
constexpr int kPairs[6][2] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

template <int ROWS, int COLS>
INLINE void multiply_run(const TileRun& run, const uint16_t*& left, const uint16_t*& right) {
  for (int64_t step = 0; step < run.steps; ++step) {
    int held_left = -1, held_right = -1;
#pragma GCC unroll 6
    for (const auto& [i, j] : kPairs) {
      if (i >= run.left_planes || j >= run.right_planes || i + j > run.order) continue;
      if (i != held_left) load<4, ROWS>(left + i * kPlaneValues);
      if (j != held_right) load<6, COLS>(right + j * kPlaneValues);
      multiply_planes<ROWS, COLS>();
      held_left = i, held_right = j;
    }
    left += run.left_planes * kPlaneValues, right += run.right_planes * kPlaneValues;
  }
}

// to (rows, n) = init + from
INLINE void add(const float* from, const float* init, int64_t init_row, float* to, int64_t to_row, int rows, int n) {
  for (int half = 0; half < n; half += kTile) {
    const __mmask16 mask = n - half >= kTile ? 0xffff : __mmask16((1 << (n - half)) - 1);
    for (int i = 0; i < rows; ++i) {
      const Vec sum = *reinterpret_cast<const Vec*>(from + i * kTilePanel + half);
      const Vec start = init ? (Vec)_mm512_maskz_loadu_ps(mask, init + i * init_row + half) : Vec{};
      _mm512_mask_storeu_ps(to + i * to_row + half, mask, (__m512)(start + sum));
    }
  }
}

template <int ROWS, int COLS>
void multiply(const TileProduct& p) {
  // What is written may lie in memory: it comes while the unit multiplies.
  for (int i = 0; i < p.m; ++i)
    for (int j = 0; j < p.n; j += kTile) __builtin_prefetch(p.c + i * p.c_row + j, 1);
  Unit::zero<0>();
  if (COLS == 2) Unit::zero<1>();
  if (ROWS == 2) Unit::zero<2>();
  if (ROWS == 2 && COLS == 2) Unit::zero<3>();
  const uint16_t *left = p.left, *right = p.right;
  for (int i = 0; i < p.runs_count; ++i) multiply_run<ROWS, COLS>(p.runs[i], left, right);
  alignas(64) float sums[kTilePanel * kTilePanel];
  constexpr int64_t kRow = kTilePanel * sizeof(float);
  Unit::store<0>(sums, kRow);
  if (COLS == 2) Unit::store<1>(sums + kTile, kRow);
  if (ROWS == 2) Unit::store<2>(sums + kTile * kTilePanel, kRow);
  if (ROWS == 2 && COLS == 2) Unit::store<3>(sums + kTile * kTilePanel + kTile, kRow);
  add(sums, p.init, p.init_row, p.c, p.c_row, p.m, p.n);
}

void multiply_all(const TileProduct& p) {
  if (p.m <= kTile) return p.n <= kTile ? multiply<1, 1>(p) : multiply<1, 2>(p);
  p.n <= kTile ? multiply<2, 1>(p) : multiply<2, 2>(p);
}

constexpr Tiles kTiles = {begin, end, split_left_all, split_right_all, multiply_all};

}  // namespace

const Tiles& amx_tiles() { return kTiles; }

}  // namespace nlora::cpu
