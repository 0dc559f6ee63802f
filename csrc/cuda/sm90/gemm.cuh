// c = a·bᵀ + bias + p[:, :r]·wideᵀ (product.h): persistent, warp-specialised GEMM.
//
// Warp 0 loads tiles of both operands with TMA, warp 1 hands out tickets, two warpgroups multiply and store. The work
// goes by tickets rather than by block index, so it makes progress with any number of resident blocks. The adapter
// goes through the same ring into the same accumulators, as r more of the depth. p itself, if it is made here, is a
// narrower tile with another right operand; a flag tells its readers that it is in memory. So are slices of a gradient,
// sums over the rows of p, with both operands read across.
#pragma once

#include "tile.cuh"

namespace nlora::cuda::sm90 {

// Rank 0 of the cluster draws tickets and tells every block, until one says that no work is left. A ticket is drawn
// when one lap of loads is left of the item before: early enough to load on without a pause, and no earlier, for a
// block that hoards tickets leaves others idle at the end. The epoch of this launch goes with it: whoever has work to
// do got it before the last draw of all, which moves the epoch on.
template <class Tile>
__device__ __forceinline__ void hand_out_tickets(const GemmShared<Tile> shared, const State state, uint32_t count) {
  const uint32_t clusters = grid_blocks() / Tile::kCluster;
  uint32_t ticket, epoch = 0, parity = 1;
  do {
    mbarrier_wait_in<Tile::kCluster>(shared.ticket_empty(), parity);
    ticket = ticket_take(state.ticket());
    epoch = epoch ? epoch : next_epoch(flag_acquire(state.epoch()));
    for (uint32_t rank = 0; rank < Tile::kCluster; ++rank) {
      st_cluster(map_to_rank(shared.ticket(), rank), ticket);
      st_cluster(map_to_rank(shared.epoch(), rank), epoch);
      mbarrier_arrive_in<Tile::kCluster>(shared.ticket_full(), rank);
    }
    parity ^= 1;
  } while (ticket < count);
  // Each cluster draws one ticket too many; the last of those draws is the last of all.
  if (ticket == count + clusters - 1) {
    ticket_reset(state.ticket());
    flag_release_store(state.epoch(), epoch);
  }
}

// Depth [begin, end) of a left operand (rows from m) and a right one into the ring, 64 to a stage. right(n) says where n
// of its `width` rows lies; where kBy64, it may say so of every 64 of them alone. When `left`, the stages of the item
// still to be loaded, is down to one lap, the next ticket may be drawn.
template <class Tile, Major kLeft, Major kRight, bool kBy64 = false, class Right>
__device__ __forceinline__ void load_depth(const GemmShared<Tile> shared, const TensorMap* a, uint32_t m,
                                           const Right& right, uint32_t width, uint32_t begin, uint32_t end,
                                           uint32_t rank, uint32_t& left, RingPosition<Tile::kStages>& ring) {
  for (uint32_t k = begin; k < end; k += Tile::kBlockK) {
    if (left-- == Tile::kStages) {
      mbarrier_arrive_in<Tile::kCluster>(shared.ticket_empty(), 0);
    }
    const uint32_t full = shared.full(ring.slot);
    mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
    mbarrier_arrive_expect_tx(full, Tile::kBytesA + width * 128);
    if constexpr (kLeft == Major::K) {
      tma_load(shared.a(ring.slot), a, full, k, m);
    } else {
      for (uint32_t row = 0; row < Tile::kBlockM; row += 64) {
        tma_load(shared.a(ring.slot) + row * 128, a, full, m + row, k);
      }
    }
    // Each block of the cluster loads its share of b for all of them.
    const auto load_share = [&](uint32_t line, const TensorMap* b, uint32_t column, uint32_t row) {
      if constexpr (Tile::kCluster == 1) {
        tma_load(shared.b(ring.slot) + line * 128, b, full, column, row);
      } else {
        tma_load_multicast(shared.b(ring.slot) + line * 128, b, full, column, row, (1 << Tile::kCluster) - 1);
      }
    };
    if constexpr (kRight == Major::K) {
      const uint32_t share = width / Tile::kCluster, first = rank * share, box = kBy64 && share > 64 ? 64 : share;
      uint32_t row = first;
      do {
        const Part part = right(row);
        load_share(row, part.map, k, part.first);
        row += box;
      } while (kBy64 && row < first + share);
    } else {
      const uint32_t share = rank * (Tile::kBlockK / Tile::kCluster);
      for (uint32_t column = 0; column < width; column += 64) {
        const Part part = right(column);
        load_share(column + share, part.map, part.first, k + share);
      }
    }
    ring.advance();
  }
}

// Waits until these rows of some pieces of p are in memory; the caller's TMA loads may then read them.
__device__ __forceinline__ void await_p(const State state, uint32_t epoch, uint32_t row, uint32_t rows, uint32_t piece,
                                        uint32_t pieces) {
  for (uint32_t flag = 0; flag < rows / 64 * pieces; ++flag) {
    flag_wait(state.flag(row + flag / pieces * 64, piece + flag % pieces), epoch);
  }
  fence_async_global();
}

// What one work item needs, in the order in which multiply() takes it; gives the ticket's place back.
template <class Tile, class Problem>
__device__ __forceinline__ void load_item(const GemmShared<Tile> shared, const Problem& problem, uint32_t epoch,
                                          const GemmPlace place, uint32_t rank, RingPosition<Tile::kStages>& ring) {
  constexpr Major kMajor = Problem::kMajor;
  const uint32_t width = problem.width(place, Tile::kBlockN);
  const uint32_t stages = place.tall * problem.base_stages(place) + problem.adapter_stages(place);
  uint32_t left = stages < Tile::kStages ? Tile::kStages : stages;
  const auto from = [](const TensorMap* map, uint32_t first) {
    return [=](uint32_t n) { return Part{map, first + n}; };
  };
  if constexpr (kMajor == Major::MN) {
    if (place.makes_slice) {
      const auto& product = problem.products[place.product];
      const uint32_t last = problem.last_row(place);
      for (uint32_t row = problem.first_row(place); row < last; row += Tile::kBlockK) {
        if (product.w) {
          await_p(problem.state, epoch, row, 64, problem.first_p(place.product) / Tile::kBlockN,
                  ceil_div(product.w, Tile::kBlockN));
        }
        load_depth<Tile, Major::MN, Major::MN>(shared, &product.beyond, place.m, from(&product.t, 0), width, row,
                                               row + 1, rank, left, ring);
      }
      return;
    }
  }
#pragma unroll 1
  for (uint32_t tile = 0; tile < place.tall; ++tile) {
    const uint32_t m = place.m + tile * Tile::kClusterM;
    if constexpr (Problem::kSharesP) {
      if (place.makes_p) {
        const auto shrink = [&](uint32_t n) { return problem.template part_of_p<&Problem::Item::shrink>(place, n); };
        load_depth<Tile, Major::K, kMajor, true>(shared, &problem.products[0].a, m, shrink, width, 0,
                                                 problem.products[0].k, rank, left, ring);
        continue;
      }
    }
    for (uint32_t i = place.product; i < place.end; ++i) {
      const auto& product = problem.products[i];
      load_depth<Tile, Major::K, kMajor>(shared, Problem::kSums ? &product.a : &problem.products[0].a, m,
                                         from(place.makes_p ? &product.shrink : &product.b, place.n), width, 0,
                                         product.k, rank, left, ring);
    }
  }
  for (uint32_t i = place.product; i < place.end && !place.makes_p; ++i) {
    const auto& product = problem.products[i];
    if (product.r) {
      grid_wait();
    }
    const uint32_t first = problem.first_p(i);
    for (uint32_t column = 0, next = 0; column < product.r; column = next) {
      const uint32_t of_piece = Tile::kBlockN - (first + column) % Tile::kBlockN;
      next = product.r - column < of_piece ? product.r : column + of_piece;
      if (product.w) {
        await_p(problem.state, epoch, place.m, Tile::kBlockM, (first + column) / Tile::kBlockN, 1);
      }
      load_depth<Tile, Major::K, kMajor>(shared, &product.p, place.m, from(&product.wide, place.n), width, column, next,
                                         rank, left, ring);
    }
  }
}

// Tells the producers of all blocks whose loads fill this slot that this warp has read it.
template <class Tile>
__device__ __forceinline__ void release_stage(const GemmShared<Tile> shared, uint32_t slot) {
  if (lane_rank() < Tile::kCluster) {
    mbarrier_arrive_operands(map_to_rank(shared.empty(slot), lane_rank()));
  }
  sync_warp();
}

// acc[:, :width] += left tile · right tileᵀ over the 64 of one stage, as one commit group. The width is BLOCK_N or a
// half or a quarter of it. NOTE: accumulators of their own for each width would not find room in the registers.
template <class Tile, Major kLeft, Major kRight, class T, int kWidth = Tile::kBlockN>
__device__ __forceinline__ void multiply_stage(float (&acc)[Tile::kBlockN / 2], uint64_t a, uint64_t b, uint32_t width,
                                               bool accumulate) {
  if constexpr (kWidth > 64) {
    if (width < kWidth) {
      multiply_stage<Tile, kLeft, kRight, T, kWidth / 2>(acc, a, b, width, accumulate);
      return;
    }
  }
  wgmma_fence(acc);
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    wgmma<kWidth, T, kLeft, kRight>(acc, advanced(a, step * step_bytes(kLeft)), advanced(b, step * step_bytes(kRight)),
                                    accumulate || step > 0);
  }
  wgmma_commit();
}

