// wgmma: operands as their descriptors give them, accumulators that are out of reach until the wait.
#include <cstring>

#include "layer.h"
#include "machine.h"

namespace nlora::cuda::emulator {
namespace {

// One lane's part of a warpgroup's wgmma.
struct WgmmaCall {
  Thread* thread;
  float* d;
  int columns;
  bool is_bf16;
  Major major_a, major_b;
  uint64_t a, b;
  bool accumulate;

  bool same_as(const WgmmaCall& o) const {
    return columns == o.columns && is_bf16 == o.is_bf16 && major_a == o.major_a && major_b == o.major_b && a == o.a &&
           b == o.b && accumulate == o.accumulate;
  }
};

// An operand in shared memory as its descriptor gives it: 16-byte chunks of 8 elements along the contiguous dimension.
struct Operand {
  std::vector<uint32_t> chunks;   // offsets in shared memory
  uint32_t extent;                // rows of A or columns of B
  Major major;

  Operand(uint64_t descriptor, uint32_t extent, Major major) : extent(extent), major(major) {
    const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
    const auto mode = uint32_t(descriptor >> 62);
    if (descriptor >> 49 & 7) {
      machine->fail("descriptor", where() + ": base offset must be 0: align the tile to 1024 bytes");
    }
    // Chunks of a swizzled row, and how many address bits take part in the xor.
    const uint32_t width = mode == 0 ? 1 : 16 >> mode;
    auto place = [&](uint32_t row_in_8, uint32_t group_of_8, uint32_t chunk) {
      uint32_t address = start + row_in_8 * width * 16 + chunk % width * 16;
      if (mode == 0) {
        address += major == Major::K ? group_of_8 * stride + chunk * leading : group_of_8 * leading + chunk * stride;
      } else {
        address += group_of_8 * stride + chunk / width * leading;
      }
      return address ^ (address >> 7 & (width - 1)) << 4;
    };
    if (major == Major::K) {
      for (uint32_t row = 0; row < extent; ++row) {
        for (uint32_t chunk = 0; chunk < 2; ++chunk) {
          chunks.push_back(place(row % 8, row / 8, chunk));
        }
      }
    } else {
      for (uint32_t k = 0; k < 16; ++k) {
        for (uint32_t chunk = 0; chunk < extent / 8; ++chunk) {
          chunks.push_back(place(k % 8, k / 8, chunk));
        }
      }
    }
  }

  void check(Region& shared, const Actor& actor) const {
    for (uint32_t at : chunks) {
      if (at < kSharedStart || at + 16 > shared.size) {
        machine->fail("out of bounds", where() + ": the descriptor reaches shared offset " + hex(at));
      }
      check_read(shared, at, 16, actor);
    }
  }

