// How a run is set up and what it says.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace nlora::cuda::emulator {

struct Run {
  uint32_t resident = 0;      // blocks that run at the same time; 0 means all
  uint64_t seed = 0;
  bool bounded = false;       // waits that never end trap, as in builds with NLORA_BOUND_SPINS
  bool lanes = false;         // a clock for each lane rather than for each warp
  int skipped_line = 0;       // synchronisation calls of this line do nothing (mutation test)
  std::string source;         // file whose lines are meant, here and in the report; empty: any file
};

struct Report {
  std::string rule;   // empty: nothing to report
  std::string text;
  std::set<int> synchronisation_lines;   // of every synchronisation call that ran
  uint64_t steps = 0;

  explicit operator bool() const { return !rule.empty(); }
};

// Global memory that the kernel may touch: everything else is out of bounds. Input is never written, Output not
// read before it is written; Control holds flags and tickets, one in each 16 bytes.
enum class Memory { Input, Output, InOut, Control };

struct Buffer {
  void* data;
  size_t bytes;
  Memory memory;
  std::vector<uint16_t> written{};   // bytes of Output that earlier runs have written, a bit each for every 16
};

struct Grid {
  uint32_t blocks = 1;
  uint32_t threads = 128;   // of a block
  uint32_t cluster = 1;
  uint32_t shared_bytes = 0;
  uint32_t registers = 168;   // a thread's at the start of the kernel
  std::function<void()> kernel;
};

// Runs the kernel of each grid once per CUDA thread. Every grid but the first depends on the one before it by
// griddepcontrol: it may start early and run beside that. `data` of every buffer must be 16-byte aligned. The first
// broken rule ends the run; the same setup and seed give the same report. One run at a time in a process.
Report run(const Run& setup, const std::vector<Grid>& grids, std::vector<Buffer>& buffers);

}  // namespace nlora::cuda::emulator
