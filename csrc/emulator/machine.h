// The emulated machine: blocks, warps and threads, the scheduler's side of them, and what layer calls need of it.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>

#include "../cuda/common/spin.h"
#include "clock.h"
#include "fiber.h"
#include "report.h"

namespace nlora::cuda::emulator {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kWarpgroup = 128;
constexpr uint32_t kNamedBarriers = 16;
// Dynamic shared memory begins here, as on a device, where the system keeps the first kilobyte.
constexpr uint32_t kSharedStart = 1024;
constexpr uint32_t kSharedLimit = 227 * 1024;
constexpr uint32_t kRankShift = 24;
constexpr uint32_t kRegisterFile = 64 * 1024;

struct Thread;
struct Warp;
struct Block;
struct Cluster;
struct RunningGrid;

// What a thread is blocked on, put into words only when a deadlock is reported.
struct Waiting {
  std::string (*text)(const void* object, uint32_t argument) = nullptr;
  const void* object = nullptr;
  uint32_t argument = 0;
  SpinRecord::Kind spin = SpinRecord::kNothing;   // a wait that spins on a device, for what is at `place`
  uint64_t place = 0;
};

// Threads blocked on one object; they become ready together.
using WaitList = std::vector<Thread*>;

// Lanes of one collective instruction meet here; the last one acts for all.
struct Meeting {
  const char* operation = nullptr;
  Site site;
  uint32_t arrived = 0;
  std::array<void*, kWarpgroup> arguments{};
  std::array<uint64_t, kWarpgroup / kWarp> paths{};   // of each warp's first lane
  uint32_t warps_seen = 0;
  WaitList waiters;
};

// Aligned instructions want all lanes to arrive together: after a branch with synchronisation in it, sync_warp first.
enum class Convergence { Needed, NotNeeded };

// Groups of one asynchronous kind: operations join the open group, commit closes it, wait counts closed ones.
struct Groups {
  AgentId agent = 0;   // 0: unused so far
  Time committed = 0;
  Time known = 0;      // newest group whose completion a wait has established
  Time last_group = 0; // of the newest operation
  std::map<Time, uint32_t> unfinished;
  Site last_issue;
  WaitList waiters;

  Time open() const { return committed + 1; }
  bool finished(Time group) const { return unfinished.empty() || unfinished.begin()->first > group; }
  bool unwaited() const { return last_issue.line && known < last_group; }
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint32_t rank = 0;
  uint32_t lane = 0;
  Agent* agent = nullptr;
  std::unique_ptr<Agent> own_agent;   // lane mode
  Groups bulk_read, bulk_write, cp_async;
  bool at_cluster_barrier = false;
  Time cluster_generation = 0;
  bool finished = false;
  uint64_t path = 0;                  // synchronisation calls since its warp was last together, as a hash
  const char* operation = "";         // the layer call it is in
  Site site;
  Waiting waiting;
};

// Accumulators of a warpgroup while its wgmma operations own them: registers hold a NaN pattern meanwhile.
struct Accumulators {
  std::array<float*, kWarpgroup> registers;
  uint32_t columns;
  std::vector<float> values;   // 64 × columns, row-major
  std::array<Time, 4> last_group;
  std::array<bool, 4> written_back{};
};

// What those registers hold, and anything computed from them.
constexpr uint32_t kInFlight = 0x7FFADACC;

inline bool is_in_flight(float value) { return (__builtin_bit_cast(uint32_t, value) & 0x7FFFFFFF) == kInFlight; }

struct Warpgroup {
  Meeting meeting;
  std::vector<std::unique_ptr<Accumulators>> in_flight;
  uint64_t last_due = 0;
};

struct Warp {
  Block* block = nullptr;
  uint32_t rank = 0;
  Agent own_agent;   // warp mode
  Meeting meeting;
  Groups wgmma;
  bool wgmma_fenced = false;
  uint32_t registers = 0;
  uint32_t finished_lanes = 0;
};

struct MBarrier {
  uint32_t offset;
  Block* block;
  uint32_t count, pending;
  int64_t tx = 0;
  int64_t in_flight = 0;    // bytes of loads issued for this phase that have not landed
  Time phase = 0;           // completed phases
  Time last_load = 0;       // phase that the newest TMA load completes
  Site last_load_site;
  AgentId agent;            // the TMA loads that complete here; the time is the phase
  Access initialised;
  bool fenced = false;
  bool remote_arrivals = false;
  Site last_arrival;
  Knowledge collecting, released;
  WaitList waiters;
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;
  uint32_t warps = 0;         // of this generation
  uint32_t participants = 0;  // of every generation
  Site first;
  Knowledge collecting;
  WaitList waiters;
};

// A peer's access to this block's shared memory: it must be known to be over before this block ends.
struct RemoteAccess {
  Access access;
  const char* what;
};

struct Block {
  RunningGrid* grid = nullptr;
  Cluster* cluster = nullptr;
  uint32_t rank = 0;         // in the grid
  uint16_t number = 0;       // of the run
  bool launches_dependents = false;
  uint32_t cluster_rank = 0;
  std::vector<uint8_t> storage;
  Region shared;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::map<uint32_t, MBarrier> barriers;
  std::array<NamedBarrier, kNamedBarriers> named;
  uint32_t free_registers = 0;
  WaitList register_waiters;
  std::vector<RemoteAccess> remote_accesses;
  Clock at_exit;
  uint32_t finished_threads = 0;

