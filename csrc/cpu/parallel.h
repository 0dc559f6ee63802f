// Threads and scratch memory.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace nlora::cpu {

struct Range {
  int64_t first, size;
};

// Part `index` of `count` nearly equal parts of [0, n), cut at multiples of unit.
inline Range part(int64_t n, int64_t unit, int index, int count) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t first = std::min(n, units * index / count * unit);
  return {first, std::min(n, units * (index + 1) / count * unit) - first};
}

// body(data, index, count) on every thread of a team; see parallel.cpp.
void run_team(int threads, void (*body)(void* data, int index, int count), void* data);
void wait_for_team();

// body(index, count) on every thread of a team. It may get fewer threads than asked for, inside another team just one.
template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1) return body(0, 1);
  const auto call = [](void* data, int index, int count) { (*static_cast<const Body*>(data))(index, count); };
  run_team(threads, call, const_cast<Body*>(&body));
}

// Waits for the team of `count` threads. A lone thread must not wait: the barrier would be that of an outer team.
inline void barrier(int count) {
  if (count > 1) wait_for_team();
}

// Scratch memory of the calling thread, up to kKept bytes of it kept from call to call: a call allocates only when it needs
// more than any before. One that is made while another lives gives back what was taken from it, and nothing else.
class Scratch {
 public:
  // As much as layers of ordinary batches take: the first touch of new memory is up to a tenth of a call of high rank.
  static constexpr size_t kKept = 128 << 20;

  Scratch() : first_(blocks().next) {}
  ~Scratch() {
    blocks().next = first_;
    if (!first_) blocks().trim();
  }
  Scratch(const Scratch&) = delete;

  float* take(int64_t size) {
    Blocks& all = blocks();
    if (all.next == all.list.size()) all.list.push_back({});
    Block& block = all.list[all.next++];
    if (!block.data || block.size < size) {
      all.release(block);
      const size_t wanted = size_t(size) * sizeof(float), unit = wanted < kHugePage ? kAlignment : kHugePage;
      const size_t bytes = (wanted / unit + 1) * unit;
      block.data = static_cast<float*>(std::aligned_alloc(unit, bytes));
      if (!block.data) throw std::bad_alloc();
#if defined(__linux__)
      // NOTE: a megabyte of packed values on small pages costs a tenth of a product's speed.
      if (unit == kHugePage) madvise(block.data, bytes, MADV_HUGEPAGE);
#endif
      block.size = size, block.bytes = bytes;
      all.bytes += bytes;
    }
    return block.data;
  }

 private:
  static constexpr size_t kAlignment = 64, kHugePage = 2 << 20;
  struct Block {
    float* data = nullptr;
    int64_t size = 0;
    size_t bytes = 0;
  };
  struct Blocks {
    std::vector<Block> list;
    size_t next = 0, bytes = 0;
    void release(Block& block) {
      std::free(block.data);
      bytes -= block.bytes;
      block = {};
    }
    // Frees what is more than is kept, the largest first.
    void trim() {
      const auto smaller = [](const Block& a, const Block& b) { return a.bytes < b.bytes; };
      while (bytes > kKept) release(*std::max_element(list.begin(), list.end(), smaller));
    }
    ~Blocks() {
      for (Block& block : list) std::free(block.data);
    }
  };
  static Blocks& blocks() {
    static thread_local Blocks all;
    return all;
  }

  size_t first_;
};

}  // namespace nlora::cpu
