// Seeded bugs: one small kernel for each rule of the layer, right with Broken = false. With Broken = true the
// emulator must say which rule is broken, on every seed.
#include <cstring>

#include "../../cuda/common/context.cuh"
#include "runner.h"

namespace nlora::cuda::tests {
namespace {

constexpr uint32_t kTileBytes = 8192;   // 64 × 64 elements

struct BugProblem {
  TensorMap from, to, bad;   // 64 × 64 with 128-byte swizzle; `bad` has a row stride of 72 bytes
  const uint32_t* input;
  uint32_t* output;
  uint32_t* scratch;   // 128 words
  uint32_t* control;
};

__device__ void init_barriers(uint32_t count, uint32_t arrivals) {
  if (thread_rank() == 0) {
    for (uint32_t i = 0; i < count; ++i) {
      mbarrier_init(shared_base() + 16 * i, arrivals);
    }
    fence_barrier_init();
  }
  sync_threads();
}

__device__ void load_tile(const BugProblem& p, uint32_t to, uint32_t barrier) {
  mbarrier_arrive_expect_tx(barrier, kTileBytes);
  tma_load(to, &p.from, barrier, 0, 0);
}

__device__ void fill_tile(uint32_t tile, uint32_t threads) {
  for (uint32_t word = thread_rank(); word < kTileBytes / 4; word += threads) {
    st_shared(tile + 4 * word, word);
  }
}

// ---- mbarriers and TMA loads ----

template <bool Broken>
void wrong_slot(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(2, 1);
  if (thread_rank() == 0) {
    load_tile(p, tile, base);
    load_tile(p, tile + kTileBytes, base + 16);
  }
  mbarrier_wait(base + (Broken ? 0 : 16), 0);
  st_global(p.output + thread_rank(), ld_shared<uint32_t>(tile + kTileBytes + 4 * thread_rank()));
  mbarrier_wait(base, 0);
  mbarrier_wait(base + 16, 0);
}

template <bool Broken>
void refill_without_release(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(3, 1);
  if (warp_rank() == 0) {
    if (lane_rank() == 0) {
      load_tile(p, tile, base);
      if (!Broken) {
        mbarrier_wait(base + 16, 0);
      }
      load_tile(p, tile, base + 32);
    }
  } else {
    mbarrier_wait(base, 0);
    st_global(p.output + lane_rank(), ld_shared<uint32_t>(tile + 4 * lane_rank()));
    sync_warp();
    if (lane_rank() == 0) {
      mbarrier_arrive(base + 16);
    }
    mbarrier_wait(base + 32, 0);
  }
}

template <int Difference, bool Broken>
void wrong_byte_count(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    mbarrier_arrive_expect_tx(base, kTileBytes + (Broken ? Difference : 0));
    tma_load(tile, &p.from, base, 0, 0);
  }
  mbarrier_wait(base, 0);
}

template <bool Broken>
void one_arrival_too_many(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    mbarrier_arrive_expect_tx(base, kTileBytes);
    if (Broken) {
      mbarrier_arrive(base);
    }
    tma_load(tile, &p.from, base, 0, 0);
  }
  mbarrier_wait(base, 0);
}

template <bool Broken>
void unfenced_barrier(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  if (thread_rank() == 0) {
    mbarrier_init(base, 1);
    if (!Broken) {
      fence_barrier_init();
    }
    load_tile(p, tile, base);
    mbarrier_wait(base, 0);
  }
}

template <bool Broken>
void barrier_before_init(const BugProblem) {
  const uint32_t base = shared_base();
  if (thread_rank() == 0) {
    mbarrier_init(base, 1);
  }
  if (!Broken) {
    sync_threads();
  }
  if (thread_rank() == 32) {
    mbarrier_arrive(base);
  }
}

template <bool Broken>
void misaligned_tile(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + (Broken ? 512 : 1024);
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    load_tile(p, tile, base);
  }
  mbarrier_wait(base, 0);
}

template <bool Broken>
void invalid_map(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    mbarrier_arrive_expect_tx(base, kTileBytes);
    tma_load(tile, Broken ? &p.bad : &p.from, base, 0, 0);
  }
  mbarrier_wait(base, 0);
}

template <bool Broken>
void exit_before_load(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    load_tile(p, tile, base);
    if (!Broken) {
      mbarrier_wait(base, 0);
    }
  }
}

// ---- Control words ----

