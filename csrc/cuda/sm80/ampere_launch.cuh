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
inline bool takes_large_tiles(const AmpereProblem& problem, uint32_t processors) {
  const uint32_t large = ceil_div(tiles_of<AmpereLarge>(problem), processors);
  const uint32_t small = ceil_div(tiles_of<AmpereSmall>(problem), processors);
  // 4 · 60 % = 12 / 5
  return 12 * large <= 5 * small;
}

// One launch, p given.
template <Major MajorB, class Context>
void launch_ampere_sums(Context& context, const Product& product) {
  const Matrix &a = product.a, &b = product.b, &c = product.c, &p = product.p, &wide = product.wide;
  const int64_t r = MajorB == Major::K ? wide.cols : wide.rows;
  const AmpereProblem problem{{{data16(a), data16(b), a.row_stride, b.row_stride, uint32_t(a.cols)},
                               {data16(p), data16(wide), p.row_stride, wide.row_stride, uint32_t(wide ? r : 0)}},
                              uint32_t(c.rows),
                              uint32_t(c.cols),
                              c.data,
                              data16(product.bias),
                              c.row_stride,
                              1};
  if (takes_large_tiles(problem, context.processors())) {
    launch_ampere<AmpereLarge, Major::K, MajorB>(context, c.dtype, &problem, 1);
  } else {
    launch_ampere<AmpereSmall, Major::K, MajorB>(context, c.dtype, &problem, 1);
  }
}

// The product in one launch, or with shrink in two; product.state is not used.
template <class Context>
void launch_product(Context& context, const Product& product) {
  const auto launch =
      product.major == Major::K ? &launch_ampere_sums<Major::K, Context> : &launch_ampere_sums<Major::MN, Context>;
  if (product.shrink) {
    Product narrow;
    narrow.a = product.a;
    narrow.b = product.shrink;
    narrow.c = product.p;
    launch(context, narrow);
  }
  launch(context, product);
}

// One launch for 1 to 3 gradients of one dtype: see Gradient.
template <class Context>
void launch_gradients(Context& context, const Gradient* gradients, uint32_t count) {
  check_group(count);
  AmpereProblem problems[kMostInGroup];
  bool large = false;
  for (uint32_t i = 0; i < count; ++i) {
    const Matrix &wide = gradients[i].wide, &narrow = gradients[i].narrow;
    check_splits(gradients[i], AmpereSplits::kRows);
    problems[i] = {{{data16(wide), data16(narrow), wide.row_stride, narrow.row_stride, uint32_t(wide.rows)}, {}},
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
