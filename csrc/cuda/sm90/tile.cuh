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

// One product of a launch. Boxes of right operands of a tile `width` wide: width / cluster × 64 for Major::K, of shrink at
// most 64 × 64; 64 / cluster × 64 for Major::MN.
template <class T>
struct GemmProduct {
  TensorMap a;        // (m, k), boxes of BLOCK_M × 64; for Major::K that of the first is all products'
  TensorMap b;        // width BLOCK_N
  TensorMap c;        // (m, n), boxes of 64 × 64; for Major::MN that of the first is all products'
  TensorMap p;        // (m, r), boxes of BLOCK_M × 64
  TensorMap wide;     // width BLOCK_N
  TensorMap shrink;   // width p_width
  TensorMap p_out;    // (m, w), boxes of 64 × 64
  TensorMap beyond;   // p[:, r:], boxes of 64 × 64
  TensorMap t;        // (m, v), as right operands for Major::MN
  const T* bias;      // (n) or null
  uint32_t n, k;      // multiples of 8
  uint32_t r;         // 0: no adapter
  uint32_t w;         // 0: p is not made here
  uint32_t p_width;   // of the tiles that make p: 64, 128 or 256, at most BLOCK_N
  float* slices;      // (splits·g, v)
  uint32_t splits;    // 0: no gradient
  uint32_t g, v;      // rows and columns of a slice
  uint32_t t_width;   // of the tiles that make slices: 64 or 128, at most BLOCK_N
  // Where its columns of C and of P and its slices begin, counted through all products of the launch; ~0 if it has none.
  uint32_t first_c, first_p, first_slice;
};

// A matrix from one of its rows, or columns, on.
struct Part {
  const TensorMap* map;
  uint32_t first;
};

// A work item as one block sees it: whose it is, and where in that product's matrices.
struct GemmPlace {
  bool makes_p, makes_slice;  // else it is a tile of c
  uint32_t m, n, tall;  // as in Schedule::Item
  uint32_t piece;  // of P, counted through all products
  uint32_t product, end;  // those that are multiplied: [product, end)
};

// Up to Products products in one launch: for Major::K all with one a, tiles of P through several of them, 64 columns of
// each at a time; for Major::MN summed into one c.
template <Major Right, class T, uint32_t Products>
struct GemmProblem {
  using Element = T;
  using Item = GemmProduct<T>;
  static constexpr Major kMajor = Right;
  static constexpr bool kGroup = Products > 1, kSums = kMajor == Major::MN, kSharesP = kGroup && !kSums;

  Item products[Products];
  State state;
  uint32_t m, count;
  uint32_t columns, p_columns, slices;  // of all products
  uint32_t p_tall;  // how many tiles an item that makes p has
  bool begins_early;  // the launch before makes wide alone: nothing else has to wait for it

  __device__ __forceinline__ GemmPlace at(const Schedule& schedule, uint32_t ticket) const {
    const Schedule::Item item = schedule.at(ticket);
    GemmPlace place{item.makes_p, item.makes_slice, item.m, item.n, item.tall, item.n / schedule.tile_columns, 0, 1};
    if constexpr (kGroup) {
      if (item.makes_slice) {
        belong<&Item::first_slice>(place);
      } else if (item.makes_p ? !kSums : kSums) {
        // Several products have columns in a tile of P, or all are summed up.
        place.end = item.makes_p ? 1 : count;
      } else if (item.makes_p) {
        belong<&Item::first_p>(place);
      } else {
        belong<&Item::first_c>(place);
      }
    }
    return place;
  }

  // The rows of shrink for some columns of P, or where these are stored; on for the 64 from there at least.
  template <TensorMap Item::* kMap>
  __device__ __forceinline__ Part part_of_p(const GemmPlace& place, uint32_t column) const {
    uint32_t product = place.product, first = place.n + column;
    if constexpr (kSharesP) {
      product = owner<&Item::first_p>(first);
      first -= products[product].first_p;
    }
    return {&(products[product].*kMap), first};
  }

  // Where the columns of a product begin among those of P that this launch makes.
  __device__ __forceinline__ uint32_t first_p(uint32_t product) const {
    return kGroup && products[product].w ? products[product].first_p : 0;
  }

  // Where the sum of a slice begins and ends. Shares are equal but for 64 rows.
  __device__ __forceinline__ uint32_t first_row(const GemmPlace& place) const {
    return ceil_div(m, 64) * place.n / products[place.product].splits * 64;
  }
  __device__ __forceinline__ uint32_t last_row(const GemmPlace& place) const {
    const uint32_t next = ceil_div(m, 64) * (place.n + 1) / products[place.product].splits * 64;
    return next < m ? next : m;
  }

  // Stages of 64 without the adapter, and of the adapter's part: every product begins one of its own.
  __device__ __forceinline__ uint32_t base_stages(const GemmPlace& place) const {
    if (kSums && place.makes_slice) {
      return ceil_div(last_row(place) - first_row(place), 64);
    }
    uint32_t stages = 0;
    for (uint32_t i = place.product; i < place.end; ++i) {
      stages += ceil_div(products[i].k, 64);
    }
    return stages;
  }
  __device__ __forceinline__ uint32_t adapter_stages(const GemmPlace& place) const {
    uint32_t stages = 0;
    for (uint32_t i = place.product; i < place.end && !place.makes_p && !place.makes_slice; ++i) {
      stages += ceil_div(products[i].r, 64);
    }
    return stages;
  }
  // How much of its product's rank is left at a stage of the adapter.
  __device__ __forceinline__ uint32_t rank_left(const GemmPlace& place, uint32_t stage) const {
    uint32_t i = place.product;
    if constexpr (kGroup) {
      for (uint32_t stages; stage >= (stages = ceil_div(products[i].r, 64)); ++i) {
        stage -= stages;
      }
    }
    return products[i].r - stage * 64;
  }

  __device__ __forceinline__ uint32_t width(const GemmPlace& place, uint32_t block_n) const {
    const Item& product = products[place.product];
    return place.makes_p ? product.p_width : place.makes_slice ? product.t_width : block_n;
  }

 private:
  // The last product that begins at a place or before it.
  template <uint32_t Item::* kFirst>
  __device__ __forceinline__ uint32_t owner(uint32_t at) const {
    uint32_t owner = 0;
#pragma unroll
    for (uint32_t i = 0; i < Products; ++i) {
      owner = products[i].*kFirst <= at ? i : owner;
    }
    return owner;
  }

  template <uint32_t Item::* kFirst>
  __device__ __forceinline__ void belong(GemmPlace& place) const {
    place.product = owner<kFirst>(place.n);
    place.end = place.product + 1;
    place.n -= products[place.product].*kFirst;
  }
};

}  // namespace nlora::cuda::sm90
