// Memory operations: plain loads and stores, cp.async, TMA loads and stores, proxy fences.
#include <cstring>

#include "layer.h"
#include "machine.h"

namespace nlora::cuda::emulator {

void issue(Groups& groups, Site site) {
  if (groups.agent == 0) {
    groups.agent = machine->new_agents(1);
  }
  groups.last_issue = site;
  groups.last_group = groups.open();
  ++groups.unfinished[groups.open()];
}

void finish(Groups& groups, Time group) {
  auto found = groups.unfinished.find(group);
  if (--found->second == 0) {
    groups.unfinished.erase(found);
  }
  machine->wake(groups.waiters);
}

void wait_groups(Groups& groups, uint32_t pending) {
  auto text = [](const void* object, uint32_t target) {
    return "group " + std::to_string(target) + " of " + std::to_string(static_cast<const Groups*>(object)->committed);
  };
  const Time target = groups.committed > pending ? groups.committed - pending : 0;
  while (!groups.finished(target)) {
    machine->block_on(groups.waiters, {text, &groups, target});
  }
  groups.known = std::max(groups.known, target);
  if (groups.agent) {
    machine->self->agent->known.seen.raise(groups.agent, groups.known);
  }
}

namespace {

// Physical place of a byte of a swizzled tile: the chunk number is xor-ed with the number of its 128-byte line.
uint32_t swizzle_address(uint32_t address, Swizzle mode) {
  const uint32_t line = address / 128 % 8;
  const uint32_t chunk = address / 16 % 8;
  const uint32_t chunks = mode == Swizzle::B128 ? 8 : mode == Swizzle::B64 ? 4 : mode == Swizzle::B32 ? 2 : 1;
  const uint32_t flips = line % chunks;
  return address / 128 * 128 + (chunk ^ flips) * 16 + address % 16;
}

// A box of a matrix at (row, column), of which the part inside the matrix exists in global memory.
struct Box {
  TensorMap map;
  int64_t row, column;

  uint32_t row_bytes() const { return map.box_columns * 2; }
  uint32_t bytes() const { return map.box_rows * row_bytes(); }

  // Calls visit(global address, first byte within the box row, bytes, box row) for each row that exists.
  template <class Visit>
  void for_each_row(Visit visit) const {
    const int64_t first = std::max<int64_t>(column, 0);
    const int64_t end = std::min<int64_t>(column + map.box_columns, int64_t(map.columns));
    for (int64_t r = 0; r < map.box_rows; ++r) {
      if (row + r >= 0 && row + r < int64_t(map.rows) && first < end) {
        visit(map.data + uint64_t(row + r) * map.row_bytes + first * 2, uint32_t(first - column) * 2,
              uint32_t(end - first) * 2, uint32_t(r));
      }
    }
  }

  // Box in memory order -> swizzled in shared memory, and back.
  void scatter(uint8_t* shared, uint32_t offset, const uint8_t* from) const {
    for (uint32_t at = 0; at < bytes(); at += 16) {
      std::memcpy(shared + swizzle_address(offset + at, map.swizzle), from + at, 16);
    }
  }