// acc (64 × width) = left tile · right tileᵀ over the depth of an item, then over its adapter.
template <class Tile, class Problem>
__device__ __forceinline__ void multiply(float (&acc)[Tile::kBlockN / 2], const GemmShared<Tile> shared,
                                         const Problem& problem, const GemmPlace place, uint32_t width,
                                         uint32_t consumer, RingPosition<Tile::kStages>& ring) {
  using T = typename Problem::Element;
  constexpr Major kMajor = Problem::kMajor;
  // A slice reads its left operand across.
  const bool across = place.makes_slice;
  const uint32_t base_stages = problem.base_stages(place), stages = base_stages + problem.adapter_stages(place);
  uint32_t previous = 0;
  for (uint32_t stage = 0; stage < stages; ++stage) {
    const uint32_t depth = stage < base_stages ? Tile::kBlockK : problem.rank_left(place, stage - base_stages);
    mbarrier_wait(shared.full(ring.slot), ring.parity);
    // The tile's 64 rows of this consumer, or the box that has them as columns.
    const uint32_t rows = shared.a(ring.slot) + consumer * 64 * 128;
    const uint64_t a = across ? mn_major_descriptor(rows, Tile::kBlockK) : k_major_descriptor(rows);
    const uint64_t b = kMajor == Major::K ? k_major_descriptor(shared.b(ring.slot))
                                          : mn_major_descriptor(shared.b(ring.slot), Tile::kBlockK);
    if (kMajor == Major::MN && across) {
      constexpr int kWidest = Tile::kBlockN < 128 ? Tile::kBlockN : 128;
      multiply_stage<Tile, Major::MN, Major::MN, T, kWidest>(acc, a, b, width, stage > 0);
    } else if (depth >= Tile::kBlockK) {
      multiply_stage<Tile, Major::K, kMajor, T>(acc, a, b, width, stage > 0);
    } else {
      // A small rank costs no more than its own steps. Each is a group: a loop cannot stay inside of one.
#pragma unroll 1
      for (uint32_t step = 0; step * 16 < depth; ++step) {
        wgmma_fence(acc);
        wgmma<Tile::kBlockN, T, Major::K, kMajor>(acc, advanced(a, step * step_bytes(Major::K)),
                                                  advanced(b, step * step_bytes(kMajor)), true);
        wgmma_commit();
      }
    }
    if (stage > 0) {
      // One group stays in flight while the slot of the stage before it is refilled.
      wgmma_wait<1>(acc);
      release_stage(shared, previous);
    }
    previous = ring.slot;
    ring.advance();
  }
  wgmma_wait<0>(acc);
  release_stage(shared, previous);
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// acc += bias, of which the tile begins at column n. NOTE: all of it before the first store, for no load passes one.
template <class Tile, class T>
__device__ __forceinline__ void add_bias(float (&acc)[Tile::kBlockN / 2], const T* bias, uint32_t n, uint32_t columns) {
#pragma unroll
  for (int i = 0; i < Tile::kBlockN / 2; i += 4) {
    const uint32_t column = n + accumulator_column(lane_rank(), i);
    const auto pair = column < columns ? ld_global(reinterpret_cast<const Pair<T>*>(bias + column)) : Pair<T>{};
    const float low = to_float(pair.low), high = to_float(pair.high);
    acc[i] += low;
    acc[i + 1] += high;
    acc[i + 2] += low;
    acc[i + 3] += high;
  }
}

// acc -> staging -> the matrix and column that to(column of the tile) gives for every box, by the 128 threads of one
// consumer warpgroup.
template <class Tile, class T, class To>
__device__ __forceinline__ void store_tile(const float (&acc)[Tile::kBlockN / 2], const GemmShared<Tile> shared,
                                           uint32_t width, const To& to, const GemmPlace place, uint32_t consumer,
                                           bool storing_thread) {
  constexpr int kAtOnce = Tile::kBoxesAtOnce, kRounds = Tile::kBoxes / kAtOnce;
  const uint32_t barrier = 1 + consumer;
  const uint32_t lane = lane_rank();
  const uint32_t row = warp_rank() % 4 * 16 + stmatrix_row(lane);
#pragma unroll
  for (int first = 0; first < Tile::kBlockN / 64; first += kAtOnce) {
    if (first > 0 && first * 64 >= int(width)) {
      break;
    }
    // The boxes may still feed an earlier store: of the previous item, or of this one some rounds ago.
    if (storing_thread) {
      if (first == 0) {
        bulk_wait_read<0>();
      } else {
        bulk_wait_read<kRounds - 1>();
      }
    }
    sync_warp();
    bar_sync(barrier, 128);
    const auto staging = [&](int box) { return shared.staging(consumer, box % Tile::kBoxes); };
#pragma unroll
    for (int block = first * 8; block < (first + kAtOnce) * 8; block += 2) {
      if (block >= 8 && block * 8 >= int(width)) {
        break;
      }
      uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 4 * (block + half);
        packed[2 * half] = pack2<T>(acc[i], acc[i + 1]);
        packed[2 * half + 1] = pack2<T>(acc[i + 2], acc[i + 3]);
      }
      const uint32_t line = staging(block / 8) + row * 128;
      stmatrix(swizzled(line + stmatrix_chunk(lane, block % 8) * 16, Swizzle::B128), packed);
    }
    fence_async_shared();
    bar_sync(barrier, 128);
    if (storing_thread) {
      for (int box = first; box < first + kAtOnce && box * 64 < int(width); ++box) {
        const Part target = to(box * 64);
        tma_store(target.map, staging(box), target.first, place.m + consumer * 64);
      }
      bulk_commit();
    }
  }
}

