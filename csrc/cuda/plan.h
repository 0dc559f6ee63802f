// Which tile a product takes, by a small model of its waves. Plain C++: the launcher and its tests share it.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

#include "schedule.h"

namespace hopper {

// A block computes block_m × block_n of C, a cluster that many blocks one below the other; stages and boxes as GemmTile
// has them.
struct TileShape {
    int block_m, block_n, stages, cluster, boxes;

    constexpr uint32_t rows() const {
        return uint32_t(block_m * cluster);
    }
};

// Of equal cost the first is taken.
constexpr TileShape kTiles[] = {{128, 256, 4, 2, 2}, {128, 256, 3, 1, 4}, {128, 128, 4, 2, 2}, {128, 128, 4, 1, 2}};

// C (m, n) = A (m, k)·Bᵀ + P[:, :r]·wideᵀ; the launch makes w columns of P itself. r and w are 0 without an adapter.
struct ProductSizes {
    uint32_t m, n, k, r, w;

    constexpr Schedule schedule(TileShape tile) const {
        return Schedule(m, n, w, tile.rows(), uint32_t(tile.block_n));
    }
};

// The sizes in 32 bits, or an exception where they or the tickets of any tile would not fit, or TMA's 16-byte strides.
inline ProductSizes checked_sizes(int64_t m, int64_t n, int64_t k, int64_t r, int64_t w) {
    const auto text = [&] {
        return "m " + std::to_string(m) + ", n " + std::to_string(n) + ", k " + std::to_string(k) + ", r " +
               std::to_string(r) + ", w " + std::to_string(w);
    };
    // A coordinate of the last tile must still be a positive int32.
    constexpr int64_t kLargest = (int64_t(1) << 31) - 256;
    if (std::min({m, n, k}) <= 0 || std::max({m, n, k}) > kLargest || n % 8 || k % 8) {
        throw std::invalid_argument("m, n and k must be 1 to " + std::to_string(kLargest) +
                                    ", n and k multiples of 8, got " + text());
    }
    if (std::min(r, w) < 0 || std::max(r, w) > 256 || r % 8 || w % 8 || (w && w < r)) {
        throw std::invalid_argument("r and w must be multiples of 8 up to 256, w at least r, got " + text());
    }
    const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
    // The smallest tile has the most; every block draws one ticket too many.
    const int64_t tickets = tiles(m, 128) * (tiles(n, 128) + tiles(w, 128)) + (1 << 16);
    if (tickets > std::numeric_limits<uint32_t>::max()) {
        throw std::invalid_argument("a product must have fewer than 2^32 tiles, got " + text());
    }
    return {uint32_t(m), uint32_t(n), uint32_t(k), uint32_t(r), uint32_t(w)};
}

// NOTE: from published figures of the hardware, not measured on it yet.
struct TileCosts {
    // Cycles in which one processor multiplies 128 rows, one column and 64 of K.
    static constexpr double kColumn = 4;
    // Bytes a cycle that one processor gets from the L2 cache when all ask at once.
    static constexpr double kBytes = 40;
    // Cycles in which a tile's first operands arrive, and its results leave.
    static constexpr double kStart = 700, kStoreColumn = 4;

    // Of `columns` columns over k, then r, more.
    static double tile(TileShape tile, uint32_t columns, uint32_t k, uint32_t r) {
        const uint32_t steps = ceil_div(k, 64) + ceil_div(r, 64);
        const double bytes = (tile.block_m + double(columns) / tile.cluster) * 64 * 2;
        return steps * std::max(kColumn * columns, bytes / kBytes) + kStart + kStoreColumn * columns;
    }
};

struct Plan {
    uint32_t tile;    // index into kTiles
    uint32_t waves;   // of tiles of C
    double cycles;
};

// Tiles of C run in waves. The first items of P fill idle slots of the last wave, one each; the others add waves of
// their own, which are shorter.
inline Plan cost_of(const ProductSizes& sizes, uint32_t tile_index, uint32_t processors) {
    const TileShape tile = kTiles[tile_index];
    const Schedule schedule = sizes.schedule(tile);
    const uint32_t workers = processors / uint32_t(tile.cluster);
    const double tiles = double(schedule.rows) * schedule.columns, items = double(schedule.rows) * schedule.pieces;
    const double waves = std::ceil(tiles / workers), idle = waves * workers - tiles;
    const double wide = TileCosts::tile(tile, uint32_t(tile.block_n), sizes.k, sizes.r);
    const double narrow = TileCosts::tile(tile, piece_width(sizes.w, uint32_t(tile.block_n)), sizes.k, 0);
    const double left = std::max(0.0, items - idle);
    return {tile_index, uint32_t(waves), waves * wide + std::ceil(left / workers) * narrow};
}

// The tile whose waves cost least on a device of this many processors.
inline Plan plan_product(const ProductSizes& sizes, uint32_t processors) {
    Plan best{0, 0, std::numeric_limits<double>::infinity()};
    for (uint32_t tile = 0; tile < std::size(kTiles); ++tile) {
        if (uint32_t(kTiles[tile].cluster) <= processors) {
            const Plan plan = cost_of(sizes, tile, processors);
            best = plan.cycles < best.cycles ? plan : best;
        }
    }
    return best;
}

}  // namespace hopper
