// Synchronisation: mbarriers, named and cluster barriers, flags and tickets.
#include "layer.h"
#include "machine.h"

namespace nlora::cuda::emulator {
namespace {

void complete_phase(MBarrier& barrier) {
  if (barrier.pending || barrier.tx) {
    return;
  }
  if (barrier.in_flight) {
    machine->fail("transaction bytes", "mbarrier " + hex(barrier.offset) + " of " + block_name(barrier.block->number) +
                                           " completes a phase with " + std::to_string(barrier.in_flight) +
                                           " bytes still to land: too few were expected, last arrival at " +
                                           describe(barrier.last_arrival));
  }
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.released = std::move(barrier.collecting);
  barrier.collecting.clear();
  machine->wake(barrier.waiters);
}

enum class Releases : uint8_t { Everything, Operands };

void arrive(MBarrier& barrier, Releases releases = Releases::Everything) {
  if (barrier.pending == 0) {
    machine->fail("mbarrier arrivals", where() + ": mbarrier " + hex(barrier.offset) + " already has all " +
                                           std::to_string(barrier.count) + " arrivals of this phase, the last at " +
                                           describe(barrier.last_arrival));
  }
  barrier.last_arrival = machine->self->site;
  Agent& agent = *machine->self->agent;
  if (releases == Releases::Everything) {
    agent.release_into(barrier.collecting);
  } else {
    barrier.collecting.seen.join(agent.known.seen, machine->operand_agents);
  }
  --barrier.pending;
  complete_phase(barrier);
}

std::string barrier_state(const void* object, uint32_t parity) {
  const auto& barrier = *static_cast<const MBarrier*>(object);
  return "mbarrier " + hex(barrier.offset) + " parity " + std::to_string(parity) + ", now in phase " +
         std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.tx) + " bytes missing";
}

void wait(uint32_t address, uint32_t parity, bool cluster_scope) {
  MBarrier& barrier = barrier_at(address);
  while ((barrier.phase & 1) == (parity & 1)) {
    machine->block_on(barrier.waiters,
                      {barrier_state, &barrier, parity, SpinRecord::kBarrier, barrier.offset - kSharedStart});
  }
  if (barrier.remote_arrivals && !cluster_scope) {
    machine->fail("scope", where() + ": other blocks arrive at this mbarrier, so the wait needs cluster scope");
  }
  Agent& agent = *machine->self->agent;
  agent.known.join(barrier.released);
  agent.known.seen.raise(barrier.agent, barrier.phase);
}

void join_waiters(const WaitList& waiters, const Knowledge& knowledge) {
  const Agent* last = nullptr;
  for (Thread* thread : waiters) {
    if (thread->agent != last) {
      thread->agent->known.join(knowledge);
    }
    last = thread->agent;
  }
}

std::string named_state(const void* object, uint32_t id) {
  const auto& barrier = *static_cast<const NamedBarrier*>(object);
  return "barrier " + std::to_string(id) + ", " + std::to_string(barrier.arrived) + " of " +
         std::to_string(barrier.expected) + " threads are here";
}

void arrive_named(uint32_t id, uint32_t threads, bool wait) {
  Thread& self = *machine->self;
  NamedBarrier& barrier = self.block->named[id];
  if (threads % kWarp || threads == 0 || threads > self.block->threads.size()) {
    machine->fail("named barrier",
                  where() + ": thread count must be whole warps of the block, got " + std::to_string(threads));
  }
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.first = self.site;
  } else if (barrier.expected != threads) {
    machine->fail("named barrier", where() + ": barrier " + std::to_string(id) + " for " + std::to_string(threads) +
                                       " threads, but " + describe(barrier.first) + " expects " +
                                       std::to_string(barrier.expected));
  }
  self.agent->release_into(barrier.collecting);
  barrier.warps |= 1u << self.warp->rank;
  if (++barrier.arrived < barrier.expected) {
    if (wait) {
      machine->block_on(barrier.waiters, {named_state, &barrier, id});
    }
    return;
  }
  if (uint32_t(__builtin_popcount(barrier.warps)) * kWarp != threads ||
      (barrier.participants && barrier.participants != barrier.warps)) {
    machine->fail("named barrier", where() + ": barrier " + std::to_string(id) + " was completed by warps " +
                                       hex(barrier.warps) + " (bit mask), earlier by " + hex(barrier.participants) +
                                       "; first arrival at " + describe(barrier.first));
  }
  barrier.participants = barrier.warps;
  if (wait) {
    self.agent->known.join(barrier.collecting);
  }
  join_waiters(barrier.waiters, barrier.collecting);
  barrier.collecting.clear();
  barrier.arrived = 0;
  barrier.warps = 0;
  machine->wake(barrier.waiters);
}

