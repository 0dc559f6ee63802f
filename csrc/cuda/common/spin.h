// What a wait that never ends has to say: noted by the device or the emulator, put into words by the host.
#pragma once

#include <cstdint>
#include <string>

namespace nlora::cuda {

// How long a wait may take in builds with NLORA_BOUND_SPINS.
constexpr uint32_t kSpinSeconds = 2;

// Characters of a file's name that a record has room for: the last ones.
constexpr uint32_t kSpinName = 16;

struct alignas(64) SpinRecord {
  enum Kind : uint32_t { kNothing, kFlag, kBarrier };

  uint32_t kind;
  uint32_t line, block, thread;
  uint32_t wanted, seen;   // values of the flag; the parity that does not pass, twice
  uint64_t place;          // address of the flag, or offset of the barrier in its block's shared memory
  uint32_t file[kSpinName / 4];

  std::string text() const {
    const auto hex = [](uint64_t value) {
      std::string digits;
      do {
        digits.insert(digits.begin(), "0123456789abcdef"[value % 16]);
      } while (value /= 16);
      return "0x" + digits;
    };
    const std::string name(reinterpret_cast<const char*>(file), kSpinName), state = std::to_string(wanted);
    return std::string(kind == kFlag ? "flag_wait" : "mbarrier_wait") + " at " +
           name.substr(name.find_last_of("/ ") + 1) + ":" + std::to_string(line) + " by block " +
           std::to_string(block) + " thread " + std::to_string(thread) + " has lasted " + std::to_string(kSpinSeconds) +
           " s: " +
           (kind == kFlag ? "the flag at " + hex(place) + " is " + std::to_string(seen) + " and must be " + state
                          : "the phase of parity " + state + " of the mbarrier at " + hex(place) + " is not over");
  }
};

// Of a device: threads that give up at the same time mostly find one each.
constexpr uint32_t kSpinRecords = 64;

}  // namespace nlora::cuda