template <bool Broken>
void store_to_barrier(const BugProblem) {
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    st_shared(shared_base() + (Broken ? 8 : 16), 1u);
  }
}

template <bool Broken>
void crowded_barriers(const BugProblem) {
  if (thread_rank() == 0) {
    mbarrier_init(shared_base(), 1);
    mbarrier_init(shared_base() + (Broken ? 8 : 16), 1);
  }
}

template <bool Broken>
void plain_flag_read(const BugProblem p) {
  const uint32_t value = Broken ? ld_global(p.control) : flag_acquire(p.control);
  st_global(p.output + thread_rank(), value);
}

template <bool Broken>
void crowded_flags(const BugProblem p) {
  flag_release_add(p.control, 1);
  flag_release_add(p.control + (Broken ? 1 : 4), 1);
}

// Two blocks raise a flag one after the other; if they store, the second must know of the first.
template <bool Broken>
void flag_stored_over(const BugProblem p) {
  if (thread_rank() == 0) {
    if (!Broken && block_rank() == 1) {
      flag_wait(p.control, 1);
    }
    flag_release_store(p.control, 1 + block_rank());
  }
}

// What one block has added to a flag is gone if another stores.
template <bool Broken>
void flag_added_and_stored(const BugProblem p) {
  if (thread_rank() == 0) {
    Broken&& block_rank() == 1 ? flag_release_store(p.control, 1) : flag_release_add(p.control, 1);
  }
}

// ---- Ordinary shared memory and warps ----

template <bool Broken>
void warps_race(const BugProblem p) {
  const uint32_t base = shared_base(), t = thread_rank();
  st_shared(base + 4 * t, t);
  if (!Broken) {
    sync_threads();
  }
  st_global(p.output + t, ld_shared<uint32_t>(base + 4 * (t ^ 32)));
}

template <bool Broken>
void lanes_race(const BugProblem p) {
  const uint32_t base = shared_base(), t = thread_rank();
  st_shared(base + 4 * t, t);
  if (!Broken) {
    sync_warp();
  }
  st_global(p.output + t, ld_shared<uint32_t>(base + 4 * (t ^ 1)));
}

template <bool Broken>
void never_written(const BugProblem p) {
  const uint32_t base = shared_base();
  if (!Broken) {
    st_shared(base + 4 * thread_rank(), 1u);
  }
  st_global(p.output + thread_rank(), ld_shared<uint32_t>(base + 4 * thread_rank()));
}

template <bool Broken>
void beyond_shared(const BugProblem) {
  st_shared(shared_base() + (Broken ? 64 * 1024 : 1024) + 4 * thread_rank(), 1u);
}

template <bool Broken>
void beyond_global(const BugProblem p) {
  st_global(p.output + (Broken ? 1 << 20 : 0) + thread_rank(), 1u);
}

template <bool Broken>
void blocks_race(const BugProblem p) {
  st_global(p.output + (Broken ? 0 : block_rank() * 64) + thread_rank(), block_rank());
}

template <bool Broken>
void half_a_warp(const BugProblem p) {
  uint32_t value = lane_rank();
  if (!Broken || lane_rank() < 16) {
    value = shuffle_xor(value, 1);
  }
  st_global(p.output + thread_rank(), value);
}

// Barrier 1 first joins warps 0 and 1, then warps 1 and 2.
template <bool Broken>
void changing_participants(const BugProblem) {
  if (warp_rank() < 2) {
    bar_sync(1, 64);
  }
  sync_threads();
  if (warp_rank() == 1 || warp_rank() == 2) {
    bar_sync(Broken ? 1 : 2, 64);
  }
}

// An aligned instruction right after a branch in which one lane synchronises.
template <bool Broken>
void barrier_after_branch(const BugProblem) {
  init_barriers(1, 1);
  if (thread_rank() == 0) {
    mbarrier_arrive(shared_base());
  }
  if (!Broken) {
    sync_warp();
  }
  bar_sync(1, 128);
}

template <bool Broken>
void differing_counts(const BugProblem) {
  bar_sync(1, Broken && warp_rank() == 1 ? 96 : 128);
}

// ---- cp.async ----

template <bool Broken>
void cp_async_unwaited(const BugProblem p) {
  const uint32_t to = shared_base() + 16 * thread_rank();
  cp_async(to, p.input + 4 * thread_rank(), 16);
  cp_async_commit();
  if (!Broken) {
    cp_async_wait<0>();
  }
  st_global(p.output + thread_rank(), ld_shared<uint32_t>(to));
  cp_async_wait<0>();
}

