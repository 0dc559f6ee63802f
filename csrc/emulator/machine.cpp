// Scheduler: runs fibers in random order, finishes asynchronous work late, reports deadlocks.
#include "machine.h"

#include <cstring>
#include <sstream>

namespace nlora::cuda::emulator {

Machine* machine = nullptr;

namespace {

const char* file_name(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return slash ? slash + 1 : site.file;
}

}  // namespace

std::string describe(Site site) { return std::string(file_name(site)) + ":" + std::to_string(site.line); }

std::string block_name(uint32_t number) {
  for (const RunningGrid& grid : machine->grids) {
    if (number < grid.first_block + grid.shape.blocks) {
      const std::string rank = "block " + std::to_string(number - grid.first_block);
      return machine->grids.size() == 1 ? rank : rank + " of grid " + std::to_string(grid.number);
    }
  }
  return "no block";
}

std::string describe(const Thread& thread) {
  return block_name(thread.block->number) + " warp " + std::to_string(thread.warp->rank) + " lane " +
         std::to_string(thread.lane);
}

std::string where() {
  const Thread& thread = *machine->self;
  return std::string(thread.operation) + " at " + describe(thread.site) + " by " + describe(thread);
}

std::string hex(uint64_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

uint32_t Cluster::running_threads() const {
  uint32_t count = 0;
  for (const auto& block : blocks) {
    count += uint32_t(block->threads.size()) - block->finished_threads;
  }
  return count;
}

Machine::Machine(const Run& setup, const std::vector<Grid>& shapes)
    : setup(setup), random(setup.seed * 0x9E3779B97F4A7C15ull + 1) {
  uint32_t blocks = 0;
  for (const Grid& shape : shapes) {
    RunningGrid* prerequisite = grids.empty() ? nullptr : &grids.back();
    grids.push_back({shape, prerequisite, uint32_t(grids.size()), blocks});
    blocks += shape.blocks;
  }
}

AgentId Machine::new_agents(AgentId count) {
  next_agent += count;
  return next_agent - count;
}

bool Machine::slow(const Thread& thread) const {
  const uint64_t id = uint64_t(thread.block->number) * 64 + thread.warp->rank;
  return ((id + slow_salt) * 0x9E3779B97F4A7C15ull >> 61) == 0;
}

bool Machine::enter(Site site, const char* operation, bool synchronises) {
  self->site = site;
  self->operation = operation;
  if (draw(16) == 0) {
    ready.push_back(self);
    self->fiber.suspend();
  }
  if (!synchronises) {
    return true;
  }
  if (setup.source.empty() || file_name(site) == setup.source) {
    report.synchronisation_lines.insert(site.line);
    if (site.line == setup.skipped_line) {
      return false;
    }
  }
  self->path = (self->path + uint64_t(site.line)) * 0x9E3779B97F4A7C15ull;
  return true;
}

void Machine::block_on(WaitList& list, Waiting waiting) {
  self->waiting = waiting;
  list.push_back(self);
  self->fiber.suspend();
}

void Machine::wake(WaitList& list) {
  ready.insert(ready.end(), list.begin(), list.end());
  list.clear();
}

void Machine::meet(Meeting& meeting, uint32_t count, uint32_t index, void* argument,
                   const std::function<void(void**)>& act, Convergence convergence) {
  Thread* thread = self;
  if (meeting.arrived == 0) {
    meeting.operation = thread->operation;
    meeting.site = thread->site;
  } else if (meeting.site.line != thread->site.line || meeting.operation != thread->operation) {
    fail("divergent collective",
         where() + ", while other lanes are in " + meeting.operation + " at " + describe(meeting.site));
  }
  if (thread->warp->finished_lanes > 0) {
    fail("divergent collective", where() + " after other lanes of the warp have exited");
  }
  if (convergence == Convergence::Needed) {
    const uint32_t warp = index / kWarp;
    if (!(meeting.warps_seen >> warp & 1)) {
      meeting.warps_seen |= 1u << warp;
      meeting.paths[warp] = thread->path;
    } else if (meeting.paths[warp] != thread->path) {
      fail("divergent collective",
           where() + ": the lanes of the warp came by different ways; sync_warp() " + "joins them");
    }
  }
  thread->path = 0;
  meeting.arguments[index] = argument;
  if (++meeting.arrived < count) {
    auto text = [](const void* object, uint32_t count) {
      return std::to_string(static_cast<const Meeting*>(object)->arrived) + " of " + std::to_string(count) +
             " lanes are here";
    };
    block_on(meeting.waiters, {text, &meeting, count});
    return;
  }
  act(meeting.arguments.data());
  meeting.arrived = 0;
  meeting.warps_seen = 0;
  wake(meeting.waiters);
}

// Leaves the failing fiber for good: the run ends here.
void Machine::fail(const char* rule, const std::string& text) {
  report.rule = rule;
  report.text = std::string(rule) + ": " + text + " [seed " + std::to_string(setup.seed) +
                (setup.lanes ? ", lane clocks" : ", warp clocks") + "]";
  if (self) {
    self->fiber.suspend();
  }
  throw report;
}

void Machine::thread_main() {
  machine->self->block->grid->shape.kernel();
  machine->finish_thread();
}

void Machine::launch_block(RunningGrid& grid, Cluster& cluster, uint32_t cluster_rank) {
  const Grid& shape = grid.shape;
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->cluster = &cluster;
  block->rank = grid.launched++;
  block->number = uint16_t(grid.first_block + block->rank);
  block->cluster_rank = cluster_rank;
  // Fresh shared memory holds NaN in every 16-bit and 32-bit float format.
  block->storage.assign(kSharedStart + shape.shared_bytes + 16, 0xFF);
  auto base = reinterpret_cast<uintptr_t>(block->storage.data());
  block->shared.shared = true;
  block->shared.reset(reinterpret_cast<uint8_t*>((base + 15) & ~uintptr_t(15)), kSharedStart + shape.shared_bytes,
                      false);
  const uint32_t warps = shape.threads / kWarp;
  const AgentId wgmma_agents = new_agents(warps);
  for (uint32_t w = 0; w < warps; ++w) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get();
    warp->rank = w;
    warp->registers = shape.registers;
    warp->own_agent.id = new_agents(1);
    warp->own_agent.tick();
    warp->wgmma.agent = wgmma_agents + w;
    operand_agents.push_back(warp->wgmma.agent);
    block->warps.push_back(std::move(warp));
    if (w % 4 == 0) {
      block->warpgroups.push_back(std::make_unique<Warpgroup>());
    }
  }
  for (uint32_t t = 0; t < shape.threads; ++t) {
    auto thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->warp = block->warps[t / kWarp].get();
    thread->rank = t;
    thread->lane = t % kWarp;
    thread->agent = &thread->warp->own_agent;
    if (setup.lanes) {
      thread->own_agent = std::make_unique<Agent>();
      thread->own_agent->id = new_agents(1);
      thread->own_agent->tick();
      thread->agent = thread->own_agent.get();
    }
    thread->fiber.start(&Machine::thread_main);
    ready.push_back(thread.get());
    block->threads.push_back(std::move(thread));
  }
  cluster.blocks.push_back(std::move(block));
}

// A dependent grid may start when every block before it has said so or has ended, and does so some time after that.
bool Machine::may_launch(RunningGrid& grid) {
  if (grid.launched == grid.shape.blocks) {
    return false;
  }
  if (grid.prerequisite && !grid.starts && grid.prerequisite->launching_dependents == grid.prerequisite->shape.blocks) {
    grid.starts = late();
    later(grid.starts, [] {});
  }
  return !grid.prerequisite || (grid.starts && grid.starts <= step);
}

void Machine::launch_clusters() {
  size_t blocks = 0;
  for (const auto& cluster : clusters) {
    blocks += cluster->blocks.size();
  }
  for (RunningGrid& grid : grids) {
    const uint32_t size = grid.shape.cluster;
    while (may_launch(grid) && (!setup.resident || blocks + size <= std::max(setup.resident, size))) {
      auto cluster = std::make_unique<Cluster>();
      for (uint32_t r = 0; r < size; ++r) {
        launch_block(grid, *cluster, r);
      }
      clusters.push_back(std::move(cluster));
      blocks += size;
    }
  }
}

// Finished blocks free their stacks and shared memory; their stores may still be on the way to global memory.
void Machine::retire_clusters() {
  auto running = [](const auto& cluster) { return cluster->running_threads() > 0; };
  auto first_done = std::stable_partition(clusters.begin(), clusters.end(), running);
  for (auto done = first_done; done != clusters.end(); ++done) {
    for (auto& block : (*done)->blocks) {
      block->shared = Region{};
      block->storage = {};
      for (auto& thread : block->threads) {
        thread->fiber.release();
      }
    }
    retired.push_back(std::move(*done));
  }
  clusters.erase(first_done, clusters.end());
}

// What a block leaves behind when its last thread ends: nothing may still read or write its shared memory.
void Machine::check_block_exit(Block& block) {
  for (const auto& [offset, barrier] : block.barriers) {
    if (block.at_exit[barrier.agent] < barrier.last_load) {
      fail("exit with work in flight", block_name(block.number) + " ends without a wait for the load issued at " +
                                           describe(barrier.last_load_site) + " on mbarrier " + hex(offset));
    }
  }
  for (const auto& remote : block.remote_accesses) {
    if (!remote.access.known_to(block.at_exit)) {
      fail("exit before remote access", block_name(block.number) + " may end before the " + remote.what + " from " +
                                            block_name(remote.access.block) + " at " + describe(remote.access.site) +
                                            " has reached it");
    }
  }
}

void Machine::finish_thread() {
  Thread& thread = *self;
  auto unwaited = [&](const Groups& groups, const char* what) {
    if (groups.unwaited()) {
      fail("exit with work in flight", std::string(what) + " issued at " + describe(groups.last_issue) + " by " +
                                           describe(thread) + " was never waited for");
    }
  };
  unwaited(thread.bulk_read, "the TMA store");
  unwaited(thread.cp_async, "the cp.async");
  unwaited(thread.warp->wgmma, "the wgmma");
  if (thread.warp->meeting.arrived) {
    fail("divergent collective", describe(thread) + " exits while other lanes wait in " +
                                     thread.warp->meeting.operation + " at " + describe(thread.warp->meeting.site));
  }
  Block& block = *thread.block;
  thread.finished = true;
  block.at_exit.join(thread.agent->known.seen);
  ++thread.warp->finished_lanes;
  RunningGrid& grid = *block.grid;
  grid.at_end.join(thread.agent->known.seen);
  if (thread.bulk_write.agent) {
    grid.at_end.raise(thread.bulk_write.agent, thread.bulk_write.last_group);
  }
  if (++block.finished_threads == block.threads.size()) {
    check_block_exit(block);
    ++grid.finished;
    grid.launching_dependents += !block.launches_dependents;
    advance_grid(grid);
  }
  complete_cluster_barrier(*block.cluster);
  thread.fiber.suspend();
}

void Machine::advance_grid(RunningGrid& grid) {
  if (!grid.over()) {
    return;
  }
  if (grid.prerequisite && !grid.waits) {
    fail("grid dependency", "grid " + std::to_string(grid.number) + " ends and no thread of it has come to " +
                                "grid_wait(): what follows it would not wait for grid " +
                                std::to_string(grid.prerequisite->number));
  }
  wake(grid.waiters);
}

// Nothing will happen any more, so the bound of some wait is the next event.
void Machine::trap_spin() {
  std::vector<const Thread*> spinning;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      for (const auto& thread : block->threads) {
        if (!thread->finished && thread->waiting.spin != SpinRecord::kNothing) {
          spinning.push_back(thread.get());
        }
      }
    }
  }
  if (spinning.empty()) {
    return;
  }
  const Thread& thread = *spinning[draw(spinning.size())];
  const Waiting& waiting = thread.waiting;
  SpinRecord record{waiting.spin,     uint32_t(thread.site.line), thread.block->rank, thread.rank,
                    waiting.argument, waiting.argument,           waiting.place,      {}};
  if (waiting.spin == SpinRecord::kFlag) {
    record.seen = *static_cast<const uint32_t*>(waiting.object);
  }
  const std::string name = std::string(kSpinName, ' ') + thread.site.file;
  std::memcpy(record.file, name.data() + name.size() - kSpinName, kSpinName);
  self = nullptr;
  fail("deadlock", record.text());
}