  void gather(const uint8_t* shared, uint32_t offset, uint8_t* to) const {
    for (uint32_t at = 0; at < bytes(); at += 16) {
      std::memcpy(to + at, shared + swizzle_address(offset + at, map.swizzle), 16);
    }
  }
};

// The rules of cuTensorMapEncodeTiled, and a whole number of swizzle rows.
void check_map(const TensorMap& map) {
  const uint32_t inner = map.box_columns * 2;
  const char* broken = nullptr;
  if (reinterpret_cast<uintptr_t>(map.data) % 16) {
    broken = "the address must be 16-byte aligned";
  } else if (map.row_bytes % 16 || map.row_bytes < map.columns * 2) {
    broken = "the row stride must be a multiple of 16 bytes and hold a row";
  } else if (map.box_rows == 0 || map.box_rows > 256 || map.box_columns == 0 || map.box_columns > 256) {
    broken = "box sides must be 1 to 256";
  } else if (inner % 16) {
    broken = "box rows must be a multiple of 16 bytes";
  } else if (map.swizzle != Swizzle::None && inner != swizzle_span(map.swizzle)) {
    broken = "box rows of a swizzled map must be as long as the swizzle";
  }
  if (broken) {
    machine->fail("tensor map", where() + ": " + broken);
  }
}

uint32_t box_alignment(Swizzle mode) { return mode == Swizzle::None ? 128 : 8 * swizzle_span(mode); }

void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row, uint32_t ranks,
              Site site) {
  check_map(*map);
  const Box box{*map, row, column};
  const uint32_t bytes = box.bytes();
  Block& own = *machine->self->block;
  const uint32_t own_bits = (own.cluster_rank + 1) << kRankShift;
  if ((to >> kRankShift) != (own_bits >> kRankShift) || (barrier >> kRankShift) != (own_bits >> kRankShift)) {
    machine->fail("out of bounds", where() + ": a TMA load names shared memory of its own block");
  }
  for (uint32_t rank = 0; rank < own.cluster->blocks.size(); ++rank) {
    if (!(ranks >> rank & 1)) {
      continue;
    }
    const uint32_t shift = ((rank + 1) << kRankShift) - own_bits;
    const SharedPlace at = shared_place(to + shift, bytes, box_alignment(map->swizzle));
    MBarrier& target = barrier_at(barrier + shift);
    if (!target.fenced) {
      machine->fail("missing proxy fence", where() + ": no fence_barrier_init() after the initialisation at " +
                                               describe(target.initialised.site));
    }
    const Time phase = target.phase;
    const Actor actor = async_actor(target.agent, phase + 1, Proxy::Async, site);
    check_write(at.block->shared, at.offset, bytes, actor);
    box.for_each_row([&](uint8_t* global, uint32_t, uint32_t length, uint32_t) {
      Region& region = global_region(global, length);
      check_read(region, size_t(global - region.bytes), length, actor);
    });
    if (at.block != &own) {
      note_remote_access(*at.block, actor.access, "multicast load");
    }
    // Until the data lands the slot holds NaN.
    std::memset(at.bytes(), 0xFF, bytes);
    target.in_flight += bytes;
    target.last_load = phase + 1;
    target.last_load_site = site;
    machine->later(machine->late(), [box, at, &target, phase, bytes, site] {
      std::vector<uint8_t> data(bytes, 0);
      box.for_each_row([&](uint8_t* global, uint32_t first, uint32_t length, uint32_t r) {
        std::memcpy(&data[r * box.row_bytes() + first], global, length);
      });
      box.scatter(at.block->shared.bytes, at.offset, data.data());
      complete_transaction(target, phase, bytes, site);
    });
  }
  if (ranks >> own.cluster->blocks.size()) {
    machine->fail("out of bounds", where() + ": multicast mask " + hex(ranks) + " names ranks outside the cluster");
  }
}

}  // namespace
}  // namespace nlora::cuda::emulator

namespace nlora::cuda {

using namespace emulator;

uint32_t thread_rank() { return machine->self->rank; }

uint32_t lane_rank() { return machine->self->lane; }

uint32_t warp_rank() { return machine->self->warp->rank; }

uint32_t block_rank() { return machine->self->block->rank; }

uint32_t grid_blocks() { return machine->self->block->grid->shape.blocks; }

uint32_t cluster_rank() { return machine->self->block->cluster_rank; }

uint32_t shared_base() { return map_to_rank(kSharedStart, cluster_rank()); }

uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  return (rank + 1) << kRankShift | (address & ((1u << kRankShift) - 1));
}

void load_shared(uint32_t address, void* value, uint32_t bytes, Site site) {
  machine->enter(site, "ld_shared", false);
  const SharedPlace at = shared_place(address, bytes, bytes);
  check_read(at.block->shared, at.offset, bytes, thread_actor(site));
  std::memcpy(value, at.bytes(), bytes);
}

void store_shared(uint32_t address, const void* value, uint32_t bytes, bool cluster, Site site) {
  machine->enter(site, cluster ? "st_cluster" : "st_shared", false);
  const SharedPlace at = shared_place(address, bytes, bytes);
  const Actor actor = thread_actor(site);
  if (at.block != machine->self->block) {
    if (!cluster) {
      machine->fail("scope", where() + ": shared memory of another block needs st_cluster");
    }
    note_remote_access(*at.block, actor.access, "store");
  }
  check_write(at.block->shared, at.offset, bytes, actor);
  std::memcpy(at.bytes(), value, bytes);
}

void load_global(const void* address, void* value, uint32_t bytes, Site site) {
  machine->enter(site, "ld_global", false);
  Region& region = global_region(address, bytes);
  check_read(region, size_t(static_cast<const uint8_t*>(address) - region.bytes), bytes, thread_actor(site));
  std::memcpy(value, address, bytes);
}

void store_global(void* address, const void* value, uint32_t bytes, Site site) {
  machine->enter(site, "st_global", false);
  Region& region = global_region(address, bytes);
  check_write(region, size_t(static_cast<uint8_t*>(address) - region.bytes), bytes, thread_actor(site));
  std::memcpy(address, value, bytes);
}

void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row, Site site) {
  machine->enter(site, "tma_load", false);
  load_box(to, map, barrier, column, row, 1u << cluster_rank(), site);
}

