// y = x·Wᵀ (+ bias): persistent, warp-specialised GEMM.
//
// Warp 0 loads tiles of x and W with TMA, warp 1 hands out tickets, two warpgroups multiply and store. The work
// goes by tickets rather than by block index, so it makes progress with any number of resident blocks.
#pragma once

#include "schedule.h"
#include "tile.cuh"

namespace hopper {

template <class T>
struct GemmProblem {
    TensorMap x;        // (m, k), boxes of BLOCK_M × 64
    TensorMap weight;   // (n, k), boxes of BLOCK_N / cluster × 64
    TensorMap y;        // (m, n), boxes of 64 × 64
    const T* bias;      // (n) or null
    uint32_t* ticket;   // 0 before the first launch; every launch leaves it at 0
    uint32_t m, n, k;   // k and n multiples of 8
};

// Rank 0 of the cluster draws tickets and tells every block, until one says that no work is left. A ticket is drawn
// when the loads of the previous tile are on their way: early enough to load on without a pause, and no earlier, for
// a block that hoards tickets leaves others idle at the end.
template <class Tile>
__device__ __forceinline__ void hand_out_tickets(const GemmShared<Tile> shared, uint32_t* counter, uint32_t count) {
    const uint32_t clusters = grid_blocks() / Tile::kCluster;
    uint32_t ticket, parity = 1;
    do {
        mbarrier_wait_cluster(shared.ticket_empty(), parity);
        ticket = ticket_take(counter);
        for (uint32_t rank = 0; rank < Tile::kCluster; ++rank) {
            st_cluster(map_to_rank(shared.ticket(), rank), ticket);
            mbarrier_arrive_cluster(map_to_rank(shared.ticket_full(), rank));
        }
        parity ^= 1;
    } while (ticket < count);
    // Each cluster draws one ticket too many; the last of those draws is the last of all.
    if (ticket == count + clusters - 1) {
        ticket_reset(counter);
    }
}

template <class Tile, class T>
__device__ __forceinline__ void load_tile(const GemmShared<Tile> shared, const GemmProblem<T>& problem,
                                          Schedule::Item place, uint32_t rank,
                                          RingPosition<Tile::kStages>& ring) {
    for (uint32_t k = 0; k < problem.k; k += Tile::kBlockK) {
        const uint32_t full = shared.full(ring.slot);
        mbarrier_wait_cluster(shared.empty(ring.slot), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, Tile::kBytesStage);
        tma_load(shared.x(ring.slot), &problem.x, full, k, place.m);
        if constexpr (Tile::kCluster == 1) {
            tma_load(shared.weight(ring.slot), &problem.weight, full, k, place.n);
        } else {
            // Each block of the cluster loads its share of the weight tile for all of them.
            constexpr uint32_t kRows = Tile::kBlockN / Tile::kCluster;
            tma_load_multicast(shared.weight(ring.slot) + rank * kRows * 128, &problem.weight, full, k,
                               place.n + rank * kRows, (1 << Tile::kCluster) - 1);
        }
        ring.advance();
    }
}

// Tells the producers of all blocks whose loads fill this slot that this warp has read it.
template <class Tile>
__device__ __forceinline__ void release_stage(const GemmShared<Tile> shared, uint32_t slot) {
    if (lane_rank() < Tile::kCluster) {
        mbarrier_arrive_cluster(map_to_rank(shared.empty(slot), lane_rank()));
    }
    sync_warp();
}

// acc (64 × BLOCK_N) = x tile · weight tileᵀ over the whole of K.
template <class Tile, class T>
__device__ __forceinline__ void multiply_tile(float (&acc)[Tile::kBlockN / 2], const GemmShared<Tile> shared,
                                              uint32_t k_size, uint32_t consumer,
                                              RingPosition<Tile::kStages>& ring) {
    uint32_t previous = 0;
    for (uint32_t k = 0; k < k_size; k += Tile::kBlockK) {
        mbarrier_wait(shared.full(ring.slot), ring.parity);
        const uint64_t a = k_major_descriptor(shared.x(ring.slot) + consumer * 64 * 128);
        const uint64_t b = k_major_descriptor(shared.weight(ring.slot));
        wgmma_fence(acc);
#pragma unroll
        for (int step = 0; step < Tile::kBlockK / 16; ++step) {
            wgmma<Tile::kBlockN, T>(acc, advanced(a, step * 32), advanced(b, step * 32), k + step > 0);
        }
        wgmma_commit();
        if (k > 0) {
            // One group stays in flight while the slot of the one before it is refilled.
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
struct alignas(4) Pair {
    T low, high;
};

// acc + bias -> staging -> y, by the 128 threads of one consumer warpgroup.
template <class Tile, class T>
__device__ __forceinline__ void store_tile(const float (&acc)[Tile::kBlockN / 2], const GemmShared<Tile> shared,
                                           const GemmProblem<T>& problem,
                                           Schedule::Item place, uint32_t consumer,
                                           bool storing_thread) {
    const uint32_t barrier = 1 + consumer;
    const uint32_t lane = lane_rank();
    const uint32_t row = warp_rank() % 4 * 16 + stmatrix_row(lane);
    // The staging buffer may still feed the previous tile's store.
    if (storing_thread) {
        bulk_wait_read<0>();
    }
    sync_warp();
    bar_sync(barrier, 128);
#pragma unroll
    for (int block = 0; block < Tile::kBlockN / 8; block += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = 4 * (block + half);
            float low = 0, high = 0;
            const uint32_t column = place.n + accumulator_column(lane, i);
            if (problem.bias && column < problem.n) {
                const auto pair = ld_global(reinterpret_cast<const Pair<T>*>(problem.bias + column));
                low = to_float(pair.low);
                high = to_float(pair.high);
            }
            packed[2 * half] = pack2<T>(acc[i] + low, acc[i + 1] + high);
            packed[2 * half + 1] = pack2<T>(acc[i + 2] + low, acc[i + 3] + high);
        }
        const uint32_t line = shared.staging(consumer, block / 8) + row * 128;
        stmatrix(swizzled(line + stmatrix_chunk(lane, block % 8) * 16, Swizzle::B128), packed);
    }
    fence_async_shared();
    bar_sync(barrier, 128);
    if (storing_thread) {
        for (int box = 0; box < Tile::kBoxes; ++box) {
            tma_store(&problem.y, shared.staging(consumer, box), place.n + box * 64, place.m + consumer * 64);
        }
        bulk_commit();
    }
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, 1) gemm_kernel(const __grid_constant__ GemmProblem<T> problem) {
    const GemmShared<Tile> shared{shared_base()};
    const uint32_t warp = warp_rank();
    const uint32_t rank = Tile::kCluster == 1 ? 0 : cluster_rank();
    const bool leader = elect_one();
    const Schedule schedule(problem.m, problem.n, 0, Tile::kBlockM * Tile::kCluster, Tile::kBlockN);
    const auto own_place = [&](uint32_t ticket) {
        Schedule::Item place = schedule.at(ticket);
        place.m += rank * Tile::kBlockM;
        return place;
    };
    constexpr uint32_t kConsumerWarps = 4 * Tile::kConsumers;

    if (warp == 0 && leader) {
        prefetch_tensor_map(&problem.x);
        prefetch_tensor_map(&problem.weight);
        prefetch_tensor_map(&problem.y);
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

    RingPosition<Tile::kStages> ring;
    uint32_t ticket_parity = 0;
    if (warp < 4) {
        setmaxnreg_decrease<Tile::kProducerRegisters>();
        if (warp == 0 && leader) {
            for (;; ticket_parity ^= 1) {
                mbarrier_wait_cluster(shared.ticket_full(), ticket_parity);
                const auto ticket = ld_shared<uint32_t>(shared.ticket());
                if (ticket >= schedule.count()) {
                    break;
                }
                load_tile<Tile, T>(shared, problem, own_place(ticket), rank, ring);
                mbarrier_arrive_cluster(map_to_rank(shared.ticket_empty(), 0));
            }
        } else if (warp == 1 && leader && rank == 0) {
            hand_out_tickets<Tile>(shared, problem.ticket, schedule.count());
        }
    } else {
        setmaxnreg_increase<Tile::kConsumerRegisters>();
        const uint32_t consumer = warp / 4 - 1;
        const bool storing_thread = warp % 4 == 0 && leader;
        for (;; ticket_parity ^= 1) {
            mbarrier_wait_cluster(shared.ticket_full(), ticket_parity);
            const auto ticket = ld_shared<uint32_t>(shared.ticket());
            // All lanes have read the ticket before one of them gives its place back.
            sync_warp();
            if (leader) {
                mbarrier_arrive_cluster(map_to_rank(shared.ticket_empty(), 0));
            }
            sync_warp();
            if (ticket >= schedule.count()) {
                break;
            }
            const Schedule::Item place = own_place(ticket);
            float acc[Tile::kBlockN / 2];
            multiply_tile<Tile, T>(acc, shared, problem.k, consumer, ring);
            store_tile<Tile, T>(acc, shared, problem, place, consumer, storing_thread);
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

}  // namespace hopper