// acc -> the 64 rows of a slice from `row` on.
template <class Tile, class T>
__device__ __forceinline__ void store_slice(const float (&acc)[Tile::kBlockN / 2], const GemmProduct<T>& product,
                                            uint32_t slice, uint32_t row) {
  const uint32_t lane = lane_rank();
#pragma unroll
  for (int i = 0; i < Tile::kBlockN / 2 && i < 64; i += 2) {
    const uint32_t g = row + accumulator_row(warp_rank() % 4, lane, i), v = accumulator_column(lane, i);
    if (g < product.g && v < product.v) {
      st_global(reinterpret_cast<Pair<float>*>(product.slices + (slice * product.g + g) * product.v + v),
                Pair<float>{acc[i], acc[i + 1]});
    }
  }
}

// The consumers' side of one work item.
template <class Tile, class Problem>
__device__ __forceinline__ void compute_item(const GemmShared<Tile> shared, const Problem& problem, uint32_t epoch,
                                             GemmPlace place, uint32_t consumer, bool storing_thread,
                                             RingPosition<Tile::kStages>& ring) {
  using T = typename Problem::Element;
  const bool makes_p = place.makes_p;
  const GemmProduct<T>& product = problem.products[place.product];
  const uint32_t width = problem.width(place, Tile::kBlockN), end = place.m + place.tall * Tile::kClusterM;
  const auto to = [&](uint32_t column) {
    return makes_p ? problem.template part_of_p<&Problem::Item::p_out>(place, column)
                   : Part{&product.c, place.n + column};
  };
#pragma unroll 1
  for (; place.m < end; place.m += Tile::kClusterM) {
    float acc[Tile::kBlockN / 2];
    multiply<Tile>(acc, shared, problem, place, width, consumer, ring);
    if constexpr (Problem::kMajor == Major::MN) {
      if (place.makes_slice) {
        store_slice<Tile, T>(acc, product, place.n, place.m + consumer * 64);
        return;
      }
    }
    if (!makes_p && product.bias) {
      add_bias<Tile>(acc, product.bias, place.n, product.n);
    }
    store_tile<Tile, T>(acc, shared, width, to, place, consumer, storing_thread);
    if (makes_p && storing_thread) {
      bulk_wait<0>();
      fence_async_global();
      flag_release_store(problem.state.flag(place.m + consumer * 64, place.piece), epoch);
    }
    sync_warp();
  }
}

