// Host side of csrc/cuda/common/context.cuh on the emulator: "device" memory is host memory the run knows about.
#pragma once

#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "../cuda/common/states.h"
#include "layer.h"
#include "report.h"

namespace nlora::cuda {

struct LaunchShape {
  uint32_t grid, block, cluster, shared_bytes, registers;
  bool waits = false;   // the kernel comes to grid_wait(), so it may begin before the launch before it is over
};

class Context {
 public:
  // Where and how later launches run.
  emulator::Run setup;
  // Of the launches that are over, with the lines of all; a launch after a report does nothing.
  emulator::Report report;

  void* input(const void* from, size_t bytes) { return add(from, bytes, emulator::Memory::Input); }
  void* inout(const void* from, size_t bytes) { return add(from, bytes, emulator::Memory::InOut); }
  void* output(size_t bytes) { return add(nullptr, bytes, emulator::Memory::Output); }
  // Zeroed, or a copy.
  void* control(size_t bytes, const void* from = nullptr) { return add(from, bytes, emulator::Memory::Control); }
  void fetch(void* to, const void* from, size_t bytes) {
    finish();
    std::memcpy(to, from, bytes);
  }
  // Of the device that this stands for.
  int architecture = 90;
  uint32_t processors() const { return 4; }
  // No two contexts have the same.
  const int id = next_id();
  std::string name() const { return "emulator"; }

  template <class Parameters>
  void launch(const LaunchShape& shape, void (*kernel)(Parameters), const Parameters& parameters) {
    // NOTE: devices before sm_90 know no grids that begin early.
    if (!shape.waits || architecture < 90) {
      finish();
    }
    grids_.push_back({shape.grid, shape.block, shape.cluster, shape.shared_bytes, shape.registers,
                      [kernel, parameters] { kernel(parameters); }});
  }

  // Runs what has been launched to its end.
  void finish() {
    const auto grids = std::move(grids_);
    grids_.clear();
    if (grids.empty() || report) {
      return;
    }
    auto lines = std::move(report.synchronisation_lines);
    report = emulator::run(setup, grids, buffers_);
    report.synchronisation_lines.merge(lines);
  }

 private:
  static int next_id() {
    static int last = 0;
    return ++last;
  }

  // Output starts as NaN in every float format, control words as 0.
  void* add(const void* from, size_t bytes, emulator::Memory memory) {
    storage_.emplace_back((bytes + 127) / 128);
    void* data = storage_.back().data();
    std::memset(data, memory == emulator::Memory::Output ? 0xFF : 0, bytes);
    if (from) {
      std::memcpy(data, from, bytes);
    }
    buffers_.push_back({data, bytes, memory});
    return data;
  }

  struct alignas(128) Line {
    uint8_t bytes[128];
  };
  std::deque<std::vector<Line>> storage_;
  std::vector<emulator::Buffer> buffers_;
  std::vector<emulator::Grid> grids_;
};

// Launches on a context, which takes the place of a stream.
class Stream {
 public:
  Stream(int, void* context) : context_(*static_cast<Context*>(context)) { context_.finish(); }

  uint32_t processors() const { return context_.processors(); }
  int architecture() const { return context_.architecture; }
  Sequence sequence() const { return {&context_}; }
  void* allocate_zeroed(size_t bytes) const { return context_.control(bytes); }

  template <class Parameters>
  void launch(const LaunchShape& shape, void (*kernel)(Parameters), const Parameters& parameters) {
    context_.launch(shape, kernel, parameters);
  }

 private:
  Context& context_;
};

inline TensorMap tensor_map(const void* data, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows,
                            uint32_t box_columns, Swizzle swizzle) {
  auto bytes = static_cast<uint8_t*>(const_cast<void*>(data));
  return {bytes, rows, columns, row_bytes, box_rows, box_columns, swizzle};
}

}  // namespace nlora::cuda
