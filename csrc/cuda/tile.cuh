// Shapes and places of a GEMM tile: what the kernel, its launcher and its tests agree on.
#pragma once

#include "hopper.cuh"
#include "schedule.h"

namespace hopper {

// One block computes BLOCK_M × BLOCK_N of c, a cluster computes kCluster such tiles one below the other and
// shares the tile of b by multicast.
// Results leave through Boxes boxes of 64 × 64 a consumer: all of its rows at once, or with fewer boxes one after another
// in half of them while the other half is stored, which leaves room for another stage.
template <int BLOCK_M, int BLOCK_N, int Stages, int Cluster = 1, int Boxes = BLOCK_N / 64>
struct GemmTile {
    static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kBlockK = 64;
    static constexpr int kSteps = kBlockK / 16;   // of a wgmma each
    static constexpr int kStages = Stages;
    static constexpr int kCluster = Cluster;

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
    static_assert(BLOCK_M * Cluster <= State::kMaxRows, "more rows than the flags are laid out for");
    static_assert(kSharedBytes + kSharedAlignment <= 227 * 1024, "more shared memory than a block can have");
};

// Addresses in the shared memory of one block. Every control word has 16 bytes of its own.
template <class Tile>
struct GemmShared {
    uint32_t base;

    __device__ uint32_t full(uint32_t stage) const {
        return base + 16 * stage;
    }
    __device__ uint32_t empty(uint32_t stage) const {
        return base + 16 * (Tile::kStages + stage);
    }
    __device__ uint32_t ticket_full() const {
        return base + 16 * (2 * Tile::kStages);
    }
    __device__ uint32_t ticket_empty() const {
        return base + 16 * (2 * Tile::kStages + 1);
    }
    __device__ uint32_t ticket() const {
        return base + 16 * (2 * Tile::kStages + 2);
    }
    __device__ uint32_t epoch() const {
        return ticket() + 4;
    }
    __device__ uint32_t a(uint32_t stage) const {
        return base + Tile::kStagesAt + stage * Tile::kBytesStage;
    }
    __device__ uint32_t b(uint32_t stage) const {
        return a(stage) + Tile::kBytesA;
    }
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

}  // namespace hopper
