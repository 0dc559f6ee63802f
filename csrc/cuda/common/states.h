// Control words for the products of one device. Plain C++: its tests need no device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>

namespace nlora::cuda {

// Whose launches run one after another: those of one stream, of one thread where every thread has a stream of that
// handle, into one graph where they are captured.
struct Sequence {
  const void* stream = nullptr;
  uint64_t thread = 0, capture = 0;   // 0: of any, of none

  bool operator<(const Sequence& other) const {
    return std::tie(stream, thread, capture) < std::tie(other.stream, other.thread, other.capture);
  }
};

// Launches of one sequence share words, for each leaves them ready for the next. Those of a graph are its own, for it
// may be replayed beside anything else. Nothing is ever given back: an owner keeps a few kilobytes.
class States {
 public:
  // At least `count` words of this sequence. allocate(bytes) gives zeroed memory.
  template <class Allocate>
  uint32_t* words(const Sequence& sequence, size_t count, Allocate allocate) {
    Owned& owned = owners_[sequence];
    if (owned.count < count) {
      size_t size = kLeast;
      while (size < count) {
        size *= 2;
      }
      if (left_ < size) {
        const size_t chunk = std::max(kChunk, size);
        next_ = static_cast<uint32_t*>(allocate(chunk * sizeof(uint32_t)));
        left_ = chunk;
      }
      owned = {next_, size};
      next_ += size;
      left_ -= size;
    }
    return owned.words;
  }

 private:
  static constexpr size_t kLeast = 1024, kChunk = 1 << 19;   // words: 4 KiB, 2 MiB

  struct Owned {
    uint32_t* words;
    size_t count;
  };
  std::map<Sequence, Owned> owners_;
  uint32_t* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace nlora::cuda
