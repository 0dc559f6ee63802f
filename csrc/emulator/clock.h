// Vector clocks and shadow memory: who has done what, and who is known to know it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nlora::cuda::emulator {

// A line of kernel source, taken from the caller by default arguments.
struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

using AgentId = uint32_t;
using Time = uint32_t;

// Latest time seen of every agent; agents never heard of are at 0, and every access has time 1 or later.
class Clock {
 public:
  Time operator[](AgentId agent) const { return agent < times_.size() ? times_[agent] : 0; }

  void raise(AgentId agent, Time time) {
    if (agent >= times_.size()) {
      times_.resize(agent + 1, 0);
    }
    times_[agent] = std::max(times_[agent], time);
  }

  void join(const Clock& other) {
    if (other.times_.size() > times_.size()) {
      times_.resize(other.times_.size(), 0);
    }
    for (size_t i = 0; i < other.times_.size(); ++i) {
      times_[i] = std::max(times_[i], other.times_[i]);
    }
  }

  // Of these agents alone.
  void join(const Clock& other, const std::vector<AgentId>& agents) {
    for (AgentId agent : agents) {
      raise(agent, other[agent]);
    }
  }

  void clear() { times_.clear(); }

 private:
  std::vector<Time> times_;
};

// What travels along with a release and an acquire.
struct Knowledge {
  Clock seen;
  // Writes that their writers made visible to the async proxy: ordinary ones to shared memory, and TMA stores, of
  // which other blocks may read by TMA what has been fenced.
  Clock published;

  void join(const Knowledge& other) {
    seen.join(other.seen);
    published.join(other.published);
  }

  void clear() {
    seen.clear();
    published.clear();
  }
};

// Something with a program order of its own: a warp, or in lane mode a lane.
struct Agent {
  AgentId id = 0;
  Knowledge known;
  // Global accesses that this agent's own fence.proxy.async has ordered before its TMA accesses.
  Clock fenced_global;

  Time now() const { return known.seen[id]; }
  void tick() { known.seen.raise(id, now() + 1); }

  // Everything so far is in the released clock; what follows is not.
  void release_into(Knowledge& target) {
    target.join(known);
    tick();
  }
};

enum class Proxy : uint8_t { Generic, Async };

struct Access {
  AgentId agent;
  Time time;
  uint16_t bytes;   // one bit for each byte of the cell
  Proxy proxy;
  uint8_t agents;   // accesses of a warpgroup count for 4 agents with consecutive ids
  uint16_t block;
  Site site;

  bool known_to(const Clock& clock) const {
    for (AgentId i = 0; i < agents; ++i) {
      if (clock[agent + i] < time) {
        return false;
      }
    }
    return true;
  }

  bool same_event(const Access& o) const { return agent == o.agent && time == o.time && proxy == o.proxy; }
};

// State of 16 bytes of memory.
struct Cell {
  std::vector<Access> writes;
  std::vector<Access> reads;
  uint16_t initialised = 0;
  bool control = false;   // holds an mbarrier, a flag or a ticket
};

// Tracked memory: bytes with their cells. `read_only` memory is initialised, and reads of it leave no trace.
struct Region {
  uint8_t* bytes = nullptr;
  size_t size = 0;
  bool shared = false;
  bool read_only = false;
  std::vector<Cell> cells;

  void reset(uint8_t* base, size_t length, bool initialised);
};

}  // namespace nlora::cuda::emulator