template <bool Broken>
void cp_async_unfenced(const BugProblem p) {
  const uint32_t tile = shared_base();
  for (uint32_t at = 16 * thread_rank(); at < kTileBytes; at += 16 * 128) {
    cp_async(tile + at, p.input + at / 4, 16);
  }
  cp_async_commit();
  cp_async_wait<0>();
  if (!Broken) {
    fence_async_shared();
  }
  sync_threads();
  if (thread_rank() == 0) {
    tma_store(&p.to, tile, 0, 0);
    bulk_commit();
    bulk_wait<0>();
  }
}

// ---- Staging and TMA stores ----

// Where the fence of the staging sequence goes missing: in one warp, or everywhere but in the storing thread.
enum class Fences { NotInWarp3, OnlyAfterBarrier };

template <Fences Fault, bool Broken>
void unfenced_staging(const BugProblem p) {
  const uint32_t tile = shared_base();
  fill_tile(tile, 128);
  if (!Broken || (Fault == Fences::NotInWarp3 && warp_rank() != 3)) {
    fence_async_shared();
  }
  bar_sync(1, 128);
  if (thread_rank() == 0) {
    if (Fault == Fences::OnlyAfterBarrier) {
      fence_async_shared();
    }
    tma_store(&p.to, tile, 0, 0);
    bulk_commit();
    bulk_wait<0>();
  }
}

template <bool Broken>
void unordered_staging(const BugProblem p) {
  const uint32_t tile = shared_base();
  fill_tile(tile, 128);
  fence_async_shared();
  if (!Broken) {
    bar_sync(1, 128);
  }
  if (thread_rank() == 0) {
    tma_store(&p.to, tile, 0, 0);
    bulk_commit();
    bulk_wait<0>();
  }
}

template <bool Broken>
void restaging(const BugProblem p) {
  const uint32_t tile = shared_base();
  for (uint32_t round = 0; round < 2; ++round) {
    if (thread_rank() == 0 && !Broken) {
      bulk_wait_read<0>();
    }
    sync_warp();
    bar_sync(1, 128);
    fill_tile(tile, 128);
    fence_async_shared();
    bar_sync(1, 128);
    if (thread_rank() == 0) {
      tma_store(&p.to, tile, 0, round * 64);
      bulk_commit();
    }
    sync_warp();
  }
  if (thread_rank() == 0) {
    bulk_wait<0>();
  }
}

// Groups belong to threads: another thread's commit and wait say nothing.
template <bool Broken>
void wait_in_another_thread(const BugProblem p) {
  const uint32_t tile = shared_base();
  fill_tile(tile, 128);
  fence_async_shared();
  sync_threads();
  if (thread_rank() == 0) {
    tma_store(&p.to, tile, 0, 0);
  }
  if (thread_rank() == (Broken ? 32 : 0)) {
    bulk_commit();
    bulk_wait<0>();
  }
  sync_threads();
  fill_tile(tile, 128);
}

template <bool Broken>
void exit_before_store(const BugProblem p) {
  const uint32_t tile = shared_base();
  fill_tile(tile, 128);
  fence_async_shared();
  sync_threads();
  if (thread_rank() == 0) {
    tma_store(&p.to, tile, 0, 0);
    bulk_commit();
    if (!Broken) {
      bulk_wait_read<0>();
    }
  }
}

// ---- Publishing a tile to another block ----

enum class Publish { ReadWait, RelaxedFlag, NoWriterFence, NoConsumerFence, NoFlagWait };

template <Publish Fault, bool Broken>
void publishing(const BugProblem p) {
  const uint32_t base = shared_base(), tile = base + 1024;
  init_barriers(1, 1);
  if (block_rank() == 0) {
    fill_tile(tile, 128);
    fence_async_shared();
    sync_threads();
    if (thread_rank() == 0) {
      tma_store(&p.to, tile, 0, 0);
      bulk_commit();
      Broken&& Fault == Publish::ReadWait ? bulk_wait_read<0>() : bulk_wait<0>();
      if (!Broken || Fault != Publish::NoWriterFence) {
        fence_async_global();
      }
      Broken&& Fault == Publish::RelaxedFlag ? void(ticket_take(p.control)) : flag_release_add(p.control, 1);
    }
  } else if (thread_rank() == 0) {
    if (!Broken || Fault != Publish::NoFlagWait) {
      flag_wait(p.control, 1);
    }
    if (!Broken || Fault != Publish::NoConsumerFence) {
      fence_async_global();
    }
    mbarrier_arrive_expect_tx(base, kTileBytes);
    tma_load(tile, &p.to, base, 0, 0);
    mbarrier_wait(base, 0);
  }
}

