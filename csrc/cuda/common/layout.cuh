// Formulas of the Hopper data layouts: shared by kernels and tests, plain arithmetic on every compiler.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NLORA_FN __host__ __device__ __forceinline__
#else
#define NLORA_FN
#endif

namespace nlora::cuda {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// Which dimension of an operand tile is contiguous in shared memory.
enum class Major { K = 0, MN = 1 };

// Values are those of the wgmma descriptor; tensor maps number the same modes differently.
enum class Swizzle : uint32_t { None = 0, B128 = 1, B64 = 2, B32 = 3 };

constexpr uint32_t kSharedAlignment = 1024;

// Bytes of one swizzled row: also the widest inner box a tensor map may have in that mode.
NLORA_FN constexpr uint32_t swizzle_span(Swizzle mode) {
  return mode == Swizzle::B128 ? 128 : mode == Swizzle::B64 ? 64 : mode == Swizzle::B32 ? 32 : 16;
}

// Where the hardware puts the byte that has linear shared address `address`: the 16-byte chunk index is
// xor-ed with the row index, taken from the address itself, so buffers must be aligned to 8 rows.
NLORA_FN constexpr uint32_t swizzled(uint32_t address, Swizzle mode) {
  return address ^ ((address >> 3) & (swizzle_span(mode) - 16));
}

// wgmma descriptor of an operand that starts at shared address `start`.
//   K-major, swizzled   stride = bytes between groups of 8 rows; leading is unused
//   MN-major, swizzled  stride = bytes between groups of 8 k; leading = bytes between swizzle_span-wide column blocks
NLORA_FN constexpr uint64_t matrix_descriptor(uint32_t start, uint32_t leading, uint32_t stride, Swizzle mode) {
  auto encoded = [](uint32_t bytes) { return uint64_t((bytes & 0x3FFFF) >> 4); };
  return encoded(start) | encoded(leading) << 16 | encoded(stride) << 32 | uint64_t(mode) << 62;
}

// Descriptor of the same operand, `bytes` further on: how a K loop steps through one stage.
NLORA_FN constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + ((bytes & 0x3FFFF) >> 4);
}

// K-major tile of 64 elements (128 bytes) a row, as one TMA box with 128-byte swizzle leaves it.
NLORA_FN constexpr uint64_t k_major_descriptor(uint32_t start) {
  return matrix_descriptor(start, 16, 1024, Swizzle::B128);
}

// MN-major tile: boxes of 64 elements along MN by k_rows along K, 128-byte swizzle, stored one after another.
NLORA_FN constexpr uint64_t mn_major_descriptor(uint32_t start, uint32_t k_rows) {
  return matrix_descriptor(start, k_rows * 128, 1024, Swizzle::B128);
}

// How far apart two steps of 16 along K begin in either of these tiles.
NLORA_FN constexpr uint32_t step_bytes(Major major) { return major == Major::K ? 16 * 2 : 16 * 128; }

// Accumulator of m64nN: element i of lane `lane` in warp `warp` (0 to 3 of the warpgroup).
NLORA_FN constexpr uint32_t accumulator_row(uint32_t warp, uint32_t lane, uint32_t i) {
  return 16 * warp + lane / 4 + 8 * ((i >> 1) & 1);
}

NLORA_FN constexpr uint32_t accumulator_column(uint32_t lane, uint32_t i) {
  return 8 * (i >> 2) + 2 * (lane % 4) + (i & 1);
}

// stmatrix.x4 of accumulator columns [8·block, 8·block + 16): the row this lane addresses in its warp's 16 rows,
// and the 16-byte chunk of that row; its registers are d[4·block .. 4·block + 7] packed in pairs.
NLORA_FN constexpr uint32_t stmatrix_row(uint32_t lane) { return lane & 15; }

NLORA_FN constexpr uint32_t stmatrix_chunk(uint32_t lane, uint32_t block) { return block + (lane >> 4); }

NLORA_FN constexpr uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

}  // namespace nlora::cuda
