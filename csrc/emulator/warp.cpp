// Instructions of one warp: election, shuffles, register counts, ldmatrix, stmatrix, mma.sync, conversions.
#include <cmath>
#include <cstring>

#include "layer.h"
#include "machine.h"

namespace nlora::cuda::emulator {
namespace {

// Runs `act(lane, argument)` for all lanes of the warp in turn, each under its own identity.
template <class Act>
void for_all_lanes(void* argument, Convergence convergence, Act act) {
  Thread* self = machine->self;
  machine->meet(
      self->warp->meeting, kWarp, self->lane, argument,
      [&](void** arguments) {
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          machine->self = self->block->threads[self->warp->rank * kWarp + lane].get();
          act(lane, arguments);
        }
        machine->self = self;
      },
      convergence);
}

struct MatrixCall {
  uint32_t row;
  uint32_t* r;
};

// Register and half that hold element (row, column) of an 8×8 matrix: 4 lanes a row, two columns each.
uint32_t holder(uint32_t row, uint32_t column, bool transposed) {
  return transposed ? column * 4 + row / 2 : row * 4 + column / 2;
}

void set_registers(uint32_t registers, bool increase) {
  Warp& warp = *machine->self->warp;
  Block& block = *warp.block;
  if (increase ? registers < warp.registers : registers > warp.registers) {
    machine->fail("setmaxnreg", where() + ": from " + std::to_string(warp.registers) + " to " +
                                    std::to_string(registers) + " registers");
  }
  if (!increase) {
    block.free_registers += (warp.registers - registers) * kWarp;
    machine->wake(block.register_waiters);
  }
  auto text = [](const void* object, uint32_t needed) {
    return std::to_string(static_cast<const Block*>(object)->free_registers) + " of " + std::to_string(needed) +
           " registers are free";
  };
  const uint32_t needed = increase ? (registers - warp.registers) * kWarp : 0;
  while (block.free_registers < needed) {
    machine->block_on(block.register_waiters, {text, &block, needed});
  }
  block.free_registers -= needed;
  warp.registers = registers;
}

}  // namespace
}  // namespace nlora::cuda::emulator

namespace nlora::cuda {

using namespace emulator;

bool elect_one(Site site) {
  machine->enter(site, "elect_one", false);
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, nullptr, [](void**) {}, Convergence::NotNeeded);
  // Any lane may be the one, so each seed picks another.
  return self.lane == machine->setup.seed * 7 % kWarp;
}

uint32_t exchange(uint32_t bits, uint32_t source, Site site) {
  machine->enter(site, "shuffle", false);
  uint32_t call[3] = {bits, source, 0};
  for_all_lanes(call, Convergence::NotNeeded, [](uint32_t lane, void** calls) {
    auto mine = static_cast<uint32_t*>(calls[lane]);
    mine[2] = static_cast<uint32_t*>(calls[mine[1]])[0];
  });
  return call[2];
}

void sync_warp(Site site) {
  if (!machine->enter(site, "sync_warp", true)) {
    return;
  }
  Thread& self = *machine->self;
  machine->meet(
      self.warp->meeting, kWarp, self.lane, self.agent,
      [](void** agents) {
        Knowledge all;
        for (uint32_t lane = 0; lane < kWarp && machine->setup.lanes; ++lane) {
          static_cast<Agent*>(agents[lane])->release_into(all);
        }
        for (uint32_t lane = 0; lane < kWarp && machine->setup.lanes; ++lane) {
          static_cast<Agent*>(agents[lane])->known.join(all);
        }
      },
      Convergence::NotNeeded);
}

void change_registers(uint32_t registers, bool increase, Site site) {
  if (!machine->enter(site, increase ? "setmaxnreg_increase" : "setmaxnreg_decrease", true)) {
    return;
  }
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, nullptr, [&](void**) { set_registers(registers, increase); });
}

void store_matrix(uint32_t row, const uint32_t* r, bool transposed, Site site) {
  machine->enter(site, "stmatrix", false);
  MatrixCall call{row, const_cast<uint32_t*>(r)};
  for_all_lanes(&call, Convergence::Needed, [&](uint32_t lane, void** calls) {
    const SharedPlace at = shared_place(static_cast<MatrixCall*>(calls[lane])->row, 16, 16);
    check_write(at.block->shared, at.offset, 16, thread_actor(site));
    for (uint32_t column = 0; column < 8; ++column) {
      const uint32_t from = holder(lane % 8, column, transposed);
      const uint32_t half = (transposed ? lane % 8 : column) % 2;
      const auto bits = uint16_t(static_cast<MatrixCall*>(calls[from])->r[lane / 8] >> 16 * half);
      std::memcpy(at.bytes() + 2 * column, &bits, 2);
    }
  });
}

void load_matrix(uint32_t* r, uint32_t row, bool transposed, Site site) {
  machine->enter(site, "ldmatrix", false);
  MatrixCall call{row, r};
  for_all_lanes(&call, Convergence::Needed, [&](uint32_t lane, void** calls) {
    const SharedPlace at = shared_place(static_cast<MatrixCall*>(calls[lane])->row, 16, 16);
    check_read(at.block->shared, at.offset, 16, thread_actor(site));
    for (uint32_t column = 0; column < 8; ++column) {
      uint16_t bits;
      std::memcpy(&bits, at.bytes() + 2 * column, 2);
      const uint32_t half = (transposed ? lane % 8 : column) % 2;
      uint32_t& target = static_cast<MatrixCall*>(calls[holder(lane % 8, column, transposed)])->r[lane / 8];
      target = (target & 0xFFFFu << 16 * (1 - half)) | uint32_t(bits) << 16 * half;
    }
  });
}

void multiply_fragments(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Site site) {
  machine->enter(site, "mma", false);
  struct Call {
    float* d;
    const uint32_t *a, *b;
  } call{d, a, b};
  Thread& self = *machine->self;
  machine->meet(self.warp->meeting, kWarp, self.lane, &call, [&](void** calls) {
    float left[16][16], right[16][8];
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      const Call& in = *static_cast<Call*>(calls[lane]);
      for (uint32_t e = 0; e < 8; ++e) {
        const auto bits = uint16_t(in.a[e / 2] >> 16 * (e % 2));
        left[lane / 4 + 8 * (e / 2 % 2)][lane % 4 * 2 + e % 2 + 8 * (e / 4)] = widen(bits, is_bf16);
      }
      for (uint32_t e = 0; e < 4; ++e) {
        const auto bits = uint16_t(in.b[e / 2] >> 16 * (e % 2));
        right[lane % 4 * 2 + e % 2 + 8 * (e / 2)][lane / 4] = widen(bits, is_bf16);
      }
    }
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      for (uint32_t e = 0; e < 4; ++e) {
        float& sum = static_cast<Call*>(calls[lane])->d[e];
        for (uint32_t k = 0; k < 16; ++k) {
          sum += left[lane / 4 + 8 * (e / 2)][k] * right[k][lane % 4 * 2 + e % 2];
        }
      }
    }
  });
}

uint16_t round_to_16(float value, bool is_bf16, Site site) {
  if (is_in_flight(value)) {
    machine->enter(site, "pack2", false);
    machine->fail("accumulator in flight", where() + ": an accumulator was read before the wait");
  }
  if (!is_bf16) {
    return __builtin_bit_cast(uint16_t, _Float16(value));
  }
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return std::isnan(value) ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float widen(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __builtin_bit_cast(float, uint32_t(bits) << 16) : float(__builtin_bit_cast(_Float16, bits));
}

}  // namespace nlora::cuda