// ---- Dependent grids ----

enum class Grids { NoWait, OverwritesEarly, EarlyForTma, NobodyWaits, NotHandedOn };

// The first launch; the second may begin beside it.
template <Grids Fault>
void before(const BugProblem p) {
  grid_launch_dependents();
  if (Fault == Grids::OverwritesEarly) {
    ld_global(p.scratch + thread_rank());
  } else if (Fault == Grids::EarlyForTma) {
    const uint32_t tile = shared_base();
    fill_tile(tile, 128);
    fence_async_shared();
    sync_threads();
    if (thread_rank() == 0) {
      tma_store(&p.to, tile, 0, 0);
      bulk_commit();
      bulk_wait_read<0>();
    }
  } else {
    st_global(p.output + thread_rank(), thread_rank());
  }
}

template <Grids Fault, bool Broken>
void after(const BugProblem p) {
  const uint32_t t = thread_rank(), base = shared_base(), tile = base + 1024;
  if (Fault == Grids::EarlyForTma) {
    init_barriers(1, 1);
    if (t == 0) {
      if (!Broken) {
        grid_wait();
      }
      mbarrier_arrive_expect_tx(base, kTileBytes);
      tma_load(tile, &p.to, base, 0, 0);
    }
    mbarrier_wait(base, 0);
    sync_warp();
    grid_wait();
    return;
  }
  if (Fault == Grids::NobodyWaits) {
    if (!Broken) {
      grid_wait();
    }
    st_global(p.output + 128 + t, t);
    return;
  }
  if (Fault == Grids::NotHandedOn) {
    // One thread waits; another may read when that has told it.
    if (t == 0) {
      grid_wait();
    }
    if (!Broken) {
      sync_threads();
    }
  } else if (!Broken) {
    grid_wait();
  }
  if (Fault == Grids::OverwritesEarly) {
    st_global(p.scratch + t, t);
  } else {
    st_global(p.output + 128 + t, ld_global(p.output + t));
  }
  grid_wait();
}

// ---- wgmma ----

enum class Mma { NoFence, NoProxyFence, EarlyRelease, ReadInFlight, WriteInFlight, NoWait, Descriptors, NoFullWait };

template <Mma Fault, bool Broken>
void multiplying(const BugProblem p) {
  constexpr auto broken = [](Mma fault) { return Broken && Fault == fault; };
  const uint32_t base = shared_base(), a = base + 1024, b = a + kTileBytes;
  init_barriers(2, 1);
  if (Fault == Mma::NoProxyFence) {
    fill_tile(a, 128);
    fill_tile(b, 128);
    if (!Broken) {
      fence_async_shared();
    }
    sync_threads();
  } else {
    if (thread_rank() == 0) {
      mbarrier_arrive_expect_tx(base, 2 * kTileBytes);
      tma_load(a, &p.from, base, 0, 0);
      tma_load(b, &p.from, base, 0, 0);
    }
    sync_warp();
    // Only one warp forgets to wait.
    if (!broken(Mma::NoFullWait) || warp_rank() != 2) {
      mbarrier_wait(base, 0);
    }
  }
  float d[32] = {};
  if (!broken(Mma::NoFence)) {
    wgmma_fence(d);
  }
  const uint32_t shift = broken(Mma::Descriptors) && warp_rank() == 1 ? 32 : 0;
  wgmma<64, bf16>(d, k_major_descriptor(a + shift), k_major_descriptor(b), false);
  wgmma_commit();
  if (broken(Mma::WriteInFlight)) {
    d[3] = 1;
  }
  if (broken(Mma::ReadInFlight)) {
    st_global(p.output + thread_rank(), pack2<bf16>(d[0], d[1]));
  }
  if (Fault == Mma::EarlyRelease) {
    if (!Broken) {
      wgmma_wait<0>(d);
    }
    sync_threads();
    if (thread_rank() == 0) {
      load_tile(p, a, base + 16);
    }
    mbarrier_wait(base + 16, 0);
    sync_warp();
  }
  if (!broken(Mma::NoWait)) {
    wgmma_wait<0>(d);
    st_global(p.output + 128 * block_rank() + thread_rank(), pack2<bf16>(d[0], d[1]));
  }
}

