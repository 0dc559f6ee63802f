// Host side of ampere.cuh: which tile, which operand lies which way.
#pragma once

#include "ampere.cuh"
#include "../common/context.cuh"
#include "../common/gradient.h"
#include "../common/product.h"

namespace nlora::cuda::sm80 {

inline const uint16_t* data16(const Matrix& matrix) { return static_cast<const uint16_t*>(matrix.data); }

template <class Tile>
uint32_t tiles_of(const AmpereProblem& problem) {
  return Schedule(problem.m, problem.n, 0, Tile::kBlockM, Tile::kBlockN).count();
}

// `problems` for gradients may be several.
template <class Tile, Major MajorA, Major MajorB, class Context>
void launch_ampere(Context& context, Dtype dtype, const AmpereProblem* problems, uint32_t count) {
  Group<AmpereProblem> group;
  for (uint32_t i = 0; i < count; ++i) {
    group.add(problems[i], tiles_of<Tile>(problems[i]) * problems[i].splits);
  }
  const auto kernel = dtype == Dtype::kBFloat16 ? &ampere_kernel<Tile, bf16, MajorA, MajorB>
                                                : &ampere_kernel<Tile, fp16, MajorA, MajorB>;
  context.launch({group.total(), Tile::kThreads, 1, Tile::kSharedBytes, Tile::kRegisters}, kernel, group);
}

// Whether large tiles are over first. A processor multiplies its share of the tiles one after another; by small ones,
// which read shared memory oftener, it does 60 % as much.
inline bool takes_large_tiles(const AmpereProblem* problems, uint32_t count, uint32_t processors) {
  uint32_t large = 0, small = 0;
  for (uint32_t i = 0; i < count; ++i) {
    large += tiles_of<AmpereLarge>(problems[i]);
    small += tiles_of<AmpereSmall>(problems[i]);
  }
  // 4 · 60 % = 12 / 5
  return 12 * ceil_div(large, processors) <= 5 * ceil_div(small, processors);
}

// The products in one launch, p given, each into its c or all into one.
template <Major MajorB, class Context>
void launch_ampere_sums(Context& context, const Product* products, uint32_t count, bool into_one) {
  AmpereProblem problems[kMostProducts];
  uint32_t last = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const Matrix &a = products[i].a, &b = products[i].b, &c = products[i].c;
    const Matrix &p = products[i].p, &wide = products[i].wide;
    AmpereProblem& problem = problems[into_one ? 0 : i];
    last = into_one ? 0 : i;
    if (i == last) {
      problem = {{}, 0, uint32_t(c.rows), uint32_t(c.cols), c.data, data16(products[i].bias), c.row_stride, 1};
    }
    problem.sums[problem.count++] = {data16(a), data16(b), a.row_stride, b.row_stride, uint32_t(a.cols)};
    if (wide) {
      const int64_t r = MajorB == Major::K ? wide.cols : wide.rows;
      problem.sums[problem.count++] = {data16(p), data16(wide), p.row_stride, wide.row_stride, uint32_t(r)};
    }
  }
  const auto launch = takes_large_tiles(problems, last + 1, context.processors())
                          ? &launch_ampere<AmpereLarge, Major::K, MajorB, Context>
                          : &launch_ampere<AmpereSmall, Major::K, MajorB, Context>;
  launch(context, products->c.dtype, problems, last + 1);
}

// The products in one launch, or with shrink in two; their state is not used.
template <class Context>
void launch_products(Context& context, const Product* products, uint32_t count) {
  const bool along = products->major == Major::K;
  const auto launch = along ? &launch_ampere_sums<Major::K, Context> : &launch_ampere_sums<Major::MN, Context>;
  Product narrow[kMostProducts];
  uint32_t narrow_count = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (products[i].shrink) {
      narrow[narrow_count].a = products[i].a;
      narrow[narrow_count].b = products[i].shrink;
      narrow[narrow_count++].c = products[i].p;
    }
  }
  if (narrow_count) {
    launch(context, narrow, narrow_count, false);
  }
  launch(context, products, count, !along);
}

// One launch for up to kMostInGroup gradients of one dtype: see Gradient.
template <class Context>
void launch_gradients(Context& context, const Gradient* gradients, uint32_t count) {
  check_group(count);
  AmpereProblem problems[kMostInGroup];
  bool large = false;
  for (uint32_t i = 0; i < count; ++i) {
    const Matrix &wide = gradients[i].wide, &narrow = gradients[i].narrow;
    check_splits(gradients[i], AmpereSplits::kRows);
    problems[i] = {{{data16(wide), data16(narrow), wide.row_stride, narrow.row_stride, uint32_t(wide.rows)}},
                   1,
                   uint32_t(wide.cols),
                   uint32_t(narrow.cols),
                   gradients[i].slices.data,
                   nullptr,
                   narrow.cols,
                   gradients[i].splits};
    large = large || AmpereSplits::side(uint32_t(narrow.cols)) == AmpereLarge::kBlockN;
  }
  const auto launch = large ? &launch_ampere<AmpereLarge, Major::MN, Major::MN, Context>
                            : &launch_ampere<AmpereSmall, Major::MN, Major::MN, Context>;
  launch(context, gradients->wide.dtype, problems, count);
}

}  // namespace nlora::cuda::sm80
