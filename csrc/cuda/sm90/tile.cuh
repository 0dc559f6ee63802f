// Operands of a GEMM, shapes and places of its tiles: what the kernel, its launcher and its tests agree on.
#pragma once

#include "../common/layer.cuh"
#include "../common/schedule.h"

namespace nlora::cuda::sm90 {

// One block computes BLOCK_M × BLOCK_N of c, a cluster computes kCluster such tiles one below the other and
// shares the tile of b by multicast. Results leave through Boxes boxes of 64 × 64 a consumer: all of its rows at once,
// or, with fewer boxes, half of these are filled while the other half is stored, which leaves room for another stage.
template <int BLOCK_M, int BLOCK_N, int Stages, int Cluster = 1, int Boxes = BLOCK_N / 64>
struct GemmTile {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kBlockK = 64;
  static constexpr int kSteps = kBlockK / 16;   // of a wgmma each
  static constexpr int kStages = Stages;
  static constexpr int kCluster = Cluster;
  static constexpr uint32_t kClusterM = BLOCK_M * Cluster;

  // One warpgroup feeds, each of the others multiplies 64 rows.
  static constexpr int kConsumers = BLOCK_M / 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kRegisters = 168, kProducerRegisters = 40, kConsumerRegisters = 232;

  static constexpr uint32_t kBytesA = BLOCK_M * kBlockK * 2;
  static constexpr uint32_t kBytesB = BLOCK_N * kBlockK * 2;
  static constexpr uint32_t kBytesStage = kBytesA + kBytesB;
  static constexpr uint32_t kBytesBox = 64 * 64 * 2;
  static constexpr int kBoxes = Boxes;
  static constexpr int kBoxesAtOnce = Boxes == BLOCK_N / 64 ? Boxes : Boxes / 2;

  static constexpr uint32_t kStagesAt = 1024;
  static constexpr uint32_t kStagingAt = kStagesAt + Stages * kBytesStage;
  static constexpr uint32_t kSharedBytes = kStagingAt + kConsumers * kBoxes * kBytesBox;

  static_assert(BLOCK_M == 128, "register counts are those of two consumer warpgroups");
  static_assert(BLOCK_N == 64 || BLOCK_N == 128 || BLOCK_N == 256, "one wgmma wide, and narrower ones by halves");
  static_assert(BLOCK_N / 64 % kBoxesAtOnce == 0, "whole rounds of boxes");
  static_assert(kClusterM <= State::kMaxRows, "more rows than the flags are laid out for");
  static_assert(kSharedBytes + kSharedAlignment <= 227 * 1024, "more shared memory than a block can have");
};

// Addresses in the shared memory of one block. Every control word has 16 bytes of its own.
template <class Tile>
struct GemmShared {
  uint32_t base;

  __device__ uint32_t full(uint32_t stage) const { return base + 16 * stage; }
  __device__ uint32_t empty(uint32_t stage) const { return base + 16 * (Tile::kStages + stage); }
  __device__ uint32_t ticket_full() const { return base + 16 * (2 * Tile::kStages); }
  __device__ uint32_t ticket_empty() const { return base + 16 * (2 * Tile::kStages + 1); }
  __device__ uint32_t ticket() const { return base + 16 * (2 * Tile::kStages + 2); }
  __device__ uint32_t epoch() const { return ticket() + 4; }
  __device__ uint32_t a(uint32_t stage) const { return base + Tile::kStagesAt + stage * Tile::kBytesStage; }
  __device__ uint32_t b(uint32_t stage) const { return a(stage) + Tile::kBytesA; }
  __device__ uint32_t staging(uint32_t consumer, uint32_t box) const {
    return base + Tile::kStagingAt + (consumer * Tile::kBoxes + box) * Tile::kBytesBox;
  }
};

// Position in a ring of slots; the parity flips with every lap.
template <int Slots>
struct RingPosition {
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    slot = slot + 1 == Slots ? 0 : slot + 1;
    parity ^= slot == 0;
  }
};

// Boxes of right operands of a tile `width` wide: width / cluster × 64 for Major::K, 64 / cluster × 64 for Major::MN.
template <class T>
struct GemmProblem {
  TensorMap a;        // (m, k), boxes of BLOCK_M × 64
  TensorMap b;        // width BLOCK_N
  TensorMap c;        // (m, n), boxes of 64 × 64
  TensorMap p;        // (m, r), boxes of BLOCK_M × 64
  TensorMap wide;     // width BLOCK_N
  TensorMap shrink;   // width p_width
  TensorMap p_out;    // (m, w), boxes of 64 × 64
  TensorMap beyond;   // p[:, r:], boxes of 64 × 64
  TensorMap t;        // (m, v), as right operands for Major::MN
  const T* bias;      // (n) or null
  State state;
  uint32_t m, n, k;   // k and n multiples of 8
  uint32_t r;         // 0: no adapter
  uint32_t w;         // 0: p is not made here
  uint32_t p_width;   // of the tiles that make p: 64, 128 or 256, at most BLOCK_N
  uint32_t p_tall;    // how many of them an item makes
  float* slices;      // (splits·g, v)
  uint32_t splits;    // 0: no gradient
  uint32_t g, v;      // rows and columns of a slice
  uint32_t t_width;   // of the tiles that make slices: 64 or 128, at most BLOCK_N
  bool begins_early;  // the launch before makes wide alone: nothing else has to wait for it

  // Where an item's sum begins and ends, without the adapter. The shares of slices are equal but for 64 rows.
  __device__ uint32_t first(Schedule::Item item) const {
    return item.makes_slice ? ceil_div(m, 64) * item.n / splits * 64 : 0;
  }
  __device__ uint32_t last(Schedule::Item item) const {
    const uint32_t next = ceil_div(m, 64) * (item.n + 1) / splits * 64;
    return !item.makes_slice ? k : next < m ? next : m;
  }
  // The adapter's part of the sum.
  __device__ uint32_t adapter(Schedule::Item item) const { return item.makes_p || item.makes_slice ? 0 : r; }
  __device__ uint32_t width(Schedule::Item item, uint32_t block_n) const {
    return item.makes_p ? p_width : item.makes_slice ? t_width : block_n;
  }
};

}  // namespace nlora::cuda::sm90