  bool finished() const { return finished_threads == threads.size(); }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t arrived = 0;
  Time generation = 0;
  Knowledge collecting, released;
  WaitList waiters;

  uint32_t running_threads() const;
};

// A grid of the run. It is over when its blocks have ended and what they have stored has arrived.
struct RunningGrid {
  const Grid& shape;
  RunningGrid* prerequisite;       // null: what came before is over
  uint32_t number, first_block;    // of the run
  uint32_t launched = 0, finished = 0;     // blocks
  uint32_t launching_dependents = 0;       // blocks that did or have ended
  uint32_t stores = 0;             // on their way to global memory
  bool waits = false;              // some thread does, for the prerequisite
  uint64_t starts = 0;             // step from which its blocks are launched; 0: not decided yet
  Clock at_end{};                  // what it has done and known
  WaitList waiters{};

  bool over() const { return finished == shape.blocks && stores == 0; }
};

struct Flag {
  Knowledge released;
  WaitList waiters;
  Access writer{};       // of the last addition or store
  bool stored = false;   // it was a store
};

struct Machine {
  Machine(const Run& setup, const std::vector<Grid>& shapes);

  Run setup;
  Report report;
  std::mt19937_64 random;
  std::deque<RunningGrid> grids;
  uint64_t step = 0;
  Thread* self = nullptr;
  AgentId next_agent = 1;
  std::vector<AgentId> operand_agents;   // the TMA loads and wgmma of all blocks
  std::vector<std::unique_ptr<Cluster>> clusters, retired;
  std::vector<Region> global;
  std::unordered_map<uint64_t, Flag> flags;

  AgentId new_agents(AgentId count);
  uint64_t draw(uint64_t below) { return random() % below; }

  // When asynchronous work takes place: delays from the next step to after most other work.
  uint64_t late() { return step + 1 + draw(uint64_t(1) << draw(13)); }
  void later(uint64_t due, std::function<void()> action) { pending.emplace(due, std::move(action)); }

  // First thing in every layer call: maybe let others run. False if the mutation test deletes the call.
  bool enter(Site site, const char* operation, bool synchronises);
  void block_on(WaitList& list, Waiting waiting);
  void wake(WaitList& list);
  // Runs `act(arguments of all lanes)` when the last of `count` lanes arrives; the others wait for it.
  void meet(Meeting& meeting, uint32_t count, uint32_t index, void* argument, const std::function<void(void**)>& act,
            Convergence convergence = Convergence::Needed);
  [[noreturn]] void fail(const char* rule, const std::string& text);

  // A TMA store of a grid has arrived, or one of its blocks has ended.
  void advance_grid(RunningGrid& grid);

  void loop();

 private:
  std::vector<Thread*> ready;
  std::multimap<uint64_t, std::function<void()>> pending;
  uint64_t slow_salt = 0;

  void launch_block(RunningGrid& grid, Cluster& cluster, uint32_t cluster_rank);
  bool may_launch(RunningGrid& grid);
  void launch_clusters();
  void retire_clusters();
  void finish_thread();
  void check_block_exit(Block& block);
  [[noreturn]] void deadlock();
  void trap_spin();
  bool slow(const Thread& thread) const;
  static void thread_main();
};

extern Machine* machine;

std::string describe(Site site);
// A block of the run by its number.
std::string block_name(uint32_t number);
std::string describe(const Thread& thread);
std::string hex(uint64_t value);
// The layer call in progress: its name, line and thread.
std::string where();

// ---- Memory (memory.cpp) ----

// Who reads or writes: the identity that goes into the shadow, and all agents that must know of earlier accesses.
struct Actor {
  Access access;   // without bytes
  std::vector<const Agent*> agents;
  uint16_t block;
};

Actor thread_actor(Site site);
// The asynchronous agent `id` at `time`, acting on behalf of the calling thread.
Actor async_actor(AgentId id, Time time, Proxy proxy, Site site);

void check_read(Region& region, size_t offset, size_t bytes, const Actor& actor);
void check_write(Region& region, size_t offset, size_t bytes, const Actor& actor);

// The block and offset behind a 32-bit shared address; fails if [address, address + bytes) is out of bounds.
struct SharedPlace {
  Block* block;
  uint32_t offset;

  uint8_t* bytes() const { return block->shared.bytes + offset; }
};

SharedPlace shared_place(uint32_t address, size_t bytes, uint32_t alignment);
Region& global_region(const void* address, size_t bytes);

// ---- Barriers (sync.cpp) ----

// An initialised mbarrier that the calling thread knows to be so.
MBarrier& barrier_at(uint32_t address);
// Lands `bytes` of a load that was issued for `phase`.
void complete_transaction(MBarrier& barrier, Time phase, uint32_t bytes, Site issued);
void complete_cluster_barrier(Cluster& cluster);
void note_remote_access(Block& target, const Access& access, const char* what);

// ---- Asynchronous groups (async.cpp) ----

void issue(Groups& groups, Site site);
void finish(Groups& groups, Time group);
// Blocks until all but the newest `pending` groups are done; they are then known to the calling agent.
void wait_groups(Groups& groups, uint32_t pending);

}  // namespace nlora::cuda::emulator