void tma_load_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                        uint16_t ranks, Site site) {
  machine->enter(site, "tma_load_multicast", false);
  load_box(to, map, barrier, column, row, ranks, site);
}

void tma_store(const TensorMap* map, uint32_t from, int32_t column, int32_t row, Site site) {
  machine->enter(site, "tma_store", false);
  check_map(*map);
  const Box box{*map, row, column};
  Thread* thread = machine->self;
  const SharedPlace at = shared_place(from, box.bytes(), box_alignment(map->swizzle));
  issue(thread->bulk_read, site);
  issue(thread->bulk_write, site);
  const Time group = thread->bulk_read.open();
  check_read(at.block->shared, at.offset, box.bytes(), async_actor(thread->bulk_read.agent, group, Proxy::Async, site));
  const Actor writer = async_actor(thread->bulk_write.agent, group, Proxy::Async, site);
  box.for_each_row([&](uint8_t* global, uint32_t, uint32_t length, uint32_t) {
    Region& region = global_region(global, length);
    check_write(region, size_t(global - region.bytes), length, writer);
  });
  ++thread->block->grid->stores;
  // Two steps: the source is free after the first, the result is visible after the second.
  machine->later(machine->late(), [box, at, thread, group] {
    auto data = std::make_shared<std::vector<uint8_t>>(box.bytes());
    box.gather(at.block->shared.bytes, at.offset, data->data());
    finish(thread->bulk_read, group);
    machine->later(machine->late(), [box, data, thread, group] {
      box.for_each_row([&](uint8_t* global, uint32_t first, uint32_t length, uint32_t r) {
        std::memcpy(global, data->data() + r * box.row_bytes() + first, length);
      });
      finish(thread->bulk_write, group);
      --thread->block->grid->stores;
      machine->advance_grid(*thread->block->grid);
    });
  });
}

void bulk_commit(Site site) {
  if (machine->enter(site, "bulk_commit", true)) {
    ++machine->self->bulk_read.committed;
    ++machine->self->bulk_write.committed;
  }
}

void wait_bulk(int pending, bool written, Site site) {
  if (!machine->enter(site, written ? "bulk_wait" : "bulk_wait_read", true)) {
    return;
  }
  wait_groups(machine->self->bulk_read, uint32_t(pending));
  if (written) {
    wait_groups(machine->self->bulk_write, uint32_t(pending));
  }
}

void fence_async_shared(Site site) {
  if (!machine->enter(site, "fence_async_shared", true)) {
    return;
  }
  Agent& agent = *machine->self->agent;
  agent.known.published.raise(agent.id, agent.now());
  const Groups& copies = machine->self->cp_async;
  if (copies.agent) {
    agent.known.published.raise(copies.agent, copies.known);
  }
  agent.tick();
}

void fence_async_global(Site site) {
  if (!machine->enter(site, "fence_async_global", true)) {
    return;
  }
  Agent& agent = *machine->self->agent;
  agent.fenced_global.join(agent.known.seen);
  const Groups& stores = machine->self->bulk_write;
  if (stores.agent) {
    agent.known.published.raise(stores.agent, stores.known);
  }
  agent.tick();
}

void cp_async(uint32_t to, const void* from, uint32_t bytes, Site site) {
  machine->enter(site, "cp_async", false);
  if (bytes > 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    machine->fail("alignment", where() + ": the source must be 16-byte aligned and bytes at most 16");
  }
  Thread* thread = machine->self;
  const SharedPlace at = shared_place(to, 16, 16);
  issue(thread->cp_async, site);
  const Time group = thread->cp_async.open();
  // Not of the bulk kind: these copies belong to the generic proxy.
  const Actor actor = async_actor(thread->cp_async.agent, group, Proxy::Generic, site);
  if (bytes) {
    Region& region = global_region(from, bytes);
    check_read(region, size_t(static_cast<const uint8_t*>(from) - region.bytes), bytes, actor);
  }
  check_write(at.block->shared, at.offset, 16, actor);
  std::memset(at.bytes(), 0xFF, 16);
  machine->later(machine->late(), [at, from, bytes, thread, group] {
    std::memset(at.bytes(), 0, 16);
    std::memcpy(at.bytes(), from, bytes);
    finish(thread->cp_async, group);
  });
}

void cp_async_commit(Site site) {
  if (machine->enter(site, "cp_async_commit", true)) {
    ++machine->self->cp_async.committed;
  }
}

void wait_cp_async(int pending, Site site) {
  if (machine->enter(site, "cp_async_wait", true)) {
    wait_groups(machine->self->cp_async, uint32_t(pending));
  }
}

}  // namespace nlora::cuda