// ---- Clusters ----

enum class Peer { LocalArrive, BlockScopeWait, OperandsArrive, EarlyExit, UnsyncedStart };

template <Peer Fault, bool Broken>
void reaching_across(const BugProblem) {
  constexpr auto broken = [](Peer fault) { return Broken && Fault == fault; };
  const uint32_t base = shared_base(), peer = cluster_rank() ^ 1;
  if (thread_rank() == 0) {
    mbarrier_init(base, 1);
    fence_barrier_init();
  }
  sync_warp();
  if (broken(Peer::UnsyncedStart)) {
    sync_threads();
  } else {
    cluster_sync();
  }
  if (thread_rank() == 0) {
    if (Fault == Peer::OperandsArrive) {
      st_cluster(map_to_rank(base + 16, peer), 1);
    }
    if (broken(Peer::LocalArrive)) {
      mbarrier_arrive(map_to_rank(base, peer));
    } else if (broken(Peer::OperandsArrive)) {
      mbarrier_arrive_operands(map_to_rank(base, peer));
    } else {
      mbarrier_arrive_cluster(map_to_rank(base, peer));
    }
  }
  // Rank 1 goes without its peer's word; only the barrier at the end holds it back.
  if (Fault != Peer::EarlyExit || cluster_rank() == 0) {
    broken(Peer::BlockScopeWait) ? mbarrier_wait(base, 0) : mbarrier_wait_cluster(base, 0);
  }
  if (Fault == Peer::OperandsArrive) {
    (void)ld_shared<uint32_t>(base + 16);
  }
  sync_warp();
  if (!broken(Peer::EarlyExit)) {
    cluster_sync();
  }
}

template <bool Broken>
void arrive_twice(const BugProblem) {
  cluster_arrive();
  if (Broken) {
    cluster_arrive();
  }
  cluster_wait();
}

// ---- Deadlocks ----

template <bool Broken>
void circular(const BugProblem) {
  const uint32_t base = shared_base();
  init_barriers(2, 1);
  if (thread_rank() == 0) {
    if (!Broken) {
      mbarrier_arrive(base + 16);
    }
    mbarrier_wait(base, 0);
    if (Broken) {
      mbarrier_arrive(base + 16);
    }
  } else if (thread_rank() == 32) {
    mbarrier_wait(base + 16, 0);
    mbarrier_arrive(base);
  }
}

// Work item i waits for item i - 1: by ticket any number of resident blocks will do, by block index counted from
// the end it will not.
template <bool Broken>
void static_order(const BugProblem p) {
  if (thread_rank() == 0) {
    const uint32_t item = Broken ? grid_blocks() - 1 - block_rank() : ticket_take(p.control + 4);
    flag_wait(p.control, item);
    flag_release_add(p.control, 1);
  }
}

template <bool Broken>
void register_shortage(const BugProblem) {
  if (warp_rank() < 4) {
    if (!Broken) {
      setmaxnreg_decrease<40>();
    }
  } else {
    setmaxnreg_increase<232>();
  }
}

template <bool Broken>
void uneven_registers(const BugProblem p) {
  if (!Broken || warp_rank() == 0) {
    setmaxnreg_decrease<64>();
  }
  multiplying<Mma::NoFence, false>(p);
}

struct Bug {
  const char* name;
  const char* rule;
  void (*right)(BugProblem);
  void (*broken)(BugProblem);
  LaunchShape shape = {1, 128, 1, 32 * 1024, 168};
  bool lanes_only = false;     // not a bug while a warp counts as one thread
  uint32_t resident = 0;
  void (*before)(BugProblem) = nullptr;   // a launch that those may begin beside
};

#define NLORA_BUG(name, rule, ...) {name, rule, &__VA_ARGS__ false >, &__VA_ARGS__ true > }

#define NLORA_PUBLISHING_BUG(name, rule, fault) \
  {name, rule, &publishing<Publish::fault, false>, &publishing<Publish::fault, true>, {2, 128, 1, 32 * 1024, 168}}

#define NLORA_GRIDS_BUG(name, rule, fault)                                                            \
  {name,  rule, &after<Grids::fault, false>, &after<Grids::fault, true>, {1, 128, 1, 32 * 1024, 168}, \
   false, 0,    &before<Grids::fault>}

