// Into how many slices a narrow gradient divides its rows: plain arithmetic, for whoever owns the slices.
#pragma once

#include "layout.cuh"

namespace nlora::cuda {

// A block takes one tile of the gradient and the steps of one slice, `slots` blocks run at the same time. One more
// slice shortens each block, but every block pays `fixed` steps, for the start of its pipeline and for moving its slice
// twice, and whoever adds up the slices waits for one more of them: about a quarter of a step. The best count is that
// which is over first; of equals, the smallest. Blocks stay within two waves unless there are more tiles, which bounds
// the slices: at most 2·slots tiles of fp32.
constexpr uint32_t choose_splits(uint32_t tiles, uint32_t steps, uint32_t slots, uint32_t fixed) {
  uint32_t best = 1, least = ~0u;
  for (uint32_t splits = 1; splits <= steps && (splits == 1 || tiles * splits <= 2 * slots); ++splits) {
    const uint32_t cost = ceil_div(tiles * splits, slots) * (ceil_div(steps, splits) + fixed) + splits / 4;
    if (cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

// sm_90a: tiles of 128 columns of wide, steps of 64 rows, one block a processor.
struct GradientSplits {
  static constexpr uint32_t kWide = 128, kRows = 64;

  // For wide (m, n) and narrow (m, w).
  static constexpr uint32_t choose(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
    // A tile of a slice, written and read, moves 1024·w bytes, a step 128·(128 + w); starting takes some 4 steps.
    return choose_splits(ceil_div(n, kWide), ceil_div(m, kRows), processors, 8 * w / (128 + w) + 4);
  }
};

// sm_80: square tiles, steps of 32 rows, two blocks a processor.
struct AmpereSplits {
  static constexpr uint32_t kRows = 32, kResident = 2;

  static constexpr uint32_t side(uint32_t w) { return w > 64 ? 128 : 64; }

  static constexpr uint32_t choose(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
    const uint32_t tiles = ceil_div(n, side(w)) * ceil_div(w, side(w));
    // A tile of a slice, written and read, moves as many bytes as side / 16 steps; starting takes some 8 steps.
    return choose_splits(tiles, ceil_div(m, kRows), kResident * processors, side(w) / 16 + 8);
  }
};

// Steps of slice `split`: [first, next one's first), never empty, of lengths that differ by at most one.
NLORA_FN constexpr uint32_t first_step(uint32_t split, uint32_t splits, uint32_t steps) {
  return uint32_t(uint64_t(split) * steps / splits);
}

}  // namespace nlora::cuda