  // values[k * extent + row]
  std::vector<float> values(const uint8_t* shared, bool is_bf16) const {
    std::vector<float> out(16 * extent);
    for (uint32_t c = 0; c < chunks.size(); ++c) {
      uint16_t bits[8];
      std::memcpy(bits, shared + chunks[c], 16);
      for (uint32_t e = 0; e < 8; ++e) {
        const uint32_t k = major == Major::K ? c % 2 * 8 + e : c / (extent / 8);
        const uint32_t row = major == Major::K ? c / 2 : c % (extent / 8) * 8 + e;
        out[k * extent + row] = widen(bits[e], is_bf16);
      }
    }
    return out;
  }
};

// Position in the 64 × columns tile of register i of lane `lane` (0 to 127): pairs of columns, then the row 8
// below, then the next 8 columns.
size_t tile_index(uint32_t lane, uint32_t i, uint32_t columns) {
  const uint32_t quad = lane % 32 / 4, row = lane / 32 * 16 + quad + (i % 4 >= 2 ? 8 : 0);
  return size_t(row) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

void take_registers(Accumulators& tile, uint32_t warp) {
  for (uint32_t lane = warp * kWarp; lane < (warp + 1) * kWarp; ++lane) {
    for (uint32_t i = 0; i < tile.columns / 2; ++i) {
      tile.values[tile_index(lane, i, tile.columns)] = tile.registers[lane][i];
      tile.registers[lane][i] = __builtin_bit_cast(float, kInFlight);
    }
  }
  tile.written_back[warp] = false;
}

void give_registers_back(Accumulators& tile, uint32_t warp) {
  for (uint32_t lane = warp * kWarp; lane < (warp + 1) * kWarp; ++lane) {
    for (uint32_t i = 0; i < tile.columns / 2; ++i) {
      if (!is_in_flight(tile.registers[lane][i])) {
        machine->fail("accumulator in flight",
                      where() + ": register " + std::to_string(i) + " of an accumulator was written before the wait");
      }
      tile.registers[lane][i] = tile.values[tile_index(lane, i, tile.columns)];
    }
  }
  tile.written_back[warp] = true;
}

void multiply(Accumulators& tile, const Operand& a, const Operand& b, const uint8_t* shared, bool is_bf16,
              bool accumulate) {
  const std::vector<float> left = a.values(shared, is_bf16), right = b.values(shared, is_bf16);
  const uint32_t columns = tile.columns;
  for (uint32_t row = 0; row < 64; ++row) {
    float* out = &tile.values[size_t(row) * columns];
    if (!accumulate) {
      std::fill(out, out + columns, 0.0f);
    }
    for (uint32_t k = 0; k < 16; ++k) {
      const float factor = left[k * 64 + row];
      const float* in = &right[k * columns];
      for (uint32_t column = 0; column < columns; ++column) {
        out[column] += factor * in[column];
      }
    }
  }
}

void issue_for_warpgroup(void** arguments, Site site) {
  auto& first = *static_cast<WgmmaCall*>(arguments[0]);
  Block& block = *first.thread->block;
  const uint32_t group_index = first.thread->warp->rank / 4;
  Warpgroup& group = *block.warpgroups[group_index];
  std::array<Warp*, 4> warps;
  Actor actor = thread_actor(site);
  actor.agents.clear();
  for (uint32_t w = 0; w < 4; ++w) {
    warps[w] = block.warps[group_index * 4 + w].get();
    if (!warps[w]->wgmma_fenced) {
      machine->fail("missing wgmma_fence", where() + ": no wgmma_fence() since the last commit");
    }
    if (warps[w]->registers != warps[0]->registers) {
      machine->fail("setmaxnreg", where() + ": the warps of this warpgroup have different register counts");
    }
  }
  for (uint32_t lane = 0; lane < kWarpgroup; ++lane) {
    auto& call = *static_cast<WgmmaCall*>(arguments[lane]);
    if (!call.same_as(first)) {
      machine->fail("descriptor", where() + ": descriptors and modes must be the same in all 128 threads");
    }
    if (lane % kWarp == 0 || machine->setup.lanes) {
      actor.agents.push_back(call.thread->agent);
    }
  }
  // Reads count for all four warps: a slot is free only when each of them has waited. Registers of all warps
  // count as one object, owned by the operation until its warp waits.
  actor.access.agent = warps[0]->wgmma.agent;
  actor.access.agents = 4;
  actor.access.time = warps[0]->wgmma.open();
  actor.access.proxy = Proxy::Async;
  auto a = std::make_shared<Operand>(first.a, 64, first.major_a);
  auto b = std::make_shared<Operand>(first.b, uint32_t(first.columns), first.major_b);
  a->check(block.shared, actor);
  b->check(block.shared, actor);

  Accumulators* tile = nullptr;
  for (auto& candidate : group.in_flight) {
    tile = candidate->registers[0] == first.d ? candidate.get() : tile;
  }
  if (!tile) {
    group.in_flight.push_back(std::make_unique<Accumulators>());
    tile = group.in_flight.back().get();
    tile->columns = uint32_t(first.columns);
    tile->values.resize(64 * size_t(first.columns));
    tile->written_back.fill(true);
  }
  if (tile->columns != uint32_t(first.columns)) {
    machine->fail("accumulator in flight", where() + ": these registers belong to a wgmma of another width");
  }
  std::array<Time, 4> times;
  for (uint32_t w = 0; w < 4; ++w) {
    for (uint32_t lane = w * kWarp; lane < (w + 1) * kWarp; ++lane) {
      tile->registers[lane] = static_cast<WgmmaCall*>(arguments[lane])->d;
    }
    if (tile->written_back[w]) {
      take_registers(*tile, w);
    }
    issue(warps[w]->wgmma, site);
    times[w] = tile->last_group[w] = warps[w]->wgmma.open();
  }
  group.last_due = std::max(group.last_due, machine->late());
  const WgmmaCall call = first;
  const uint8_t* shared = block.shared.bytes;
  machine->later(group.last_due, [=] {
    multiply(*tile, *a, *b, shared, call.is_bf16, call.accumulate);
    for (uint32_t w = 0; w < 4; ++w) {
      finish(warps[w]->wgmma, times[w]);
    }
  });
}

void wait_for_warp(int pending) {
  Warp& warp = *machine->self->warp;
  wait_groups(warp.wgmma, uint32_t(pending));
  auto& in_flight = warp.block->warpgroups[warp.rank / 4]->in_flight;
  for (size_t t = 0; t < in_flight.size();) {
    Accumulators& tile = *in_flight[t];
    if (!tile.written_back[warp.rank % 4] && tile.last_group[warp.rank % 4] <= warp.wgmma.known) {
      give_registers_back(tile, warp.rank % 4);
    }
    const bool done = tile.written_back[0] && tile.written_back[1] && tile.written_back[2] && tile.written_back[3];
    done ? void(in_flight.erase(in_flight.begin() + long(t))) : void(++t);
  }
}

}  // namespace
}  // namespace nlora::cuda::emulator

namespace nlora::cuda {

using namespace emulator;

void fence_accumulators(Site site) {
  if (!machine->enter(site, "wgmma_fence", true)) {
    return;
  }
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, nullptr, [&](void**) { self.warp->wgmma_fenced = true; });
}

void issue_wgmma(float* d, int columns, bool is_bf16, Major major_a, Major major_b, uint64_t a, uint64_t b,
                 bool accumulate, Site site) {
  machine->enter(site, "wgmma", false);
  Thread& self = *machine->self;
  const uint32_t group = self.warp->rank / 4;
  if (self.block->threads.size() < (group + 1) * kWarpgroup) {
    machine->fail("divergent collective", where() + ": wgmma needs a whole warpgroup of 4 warps");
  }
  WgmmaCall call{&self, d, columns, is_bf16, major_a, major_b, a, b, accumulate};
  machine->meet(self.block->warpgroups[group]->meeting, kWarpgroup, self.rank % kWarpgroup, &call,
                [site](void** calls) { issue_for_warpgroup(calls, site); });
}

void wgmma_commit(Site site) {
  if (!machine->enter(site, "wgmma_commit", true)) {
    return;
  }
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, nullptr, [&](void**) {
    ++self.warp->wgmma.committed;
    self.warp->wgmma_fenced = false;
  });
}

void wait_wgmma(int pending, Site site) {
  if (!machine->enter(site, "wgmma_wait", true)) {
    return;
  }
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, nullptr, [&](void**) { wait_for_warp(pending); });
  self.agent->known.seen.raise(self.warp->wgmma.agent, self.warp->wgmma.known);
}

}  // namespace nlora::cuda