void Machine::deadlock() {
  if (setup.bounded) {
    trap_spin();
  }
  std::map<std::string, std::vector<uint32_t>> groups;
  std::string rule = "deadlock";
  self = nullptr;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      for (const auto& [offset, barrier] : block->barriers) {
        if (barrier.pending == 0 && barrier.tx != 0) {
          rule = "transaction bytes";
        }
      }
      for (const auto& thread : block->threads) {
        if (!thread->finished) {
          const Waiting& waiting = thread->waiting;
          groups[block_name(block->number) + " warp " + std::to_string(thread->warp->rank) + ": " + thread->operation +
                 " at " + describe(thread->site) + " (" + waiting.text(waiting.object, waiting.argument) + ")"]
              .push_back(thread->lane);
        }
      }
    }
  }
  uint32_t absent = 0;
  for (const RunningGrid& grid : grids) {
    absent += grid.shape.blocks - grid.launched;
  }
  std::string text =
      "nothing can run and nothing is in flight; " + std::to_string(absent) + " blocks are not resident yet; waiting:";
  for (const auto& [where, lanes] : groups) {
    text += "\n  " + where + (lanes.size() == kWarp ? "" : ", " + std::to_string(lanes.size()) + " lanes");
  }
  fail(rule.c_str(), text + "\n");
}

