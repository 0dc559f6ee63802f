// Order of the work of one launch: plain arithmetic, the same in the kernel, its launcher and host code.
#pragma once

#include "layout.cuh"

namespace nlora::cuda {

// Tickets count work items of one cluster: tiles of C, and the items that make P, narrower and `tall` tiles high. They go
// in bands of kBand rows of tiles, so that a band's operands stay in the L2 cache: first the band's items of P, in
// `pieces` columns, then its tiles of C, both down their columns. Every item of P has a smaller ticket than the tiles
// that read it: a block that waits for P waits for work that some block has already taken. Slices of a gradient, sums
// over rows of P, come last and fill what is idle then.
struct Schedule {
  static constexpr uint32_t kBand = 8;
  uint32_t tile_rows, tile_columns;   // of a cluster's tile of C, in elements
  uint32_t rows, columns, pieces;     // of the grid of items
  uint32_t slices;                    // after the grid
  uint32_t tall;

  // C is (m, n). P is (m, w): w = 0 if this launch does not make it.
  NLORA_FN constexpr Schedule(uint32_t m, uint32_t n, uint32_t w, uint32_t tile_rows, uint32_t tile_columns,
                              uint32_t slices = 0, uint32_t tall = 1)
      : tile_rows(tile_rows),
        tile_columns(tile_columns),
        rows(ceil_div(m, tile_rows)),
        columns(ceil_div(n, tile_columns)),
        pieces(ceil_div(w, tile_columns)),
        slices(slices),
        tall(tall) {}

  // Of a band of so many rows, or of all bands.
  NLORA_FN constexpr uint32_t band_items(uint32_t band_rows) const {
    return pieces * ceil_div(band_rows, tall) + columns * band_rows;
  }
  NLORA_FN constexpr uint32_t grid_items() const { return rows / kBand * band_items(kBand) + band_items(rows % kBand); }
  NLORA_FN constexpr uint32_t count() const { return grid_items() + slices; }

  struct Item {
    bool makes_p, makes_slice;   // else it is a tile of C
    uint32_t m, n;               // first row, first column in P or C; of a slice, n is its number
    uint32_t tall;               // tiles, one below the other
  };

  NLORA_FN constexpr Item at(uint32_t ticket) const {
    if (ticket >= grid_items()) {
      return {false, true, 0, ticket - grid_items(), 1};
    }
    const uint32_t band = ticket / band_items(kBand), above = band * kBand;
    const uint32_t band_rows = rows - above < kBand ? rows - above : kBand, p_rows = ceil_div(band_rows, tall);
    uint32_t within = ticket - band * band_items(kBand);
    if (within < pieces * p_rows) {
      const uint32_t row = within % p_rows * tall;
      const uint32_t left = band_rows - row;
      return {true, false, (above + row) * tile_rows, within / p_rows * tile_columns, left < tall ? left : tall};
    }
    within -= pieces * p_rows;
    return {false, false, (above + within % band_rows) * tile_rows, within / band_rows * tile_columns, 1};
  }
};

// Columns of the tiles that make P (m, w), one wgmma wide.
NLORA_FN constexpr uint32_t piece_width(uint32_t w, uint32_t tile_columns) {
  const uint32_t width = w <= 64 ? 64 : w <= 128 ? 128 : 256;
  return width < tile_columns ? width : tile_columns;
}

// Products of one launch at most.
constexpr uint32_t kMostProducts = 4;

// Columns filled up to whole tiles, or whatever else is `unit` wide.
NLORA_FN constexpr uint32_t filled_up(uint32_t columns, uint32_t unit) { return ceil_div(columns, unit) * unit; }

// The number of the launch after that of number `epoch`. None is 0, which is what flags hold that no launch has raised.
NLORA_FN constexpr uint32_t next_epoch(uint32_t epoch) { return epoch + 1 == 0 ? 1 : epoch + 1; }

// Control words of a launch, each in 16 bytes of its own. Zero before the first launch; every launch leaves the ticket
// at 0 and its own number as the epoch, so the same words serve launch after launch, of whatever size, and graph
// replays.
//   ticket, epoch, then for every 64 rows and every piece of P a flag: the number of the launch that wrote them last
struct State {
  static constexpr uint32_t kWord = 4;        // in words of 4 bytes
  static constexpr uint32_t kPieces = 2;      // of the P of a product: 256 columns by tiles of 128
  static constexpr uint32_t kMaxPieces = kPieces * kMostProducts;
  static constexpr uint32_t kMaxRows = 256;   // of a cluster's tile
  uint32_t* words;

  NLORA_FN constexpr uint32_t* ticket() const { return words; }
  NLORA_FN constexpr uint32_t* epoch() const { return words + kWord; }
  NLORA_FN constexpr uint32_t* flag(uint32_t row, uint32_t piece) const {
    return words + (2 + row / 64 * kMaxPieces + piece) * kWord;
  }

  // For C of m rows.
  NLORA_FN static constexpr uint32_t size(uint32_t m) {
    return (2 + ceil_div(m, kMaxRows) * (kMaxRows / 64) * kMaxPieces) * kWord;
  }
};

}  // namespace nlora::cuda
