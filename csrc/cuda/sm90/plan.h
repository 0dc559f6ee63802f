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
};

// The products of one launch. They have one C if it `sums` them, else one A.
struct GroupSizes {
  ProductSizes products[kMostProducts];
  uint32_t count = 1;
  bool sums = false;

  constexpr GroupSizes() : products{} {}
  constexpr GroupSizes(const ProductSizes& product) : products{product} {}

  // Where the columns of each begin, counted through all of them, for tiles so wide. A tile of C belongs to one product,
  // and one of P to one with an A of its own; others share tiles of P, 64 columns each.
  struct Columns {
    uint32_t c[kMostProducts], p[kMostProducts];
    uint32_t all_c, all_p;
  };
  constexpr Columns columns(uint32_t tile_columns) const {
    Columns columns{};
    for (uint32_t i = 0; i < count; ++i) {
      columns.c[i] = columns.all_c;
      columns.p[i] = columns.all_p;
      columns.all_c += sums && i > 0 ? 0 : filled_up(products[i].n, tile_columns);
      columns.all_p += filled_up(products[i].w, sums ? tile_columns : 64);
    }
    return columns;
  }

  constexpr Schedule schedule(TileShape tile, uint32_t tall = 1) const {
    const Columns all = columns(uint32_t(tile.block_n));
    return Schedule(products[0].m, all.all_c, all.all_p, tile.rows(), uint32_t(tile.block_n), 0, tall);
  }

  // Of the tiles that make P for a product.
  constexpr uint32_t p_width(uint32_t product, uint32_t tile_columns) const {
    return piece_width(sums ? products[product].w : columns(tile_columns).all_p, tile_columns);
  }
};

// A coordinate of the last tile must still be a positive int32.
constexpr int64_t kLargest = (int64_t(1) << 31) - 256;

// Throws where the tickets of any tile would not fit into 32 bits, for so many columns of C and of P.
inline void check_tickets(int64_t m, int64_t n, int64_t w) {
  const auto tiles = [](int64_t size) { return (size + 127) / 128; };
  // The smallest tile has the most; every block draws one ticket too many.
  if (n > kLargest || tiles(m) * (tiles(n) + tiles(w)) + (1 << 16) > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("a product must have fewer than 2^32 tiles, got m " + std::to_string(m) + ", n " +
                                std::to_string(n) + ", w " + std::to_string(w));
  }
}

// The sizes in 32 bits, or an exception where they or the tickets would not fit, or TMA's 16-byte strides.
inline ProductSizes checked_sizes(int64_t m, int64_t n, int64_t k, int64_t r, int64_t w) {
  const auto text = [&] {
    return "m " + std::to_string(m) + ", n " + std::to_string(n) + ", k " + std::to_string(k) + ", r " +
           std::to_string(r) + ", w " + std::to_string(w);
  };
  if (std::min({m, n, k}) <= 0 || std::max({m, n, k}) > kLargest || n % 8 || k % 8) {
    throw std::invalid_argument("m, n and k must be 1 to " + std::to_string(kLargest) +
                                ", n and k multiples of 8, got " + text());
  }
  if (std::min(r, w) < 0 || std::max(r, w) > 256 || r % 8 || w % 8 || (w && w < r)) {
    throw std::invalid_argument("r and w must be multiples of 8 up to 256, w at least r, got " + text());
  }
  check_tickets(m, n, w);
  return {uint32_t(m), uint32_t(n), uint32_t(k), uint32_t(r), uint32_t(w)};
}

// The same for all products of a launch.
inline GroupSizes checked_sizes(const ProductSizes* products, uint32_t count, bool sums) {
  if (count < 1 || count > kMostProducts) {
    throw std::invalid_argument("a launch takes 1 to " + std::to_string(kMostProducts) + " products, got " +
                                std::to_string(count));
  }
  GroupSizes sizes;
  sizes.count = count;
  sizes.sums = sums;
  int64_t n = 0, w = 0;
  for (uint32_t i = 0; i < count; ++i) {
    sizes.products[i] = products[i];
    n = sums ? products[i].n : n + filled_up(products[i].n, 256);
    w += filled_up(products[i].w, 256);
  }
  check_tickets(products[0].m, n, w);
  return sizes;
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
  double summed(TileShape tile, const GroupSizes& sizes) const {
    double cycles = kStart;
    for (uint32_t i = 0; i < (sizes.sums ? sizes.count : 1); ++i) {
      cycles += sum(tile, uint32_t(tile.block_n), sizes.products[i].k);
    }
    return cycles;
  }
  double wide(TileShape tile, const GroupSizes& sizes) const {
    const auto columns = uint32_t(tile.block_n);
    double adapters = 0;
    for (uint32_t i = 0; i < sizes.count; ++i) {
      const double adapter = sum(tile, columns, sizes.products[i].r);
      adapters = sizes.sums ? adapters + adapter : std::max(adapters, adapter);
    }
    return summed(tile, sizes) + adapters + kStoreColumn * columns;
  }
  // Of a tile of P, so many columns wide.
  double piece(TileShape tile, uint32_t columns, uint32_t k) const {
    return sum(tile, columns, k) + kStoreColumn * columns;
  }
  // Of an item of P, on the average.
  double narrow(TileShape tile, const GroupSizes& sizes, uint32_t tall) const {
    double cycles = 0, items = 0;
    for (uint32_t i = 0; i < sizes.count; ++i) {
      const uint32_t columns = sizes.p_width(i, uint32_t(tile.block_n));
      const uint32_t pieces = ceil_div(sizes.products[i].w, uint32_t(tile.block_n));
      cycles += pieces * piece(tile, columns, sizes.products[i].k);
      items += pieces;
    }
    return kStart + tall * (items ? cycles / items : 0);
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
inline Plan cost_of(const GroupSizes& sizes, uint32_t index, uint32_t tall, uint32_t processors,
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
inline Plan plan_product(const GroupSizes& sizes, uint32_t processors, const TileCosts& costs = {}) {
  Plan best{0, 1, std::numeric_limits<double>::infinity()};
  for (uint32_t index = 0; index < std::size(kTiles); ++index) {
    if (uint32_t(kTiles[index].cluster) > processors) {
      continue;
    }
    for (uint32_t tall = 1; tall <= (sizes.columns(64).all_p ? kTallest : 1); ++tall) {
      const Plan plan = cost_of(sizes, index, tall, processors, costs);
      // Tiles of later bands may wait for high items: these must gain more than that is likely to cost.
      best = plan.cycles * (tall > best.tall ? 1.02 : 1) < best.cycles ? plan : best;
    }
  }
  return best;
}

}  // namespace nlora::cuda::sm90