// Barrier instructions are aligned: the lanes of a warp arrive together.
void assemble_warp() {
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, nullptr, [](void**) {});
}

void arrive_user_barrier(uint32_t id, uint32_t threads, bool wait) {
  if (id == 0 || id >= kNamedBarriers) {
    machine->fail("named barrier", where() + ": id must be 1 to 15, got " + std::to_string(id));
  }
  assemble_warp();
  arrive_named(id, threads, wait);
}

std::string cluster_state(const void* object, uint32_t) {
  const auto& cluster = *static_cast<const Cluster*>(object);
  return "cluster barrier, " + std::to_string(cluster.arrived) + " of " + std::to_string(cluster.running_threads()) +
         " threads are here";
}

// The flag at `address`, which must have 16 bytes of a Control buffer to itself.
Flag& flag_at(const uint32_t* address) {
  Region& region = global_region(address, 4);
  const size_t offset = size_t(reinterpret_cast<const uint8_t*>(address) - region.bytes);
  if (region.read_only || !region.cells[offset / 16].control || offset % 16) {
    machine->fail("control word", where() + ": a flag or ticket must have 16 bytes of a Control buffer to itself");
  }
  return machine->flags[reinterpret_cast<uintptr_t>(address)];
}

std::string flag_state(const void* object, uint32_t target) {
  return "flag is " + std::to_string(*static_cast<const uint32_t*>(object)) + ", waits for " + std::to_string(target);
}

// Additions may come in any order; a store loses what it does not know of.
void write_flag(uint32_t* word, uint32_t value, bool store, Site site) {
  Flag& flag = flag_at(word);
  if ((store || flag.stored) && !flag.writer.known_to(machine->self->agent->known.seen)) {
    machine->fail("race", where() + ": the write of this flag at " + describe(flag.writer.site) +
                              " is not ordered before this one, and one of the two is a store");
  }
  flag.writer = thread_actor(site).access;
  flag.stored = store;
  machine->self->agent->release_into(flag.released);
  *word = store ? value : *word + value;
  machine->wake(flag.waiters);
}

}  // namespace

MBarrier& barrier_at(uint32_t address) {
  const SharedPlace at = shared_place(address, 8, 8);
  auto found = at.block->barriers.find(at.offset);
  if (found == at.block->barriers.end()) {
    machine->fail("mbarrier not initialised", where() + ": no mbarrier at " + hex(address));
  }
  MBarrier& barrier = found->second;
  if (!barrier.initialised.known_to(machine->self->agent->known.seen)) {
    machine->fail("race", where() + ": the mbarrier's initialisation at " + describe(barrier.initialised.site) +
                              " is not ordered before this use");
  }
  return barrier;
}

// The same of any block of the cluster, about to get an arrival.
MBarrier& anywhere(uint32_t address, Site site) {
  MBarrier& barrier = barrier_at(address);
  if (barrier.block != machine->self->block) {
    if (!barrier.fenced) {
      machine->fail("missing proxy fence", where() + ": no fence_barrier_init() after the initialisation at " +
                                               describe(barrier.initialised.site));
    }
    note_remote_access(*barrier.block, thread_actor(site).access, "mbarrier arrival");
  }
  return barrier;
}

void complete_transaction(MBarrier& barrier, Time phase, uint32_t bytes, Site issued) {
  if (barrier.phase != phase) {
    machine->fail("transaction bytes", "the load issued at " + describe(issued) + " lands on mbarrier " +
                                           hex(barrier.offset) + " after its phase has ended");
  }
  barrier.in_flight -= bytes;
  barrier.tx -= bytes;
  complete_phase(barrier);
}