const Bug kBugs[] = {
    NLORA_BUG("wrong_slot", "race|uninitialised read", wrong_slot <),
    {"refill_without_release",
     "race",
     &refill_without_release<false>,
     &refill_without_release<true>,
     {1, 64, 1, 32 * 1024, 168}},
    NLORA_BUG("too_few_bytes", "transaction bytes", wrong_byte_count < -16, ),
    NLORA_BUG("too_many_bytes", "transaction bytes", wrong_byte_count < 16, ),
    NLORA_BUG("one_arrival_too_many", "mbarrier arrivals", one_arrival_too_many <),
    NLORA_BUG("unfenced_barrier", "missing proxy fence", unfenced_barrier <),
    NLORA_BUG("barrier_before_init", "race|mbarrier not initialised", barrier_before_init <),
    NLORA_BUG("misaligned_tile", "alignment", misaligned_tile <),
    NLORA_BUG("invalid_map", "tensor map", invalid_map <),
    NLORA_BUG("exit_before_load", "exit with work in flight", exit_before_load <),
    NLORA_BUG("store_to_barrier", "control word", store_to_barrier <),
    NLORA_BUG("crowded_barriers", "control word", crowded_barriers <),
    NLORA_BUG("plain_flag_read", "control word", plain_flag_read <),
    NLORA_BUG("crowded_flags", "control word", crowded_flags <),
    {"flag_stored_over", "race", &flag_stored_over<false>, &flag_stored_over<true>, {2, 32, 1, 1024, 168}},
    {"flag_added_and_stored",
     "race",
     &flag_added_and_stored<false>,
     &flag_added_and_stored<true>,
     {2, 32, 1, 1024, 168}},
    NLORA_BUG("warps_race", "race|uninitialised read", warps_race <),
    {"lanes_race", "race|uninitialised read", &lanes_race<false>, &lanes_race<true>, {1, 128, 1, 1024, 168}, true},
    NLORA_BUG("never_written", "uninitialised read", never_written <),
    NLORA_BUG("beyond_shared", "out of bounds", beyond_shared <),
    NLORA_BUG("beyond_global", "out of bounds", beyond_global <),
    {"blocks_race", "race", &blocks_race<false>, &blocks_race<true>, {2, 64, 1, 1024, 168}},
    NLORA_BUG("half_a_warp", "divergent collective", half_a_warp <),
    NLORA_BUG("barrier_after_branch", "divergent collective", barrier_after_branch <),
    NLORA_BUG("changing_participants", "named barrier", changing_participants <),
    NLORA_BUG("differing_counts", "named barrier", differing_counts <),
    NLORA_BUG("cp_async_unwaited", "race", cp_async_unwaited <),
    NLORA_BUG("cp_async_unfenced", "missing proxy fence", cp_async_unfenced <),
    NLORA_BUG("no_fence_in_one_warp", "missing proxy fence", unfenced_staging < Fences::NotInWarp3, ),
    NLORA_BUG("fence_after_barrier", "missing proxy fence", unfenced_staging < Fences::OnlyAfterBarrier, ),
    NLORA_BUG("unordered_staging", "race|uninitialised read|missing proxy fence", unordered_staging <),
    NLORA_BUG("restaging", "race", restaging <),
    NLORA_BUG("wait_in_another_thread", "race", wait_in_another_thread <),
    NLORA_BUG("exit_before_store", "exit with work in flight", exit_before_store <),
    NLORA_PUBLISHING_BUG("read_wait_before_flag", "race", ReadWait),
    NLORA_PUBLISHING_BUG("relaxed_flag", "race", RelaxedFlag),
    NLORA_PUBLISHING_BUG("no_writer_fence", "missing proxy fence", NoWriterFence),
    NLORA_PUBLISHING_BUG("no_consumer_fence", "missing proxy fence", NoConsumerFence),
    NLORA_PUBLISHING_BUG("no_flag_wait", "race|uninitialised read", NoFlagWait),
    NLORA_GRIDS_BUG("no_grid_wait", "race|uninitialised read", NoWait),
    NLORA_GRIDS_BUG("early_overwrite", "race", OverwritesEarly),
    NLORA_GRIDS_BUG("early_load_by_tma", "race|uninitialised read", EarlyForTma),
    NLORA_GRIDS_BUG("nobody_waits", "grid dependency", NobodyWaits),
    NLORA_GRIDS_BUG("wait_not_handed_on", "race|uninitialised read", NotHandedOn),
    NLORA_BUG("no_wgmma_fence", "missing wgmma_fence", multiplying < Mma::NoFence, ),
    NLORA_BUG("wgmma_of_unfenced_writes", "missing proxy fence", multiplying < Mma::NoProxyFence, ),
    NLORA_BUG("early_release", "race", multiplying < Mma::EarlyRelease, ),
    NLORA_BUG("accumulator_read_in_flight", "accumulator in flight", multiplying < Mma::ReadInFlight, ),
    NLORA_BUG("accumulator_written_in_flight", "accumulator in flight", multiplying < Mma::WriteInFlight, ),
    NLORA_BUG("no_wgmma_wait", "exit with work in flight", multiplying < Mma::NoWait, ),
    NLORA_BUG("differing_descriptors", "descriptor", multiplying < Mma::Descriptors, ),
    NLORA_BUG("one_warp_does_not_wait", "race", multiplying < Mma::NoFullWait, ),
    {"local_arrive_at_peer",
     "scope",
     &reaching_across<Peer::LocalArrive, false>,
     &reaching_across<Peer::LocalArrive, true>,
     {2, 64, 2, 1024, 168}},
    {"block_scope_wait",
     "scope",
     &reaching_across<Peer::BlockScopeWait, false>,
     &reaching_across<Peer::BlockScopeWait, true>,
     {2, 64, 2, 1024, 168}},
    {"operands_arrive",
     "race",
     &reaching_across<Peer::OperandsArrive, false>,
     &reaching_across<Peer::OperandsArrive, true>,
     {2, 64, 2, 1024, 168}},
    {"early_exit",
     "exit before remote access",
     &reaching_across<Peer::EarlyExit, false>,
     &reaching_across<Peer::EarlyExit, true>,
     {2, 64, 2, 1024, 168}},
    {"unsynced_start",
     "race|mbarrier not initialised",
     &reaching_across<Peer::UnsyncedStart, false>,
     &reaching_across<Peer::UnsyncedStart, true>,
     {2, 64, 2, 1024, 168}},
    {"arrive_twice", "cluster barrier", &arrive_twice<false>, &arrive_twice<true>, {2, 64, 2, 1024, 168}},
    NLORA_BUG("circular", "deadlock", circular <),
    {"static_order", "deadlock", &static_order<false>, &static_order<true>, {4, 32, 1, 1024, 168}, false, 2},
    {"register_shortage", "deadlock", &register_shortage<false>, &register_shortage<true>, {1, 384, 1, 1024, 168}},
    NLORA_BUG("uneven_registers", "setmaxnreg", uneven_registers <),
};

