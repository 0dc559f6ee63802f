// Shadow memory: every access is checked against all earlier ones that it overlaps.
#include "machine.h"

namespace nlora::cuda::emulator {

void Region::reset(uint8_t* base, size_t length, bool initialised) {
  bytes = base;
  size = length;
  cells.assign(read_only ? 0 : (length + 15) / 16, Cell{});
  for (Cell& cell : cells) {
    cell.initialised = initialised ? 0xFFFF : 0;
  }
}

Actor thread_actor(Site site) {
  Thread& thread = *machine->self;
  const Agent& agent = *thread.agent;
  return {{agent.id, agent.now(), 0, Proxy::Generic, 1, thread.block->number, site}, {&agent}, thread.block->number};
}

Actor async_actor(AgentId id, Time time, Proxy proxy, Site site) {
  Actor actor = thread_actor(site);
  actor.access.agent = id;
  actor.access.time = time;
  actor.access.proxy = proxy;
  return actor;
}

namespace {

std::string place(const Region& region, size_t offset) {
  return region.shared ? "shared memory at offset " + hex(offset) : "global memory at byte " + hex(offset);
}

void check_order(const Region& region, size_t offset, const Access& earlier, bool earlier_writes, const Actor& actor,
                 const char* verb) {
  const bool across_blocks = !region.shared && earlier.block != actor.block;
  const bool needs_fence =
      earlier_writes && actor.access.proxy == Proxy::Async && (earlier.proxy == Proxy::Generic || across_blocks);
  for (const Agent* agent : actor.agents) {
    const char* rule = nullptr;
    const char* why = "";
    if (!earlier.known_to(agent->known.seen)) {
      rule = "race";
      why = "nothing orders the two";
    } else if (needs_fence && region.shared && !earlier.known_to(agent->known.published)) {
      rule = "missing proxy fence";
      why = "the writer has no fence_async_shared() between the write and its next release";
    } else if (needs_fence && across_blocks && earlier.proxy == Proxy::Async &&
               !earlier.known_to(agent->known.published)) {
      rule = "missing proxy fence";
      why = "the storing thread has no fence_async_global() between its bulk_wait and its release";
    } else if (needs_fence && !region.shared && !earlier.known_to(agent->fenced_global)) {
      rule = "missing proxy fence";
      why = "the thread that issues the TMA access has no fence_async_global() after its acquire";
    }
    if (rule) {
      machine->fail(rule, std::string(actor.access.proxy == Proxy::Async ? "asynchronous " : "") + verb + " at " +
                              describe(actor.access.site) + " by " + describe(*machine->self) + " of " +
                              place(region, offset) + " against the " +
                              (earlier.proxy == Proxy::Async ? "asynchronous " : "") +
                              (earlier_writes ? "write" : "read") + " at " + describe(earlier.site) + " of " +
                              block_name(earlier.block) + ": " + why);
    }
  }
}

// Calls visit(cell, its offset, mask of the touched bytes) for each cell of the range.
template <class Visit>
void for_each_cell(Region& region, size_t offset, size_t bytes, Visit visit) {
  for (size_t at = offset; at < offset + bytes;) {
    const size_t end = std::min((at / 16 + 1) * 16, offset + bytes);
    visit(region.cells[at / 16], at, uint16_t(((1u << (end - at)) - 1) << (at % 16)));
    at = end;
  }
}

void check_no_control(const Region& region, const Cell& cell, size_t offset, const Actor& actor) {
  if (cell.control) {
    machine->fail("control word", "ordinary access at " + describe(actor.access.site) + " by " +
                                      describe(*machine->self) + " to " + place(region, offset) +
                                      ", whose 16 bytes hold an mbarrier, flag or ticket");
  }
}

}  // namespace

void check_read(Region& region, size_t offset, size_t bytes, const Actor& actor) {
  if (region.read_only) {
    return;
  }
  Access last_write{};
  for_each_cell(region, offset, bytes, [&](Cell& cell, size_t at, uint16_t mask) {
    check_no_control(region, cell, at, actor);
    if ((cell.initialised & mask) != mask) {
      machine->fail("uninitialised read", "read at " + describe(actor.access.site) + " by " + describe(*machine->self) +
                                              " of " + place(region, at) + ", which nothing has written");
    }
    for (const Access& earlier : cell.writes) {
      if ((earlier.bytes & mask) && !last_write.same_event(earlier)) {
        check_order(region, at, earlier, true, actor, "read");
        last_write = earlier;
      }
    }
    Access now = actor.access;
    now.bytes = mask;
    // A later write that is ordered after this read is ordered after the reads this reader knows of.
    auto covered = [&](const Access& e) {
      if ((e.bytes & ~mask) || actor.access.agents != e.agents) {
        return false;
      }
      return e.agent == now.agent || (actor.access.proxy == Proxy::Generic && e.known_to(actor.agents[0]->known.seen));
    };
    cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), covered), cell.reads.end());
    cell.reads.push_back(now);
  });
}

void check_write(Region& region, size_t offset, size_t bytes, const Actor& actor) {
  if (region.read_only) {
    machine->fail("out of bounds", "write at " + describe(actor.access.site) + " by " + describe(*machine->self) +
                                       " to a read-only buffer");
  }
  // Neighbouring cells mostly have the same history.
  Access last_read{}, last_write{};
  for_each_cell(region, offset, bytes, [&](Cell& cell, size_t at, uint16_t mask) {
    check_no_control(region, cell, at, actor);
    for (const Access& earlier : cell.reads) {
      if ((earlier.bytes & mask) && !last_read.same_event(earlier)) {
        check_order(region, at, earlier, false, actor, "write");
        last_read = earlier;
      }
    }
    for (const Access& earlier : cell.writes) {
      if ((earlier.bytes & mask) && !last_write.same_event(earlier)) {
        check_order(region, at, earlier, true, actor, "write");
        last_write = earlier;
      }
    }
    auto replaced = [&](const Access& e) { return (e.bytes & ~mask) == 0; };
    cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), replaced), cell.reads.end());
    cell.writes.erase(std::remove_if(cell.writes.begin(), cell.writes.end(), replaced), cell.writes.end());
    cell.writes.push_back(actor.access);
    cell.writes.back().bytes = mask;
    cell.initialised |= mask;
  });
}

SharedPlace shared_place(uint32_t address, size_t bytes, uint32_t alignment) {
  const uint32_t rank = (address >> kRankShift) - 1;
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  Cluster& cluster = *machine->self->block->cluster;
  if (rank >= cluster.blocks.size() || offset < kSharedStart || offset + bytes > cluster.blocks[rank]->shared.size) {
    machine->fail("out of bounds",
                  where() + ": shared address " + hex(address) + " + " + std::to_string(bytes) + " bytes");
  }
  if (address % alignment) {
    machine->fail("alignment",
                  where() + ": shared address " + hex(address) + " must be a multiple of " + std::to_string(alignment));
  }
  Block* block = cluster.blocks[rank].get();
  if (block->finished()) {
    machine->fail("exit before remote access",
                  where() + ": " + block_name(block->number) + " of the cluster has already ended");
  }
  return {block, offset};
}

Region& global_region(const void* address, size_t bytes) {
  const auto* first = static_cast<const uint8_t*>(address);
  for (Region& region : machine->global) {
    if (first >= region.bytes && first + bytes <= region.bytes + region.size) {
      return region;
    }
  }
  machine->fail("out of bounds", where() + ": " + std::to_string(bytes) + " bytes outside every buffer of the run");
}

}  // namespace nlora::cuda::emulator