template <class Tile, Major kMajor, class T, uint32_t kProducts>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmProblem<kMajor, T, kProducts> problem) {
  const GemmShared<Tile> shared{shared_base()};
  const uint32_t warp = warp_rank();
  const uint32_t rank = Tile::kCluster == 1 ? 0 : cluster_rank();
  const bool leader = elect_one();
  const Schedule schedule(problem.m, problem.columns, problem.p_columns, Tile::kClusterM, Tile::kBlockN, problem.slices,
                          problem.p_tall);
  const auto own_place = [&](uint32_t ticket) {
    GemmPlace place = problem.at(schedule, ticket);
    place.m += rank * Tile::kBlockM;
    return place;
  };
  constexpr uint32_t kConsumerWarps = 4 * Tile::kConsumers;

  if (warp == 0 && leader) {
    for (uint32_t i = 0; i < (problem.kGroup ? problem.count : 1); ++i) {
      const auto& product = problem.products[i];
      prefetch_tensor_map(&product.b);
      if (i == 0 || problem.kSums) {
        prefetch_tensor_map(&product.a);
      }
      if (i == 0 || !problem.kSums) {
        prefetch_tensor_map(&product.c);
      }
      if (product.r) {
        prefetch_tensor_map(&product.p);
        prefetch_tensor_map(&product.wide);
      }
      if (product.w) {
        prefetch_tensor_map(&product.shrink);
        prefetch_tensor_map(&product.p_out);
      }
      if (product.splits) {
        prefetch_tensor_map(&product.beyond);
        prefetch_tensor_map(&product.t);
      }
    }
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), kConsumerWarps * Tile::kCluster);
    }
    mbarrier_init(shared.ticket_full(), 1);
    mbarrier_init(shared.ticket_empty(), (kConsumerWarps + 1) * Tile::kCluster);
    fence_barrier_init();
  }
  // Blocks touch each other's barriers, so all of the cluster must be ready.
  if constexpr (Tile::kCluster == 1) {
    sync_threads();
  } else {
    sync_warp();
    cluster_sync();
  }
  // Tickets and flags may still be those of the launch before.
  if (!problem.begins_early) {
    grid_wait();
  }

  RingPosition<Tile::kStages> ring;
  uint32_t ticket_parity = 0;
  if (warp < 4) {
    setmaxnreg_decrease<Tile::kProducerRegisters>();
    if (warp == 0 && leader) {
      for (;; ticket_parity ^= 1) {
        mbarrier_wait_in<Tile::kCluster>(shared.ticket_full(), ticket_parity);
        const auto ticket = ld_shared<uint32_t>(shared.ticket());
        const auto epoch = ld_shared<uint32_t>(shared.epoch());
        if (ticket >= schedule.count()) {
          grid_launch_dependents();
          break;
        }
        load_item<Tile>(shared, problem, epoch, own_place(ticket), rank, ring);
      }
    } else if (warp == 1 && leader && rank == 0) {
      hand_out_tickets<Tile>(shared, problem.state, schedule.count());
    }
  } else {
    setmaxnreg_increase<Tile::kConsumerRegisters>();
    const uint32_t consumer = warp / 4 - 1;
    const bool storing_thread = warp % 4 == 0 && leader;
    for (;; ticket_parity ^= 1) {
      mbarrier_wait_in<Tile::kCluster>(shared.ticket_full(), ticket_parity);
      const auto ticket = ld_shared<uint32_t>(shared.ticket());
      const auto epoch = ld_shared<uint32_t>(shared.epoch());
      // All lanes have read them before one gives their place back.
      sync_warp();
      if (leader) {
        mbarrier_arrive_in<Tile::kCluster>(shared.ticket_empty(), 0);
      }
      sync_warp();
      if (ticket >= schedule.count()) {
        break;
      }
      compute_item<Tile>(shared, problem, epoch, own_place(ticket), consumer, storing_thread, ring);
    }
    if (storing_thread) {
      bulk_wait_read<0>();
    }
  }
  // No block leaves while another may still reach into its shared memory.
  if constexpr (Tile::kCluster > 1) {
    sync_warp();
    cluster_sync();
  }
}

}  // namespace nlora::cuda::sm90