#undef NLORA_BUG
#undef NLORA_GRIDS_BUG

void run_case(Context& context, const Bug& bug, bool broken) {
  std::vector<uint16_t> ones(64 * 64, 0x3F80);
  BugProblem p;
  p.input = static_cast<const uint32_t*>(context.input(ones.data(), kTileBytes));
  p.output = static_cast<uint32_t*>(context.output(4 * kTileBytes));
  p.scratch = static_cast<uint32_t*>(context.inout(ones.data(), 512));
  p.control = static_cast<uint32_t*>(context.control(64));
  p.from = tensor_map(p.input, 64, 64, 128, 64, 64, Swizzle::B128);
  p.to = tensor_map(p.output, 256, 64, 128, 64, 64, Swizzle::B128);
  p.bad = tensor_map(p.input, 64, 36, 72, 64, 64, Swizzle::B128);
  if (bug.resident) {
    context.setup.resident = bug.resident;
  }
  LaunchShape shape = bug.shape;
  if (bug.before) {
    context.launch(shape, bug.before, p);
    shape.waits = true;
  }
  context.launch(shape, broken ? bug.broken : bug.right, p);
}

}  // namespace

extern "C" int bug_count() { return int(std::size(kBugs)); }

// "name,rule or rules,1 if it needs lane clocks"
extern "C" void bug_text(int index, char* text, int size) {
  const auto& bug = kBugs[index];
  std::snprintf(text, size_t(size), "%s,%s,%d", bug.name, bug.rule, bug.lanes_only);
}

extern "C" int run_bug(int index, int broken, const Options* options, Outcome* outcome) {
  const auto& bug = kBugs[index];
  return guarded(*options, *outcome, [&](Context& context) { run_case(context, bug, broken != 0); });
}

}  // namespace nlora::cuda::tests