void Machine::loop() {
  while (report.rule.empty()) {
    retire_clusters();
    launch_clusters();
    ++step;
    self = nullptr;
    if (step % 256 == 0) {
      slow_salt = random();
    }
    while (!pending.empty() && pending.begin()->first <= step) {
      auto action = std::move(pending.begin()->second);
      pending.erase(pending.begin());
      action();
    }
    if (ready.empty()) {
      if (!pending.empty()) {
        step = pending.begin()->first - 1;
      } else if (clusters.empty()) {
        if (grids.back().launched == grids.back().shape.blocks) {
          return;
        }
      } else {
        deadlock();
      }
      continue;
    }
    size_t index = draw(ready.size());
    for (int tries = 0; tries < 6 && slow(*ready[index]); ++tries) {
      index = draw(ready.size());
    }
    self = ready[index];
    ready[index] = ready.back();
    ready.pop_back();
    self->fiber.resume();
  }
}

Report run(const Run& setup, const std::vector<Grid>& grids, std::vector<Buffer>& buffers) {
  auto invalid = [](const std::string& text) { throw std::invalid_argument(text); };
  for (const Grid& grid : grids) {
    if (grid.threads % kWarp || grid.threads == 0 || grid.threads > 1024) {
      invalid("threads must be a multiple of 32 up to 1024, got " + std::to_string(grid.threads));
    }
    if (grid.cluster == 0 || grid.cluster > 8 || grid.blocks % grid.cluster) {
      invalid("blocks must be a multiple of the cluster size (1 to 8), got " + std::to_string(grid.blocks) + " and " +
              std::to_string(grid.cluster));
    }
    if (grid.shared_bytes > kSharedLimit) {
      invalid("shared_bytes must be at most " + std::to_string(kSharedLimit) + ", got " +
              std::to_string(grid.shared_bytes));
    }
    if (grid.threads * grid.registers > kRegisterFile) {
      invalid("threads × registers must be at most " + std::to_string(kRegisterFile) + ", got " +
              std::to_string(grid.threads) + " × " + std::to_string(grid.registers));
    }
  }
  Machine current(setup, grids);
  for (const Buffer& buffer : buffers) {
    Region region;
    region.read_only = buffer.memory == Memory::Input;
    region.reset(static_cast<uint8_t*>(buffer.data), buffer.bytes, buffer.memory != Memory::Output);
    for (size_t i = 0; i < region.cells.size(); ++i) {
      region.cells[i].control = buffer.memory == Memory::Control;
      region.cells[i].initialised |= i < buffer.written.size() ? buffer.written[i] : 0;
    }
    current.global.push_back(std::move(region));
  }
  machine = &current;
  try {
    current.loop();
  } catch (const Report&) {
  }
  machine = nullptr;
  for (size_t b = 0; b < buffers.size(); ++b) {
    buffers[b].written.resize(current.global[b].cells.size());
    for (size_t i = 0; i < buffers[b].written.size(); ++i) {
      buffers[b].written[i] = current.global[b].cells[i].initialised;
    }
  }
  current.report.steps = current.step;
  return current.report;
}

}  // namespace nlora::cuda::emulator
