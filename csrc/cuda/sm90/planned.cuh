// A product by the tile that plan.h chooses for it.
#pragma once

#include "../common/remembered.h"
#include "gemm_launch.cuh"
#include "plan.h"

namespace nlora::cuda::sm90 {

template <uint32_t kIndex>
using PlannedTile = GemmTile<kTiles[kIndex].block_m, kTiles[kIndex].block_n, kTiles[kIndex].stages,
                             kTiles[kIndex].cluster, kTiles[kIndex].boxes>;

inline Plan remembered_plan(const ProductSizes& q, uint32_t processors) {
  static thread_local Remembered<Plan, 7> plans;
  const TileCosts costs;
  return plans.get({double(q.m), double(q.n), double(q.k), double(q.r), double(q.w), double(processors), costs.bytes},
                   [&] { return plan_product(q, processors, costs); });
}

// T is the dtype of all operands, so that each can be compiled on its own.
template <class T, class Context>
void launch_planned(Context& context, const Product& q) {
  const int64_t w = q.shrink ? q.p.cols : 0;
  const ProductSizes sizes = checked_sizes(q.a.rows, q.c.cols, q.a.cols, rank_of(q), w);
  const uint32_t processors = context.processors();
  check_product(q, 256);
  const Plan plan = remembered_plan(sizes, processors);
  const auto launch = [&](auto tile) {
    using Tile = decltype(tile);
    q.major == Major::K ? launch_gemm<Tile, Major::K, T>(context, q, processors, plan.tall)
                        : launch_gemm<Tile, Major::MN, T>(context, q, processors, plan.tall);
  };
  switch (plan.tile) {
    case 0: return launch(PlannedTile<0>());
    case 1: return launch(PlannedTile<1>());
    case 2: return launch(PlannedTile<2>());
    case 3: return launch(PlannedTile<3>());
  }
  static_assert(std::size(kTiles) == 4, "a case for every tile");
}

}  // namespace nlora::cuda::sm90
