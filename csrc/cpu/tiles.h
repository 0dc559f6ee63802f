// Products of fp32 on a matrix unit that multiplies bf16 (AMX).
//
// The 24 bits of an fp32 value are exactly those of three bf16 values, its planes: v = v0 + v1 + v2 with |v1| ≤ 2^-8·|v|
// and |v2| ≤ 2^-16·|v|. A product takes the six pairs vi·wj with i + j ≤ 2, summed in fp32; the three left out are below
// 2^-23·|v·w| together, in the mean far less than what the roundings of the sum lose anyway. fp16 has two planes, bf16 one.
// Where an fp32 value may have two planes, a product takes the three pairs with i + j ≤ 1, and with one it is that of bf16.
//
// NOTE: the unit takes subnormals for zero and does not tell infinity from its planes' NaN, so `tile_gemm` asks for the
// largest magnitudes and leaves a product whose range does not fit to the other kernels.
#pragma once

#include <cstdint>

namespace nlora::cpu {

// Rows of left, columns of right and steps of k that come together. Sides are packed in panels of kTilePanel rows or columns,
// which hold kTilePanel·planes·kTileStep values for each step: per plane two halves as the unit loads them.
constexpr int kTilePanel = 32, kTileStep = 32;

constexpr int64_t panel_values(int planes) { return kTilePanel * kTileStep * planes; }

// Steps of k between operands of these planes, of which the pairs i + j ≤ order are multiplied.
struct TileRun {
  int64_t steps;
  int left_planes, right_planes, order;
};

// c (m, n) = init + left·right for one panel each; m, n ≤ kTilePanel.
struct TileProduct {
  const uint16_t *left, *right;
  const TileRun* runs;
  int runs_count;
  const float* init;  // nullptr for zero
  int64_t init_row;  // 0 to start every row from the same values
  float* c;
  int64_t c_row;
  int m, n;
};

struct Tiles {
  // Around a thread's products; `saved` takes the unit's configuration, 64 bytes.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
  // Packs up to kTilePanel rows of k values each, side by side, as a panel of left; rows and steps are filled with zeros.
  // Returns the bits of the largest magnitude. The last of fewer planes than the values have is rounded too.
  uint32_t (*split_left)(const float* from, int64_t from_row, int64_t rows, int64_t k, int planes, uint16_t* panel);
  // Packs k rows of up to kTilePanel columns, side by side, as a panel of right.
  uint32_t (*split_right)(const float* from, int64_t from_row, int64_t k, int64_t cols, int planes, uint16_t* panel);
  void (*multiply)(const TileProduct& product);
};

const Tiles& amx_tiles();

}  // namespace nlora::cpu