void complete_cluster_barrier(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.running_threads()) {
    return;
  }
  cluster.arrived = 0;
  ++cluster.generation;
  cluster.released = std::move(cluster.collecting);
  cluster.collecting.clear();
  machine->wake(cluster.waiters);
}

void note_remote_access(Block& target, const Access& access, const char* what) {
  for (RemoteAccess& earlier : target.remote_accesses) {
    if (earlier.access.agent == access.agent && earlier.what == what) {
      earlier.access = access;
      return;
    }
  }
  target.remote_accesses.push_back({access, what});
}

}  // namespace nlora::cuda::emulator

namespace nlora::cuda {

using namespace emulator;

void mbarrier_init(uint32_t barrier, uint32_t arrivals, Site site) {
  if (!machine->enter(site, "mbarrier_init", true)) {
    return;
  }
  const SharedPlace at = shared_place(barrier, 8, 8);
  if (arrivals == 0 || arrivals >= 1u << 20) {
    machine->fail("mbarrier arrivals", where() + ": count must be 1 to 2^20 - 1, got " + std::to_string(arrivals));
  }
  const Actor actor = thread_actor(site);
  check_write(at.block->shared, at.offset, 8, actor);
  at.block->shared.cells[at.offset / 16].control = true;
  MBarrier& created = at.block->barriers[at.offset];
  created.offset = at.offset;
  created.block = at.block;
  created.count = created.pending = arrivals;
  created.agent = machine->new_agents(1);
  machine->operand_agents.push_back(created.agent);
  created.initialised = actor.access;
}

void fence_barrier_init(Site site) {
  if (!machine->enter(site, "fence_barrier_init", true)) {
    return;
  }
  Thread& self = *machine->self;
  for (auto& [offset, barrier] : self.block->barriers) {
    barrier.fenced |= barrier.initialised.agent == self.agent->id;
  }
}

void mbarrier_arrive(uint32_t barrier, Site site) {
  if (!machine->enter(site, "mbarrier_arrive", true)) {
    return;
  }
  MBarrier& target = barrier_at(barrier);
  if (target.block != machine->self->block) {
    machine->fail("scope", where() + ": an mbarrier of another block needs mbarrier_arrive_cluster");
  }
  arrive(target);
}

void mbarrier_arrive_cluster(uint32_t barrier, Site site) {
  if (machine->enter(site, "mbarrier_arrive_cluster", true)) {
    MBarrier& target = anywhere(barrier, site);
    target.remote_arrivals |= target.block != machine->self->block;
    arrive(target);
  }
}

void mbarrier_arrive_operands(uint32_t barrier, Site site) {
  if (machine->enter(site, "mbarrier_arrive_operands", true)) {
    arrive(anywhere(barrier, site), Releases::Operands);
  }
}

void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes, Site site) {
  if (!machine->enter(site, "mbarrier_arrive_expect_tx", true)) {
    return;
  }
  MBarrier& target = barrier_at(barrier);
  target.tx += bytes;
  if (target.tx >= 1 << 20) {
    machine->fail("transaction bytes",
                  where() + ": a phase can count at most 2^20 - 1 bytes, got " + std::to_string(target.tx));
  }
  arrive(target);
}

void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site) {
  if (machine->enter(site, "mbarrier_wait", true)) {
    wait(barrier, parity, false);
  }
}

void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity, Site site) {
  if (machine->enter(site, "mbarrier_wait_cluster", true)) {
    wait(barrier, parity, true);
  }
}

void sync_threads(Site site) {
  if (machine->enter(site, "sync_threads", true)) {
    // The compiler brings a warp together at __syncthreads.
    machine->self->path = 0;
    arrive_named(0, uint32_t(machine->self->block->threads.size()), true);
  }
}

void bar_sync(uint32_t id, uint32_t threads, Site site) {
  if (!machine->enter(site, "bar_sync", true)) {
    return;
  }
  arrive_user_barrier(id, threads, true);
}

