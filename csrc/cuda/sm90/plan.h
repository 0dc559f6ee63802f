// Which tile a product takes, by a small model of its waves. Plain C++: the launcher and its tests share it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

#include "../common/schedule.h"

namespace nlora::cuda::sm90 {

// A block computes block_m × block_n of C, a cluster that many blocks one below the other; stages and boxes as GemmTile
// has them.
struct TileShape {
  int block_m, block_n, stages, cluster, boxes;

  constexpr uint32_t rows() const { return uint32_t(block_m * cluster); }
};

// Of equal cost the first is taken.
constexpr TileShape kTiles[] = {{128, 256, 4, 2, 2}, {128, 256, 3, 1, 4}, {128, 128, 4, 2, 2}, {128, 128, 4, 1, 2}};

// Tiles of P that an item makes at most. Two narrow ones take about as long as a tile of C: where there are half as many
// items they fill the idle part of the last wave.
constexpr uint32_t kTallest = 2;

// C (m, n) = A (m, k)·Bᵀ + P[:, :r]·wideᵀ; the launch makes w columns of P itself. r and w are 0 without an adapter.
struct ProductSizes {
  uint32_t m, n, k, r, w;
  constexpr Schedule schedule(TileShape tile, uint32_t tall = 1) const {
    return Schedule(m, n, w, tile.rows(), uint32_t(tile.block_n), 0, tall);
  }
  constexpr uint32_t p_width(TileShape tile) const { return piece_width(w, uint32_t(tile.block_n)); }
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

// What plans take it for, until somebody has measured it.
inline std::atomic<double>& bytes_per_cycle() {
  static std::atomic<double> bytes{40};
  return bytes;
}

// NOTE: from published figures of the hardware, not measured on it yet.
struct TileCosts {
  // Bytes a cycle that one processor gets from the L2 cache when all ask at once.
  double bytes = bytes_per_cycle();

  // Cycles in which one processor multiplies 128 rows, one column and 64 of K.
  static constexpr double kColumn = 4;
  // Cycles in which a tile's first operands arrive, and its results leave.
  static constexpr double kStart = 700, kStoreColumn = 4;

  // Of the sum over `depth` for a tile of so many columns.
  double sum(TileShape tile, uint32_t columns, uint32_t depth) const {
    const double loaded = (tile.block_m + double(columns) / tile.cluster) * 64 * 2;
    return ceil_div(depth, 64) * std::max(kColumn * columns, loaded / bytes);
  }
  // Until a tile of C needs P, and until it is done.
  double summed(TileShape tile, const ProductSizes& sizes) const {
    return kStart + sum(tile, uint32_t(tile.block_n), sizes.k);
  }
  double wide(TileShape tile, const ProductSizes& sizes) const {
    const auto columns = uint32_t(tile.block_n);
    return summed(tile, sizes) + sum(tile, columns, sizes.r) + kStoreColumn * columns;
  }
  // Of an item of P.
  double narrow(TileShape tile, const ProductSizes& sizes, uint32_t tall) const {
    const uint32_t columns = sizes.p_width(tile);
    return kStart + tall * (sum(tile, columns, sizes.k) + kStoreColumn * columns);
  }
};

struct Plan {
  uint32_t tile;   // index into kTiles
  uint32_t tall;   // items of P
  double cycles;
};

// Clusters take what comes next when they are free: items of P first, then tiles of C, for which some are late by one
// item of P. The work is over when enough tiles are, a whole number of them after either beginning. Tiles of C that
// begin together with the items of P may have to wait for them.
inline Plan cost_of(const ProductSizes& sizes, uint32_t index, uint32_t tall, uint32_t processors,
                    const TileCosts& costs) {
  const TileShape tile = kTiles[index];
  const Schedule schedule = sizes.schedule(tile, tall);
  const uint32_t workers = processors / uint32_t(tile.cluster);
  const double tiles = double(schedule.rows) * schedule.columns, items = schedule.grid_items() - tiles;
  const double wide = costs.wide(tile, sizes), narrow = items ? costs.narrow(tile, sizes, tall) : 0;
  const double rounds = std::floor(items / workers), late = items - rounds * workers;
  const double early_begin = rounds * narrow, late_begin = early_begin + (late ? narrow : 0);
  const auto done = [&](double time) {
    const auto by_one = [&](double begin) { return std::max(0.0, std::floor((time - begin) / wide + 1e-9)); };
    return by_one(early_begin) * (workers - late) + by_one(late_begin) * late;
  };
  double end = std::numeric_limits<double>::infinity();
  for (const double begin : {early_begin, late_begin}) {
    double time = begin + std::max(0.0, std::floor(tiles / workers) - std::ceil(narrow / wide)) * wide;
    while (done(time) < tiles) {
      time += wide;
    }
    end = std::min(end, time);
  }
  const double waited = late && !rounds ? std::max(0.0, narrow - costs.summed(tile, sizes)) : 0;
  return {index, tall, std::max(end, late_begin) + waited};
}

// The tile and the items of P whose work is over first on a device of this many processors.
inline Plan plan_product(const ProductSizes& sizes, uint32_t processors, const TileCosts& costs = {}) {
  Plan best{0, 1, std::numeric_limits<double>::infinity()};
  for (uint32_t index = 0; index < std::size(kTiles); ++index) {
    if (uint32_t(kTiles[index].cluster) > processors) {
      continue;
    }
    for (uint32_t tall = 1; tall <= (sizes.w ? kTallest : 1); ++tall) {
      const Plan plan = cost_of(sizes, index, tall, processors, costs);
      // Tiles of later bands may wait for high items: these must gain more than that is likely to cost.
      best = plan.cycles * (tall > best.tall ? 1.02 : 1) < best.cycles ? plan : best;
    }
  }
  return best;
}

}  // namespace nlora::cuda::sm90