void bar_arrive(uint32_t id, uint32_t threads, Site site) {
  if (!machine->enter(site, "bar_arrive", true)) {
    return;
  }
  arrive_user_barrier(id, threads, false);
}

void cluster_arrive(Site site) {
  if (!machine->enter(site, "cluster_arrive", true)) {
    return;
  }
  assemble_warp();
  Thread& self = *machine->self;
  Cluster& cluster = *self.block->cluster;
  if (self.at_cluster_barrier) {
    machine->fail("cluster barrier", where() + ": this thread has already arrived and not waited");
  }
  self.at_cluster_barrier = true;
  self.cluster_generation = cluster.generation;
  self.agent->release_into(cluster.collecting);
  ++cluster.arrived;
  complete_cluster_barrier(cluster);
}

void cluster_wait(Site site) {
  if (!machine->enter(site, "cluster_wait", true)) {
    return;
  }
  assemble_warp();
  Thread& self = *machine->self;
  Cluster& cluster = *self.block->cluster;
  if (!self.at_cluster_barrier) {
    machine->fail("cluster barrier", where() + ": this thread has not arrived");
  }
  while (cluster.generation == self.cluster_generation) {
    machine->block_on(cluster.waiters, {cluster_state, &cluster, 0});
  }
  self.at_cluster_barrier = false;
  self.agent->known.join(cluster.released);
}

void cluster_sync(Site site) {
  cluster_arrive(site);
  cluster_wait(site);
}

void grid_launch_dependents(Site site) {
  machine->enter(site, "grid_launch_dependents", false);
  Block& block = *machine->self->block;
  block.grid->launching_dependents += !block.launches_dependents;
  block.launches_dependents = true;
}

// What the grids before have done is complete then, and every proxy of this thread sees it.
void grid_wait(Site site) {
  if (!machine->enter(site, "grid_wait", true)) {
    return;
  }
  RunningGrid& grid = *machine->self->block->grid;
  if (!grid.prerequisite) {
    return;
  }
  grid.waits = true;
  auto text = [](const void* object, uint32_t) {
    const auto& before = *static_cast<const RunningGrid*>(object);
    return std::to_string(before.finished) + " of " + std::to_string(before.shape.blocks) + " blocks of grid " +
           std::to_string(before.number) + " have ended";
  };
  while (!grid.prerequisite->over()) {
    machine->block_on(grid.prerequisite->waiters, {text, grid.prerequisite, 0});
  }
  Agent& agent = *machine->self->agent;
  agent.known.seen.join(grid.prerequisite->at_end);
  agent.known.published.join(grid.prerequisite->at_end);
  agent.fenced_global.join(grid.prerequisite->at_end);
}

void flag_release_add(uint32_t* flag, uint32_t value, Site site) {
  if (machine->enter(site, "flag_release_add", true)) {
    write_flag(flag, value, false, site);
  }
}

void flag_release_store(uint32_t* flag, uint32_t value, Site site) {
  if (machine->enter(site, "flag_release_store", true)) {
    write_flag(flag, value, true, site);
  }
}

uint32_t flag_acquire(const uint32_t* flag, Site site) {
  machine->enter(site, "flag_acquire", false);
  machine->self->agent->known.join(flag_at(flag).released);
  return *flag;
}

void flag_wait(const uint32_t* flag, uint32_t target, Site site) {
  if (!machine->enter(site, "flag_wait", true)) {
    return;
  }
  Flag& state = flag_at(flag);
  while (*flag != target) {
    machine->block_on(state.waiters, {flag_state, flag, target, SpinRecord::kFlag, reinterpret_cast<uintptr_t>(flag)});
  }
  machine->self->agent->known.join(state.released);
}

uint32_t ticket_take(uint32_t* counter, Site site) {
  machine->enter(site, "ticket_take", false);
  Flag& state = flag_at(counter);
  const uint32_t ticket = (*counter)++;
  machine->wake(state.waiters);
  return ticket;
}

void ticket_reset(uint32_t* counter, Site site) {
  machine->enter(site, "ticket_reset", false);
  flag_at(counter);
  *counter = 0;
}

}  // namespace nlora::cuda
