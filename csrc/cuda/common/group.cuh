// Several problems of one kernel in one launch: the gradients of layers are too small to wait for one another.
#pragma once

#include <stdexcept>
#include <string>

#include "layer.cuh"

namespace nlora::cuda {

constexpr uint32_t kMostInGroup = 6;

inline void check_group(uint32_t count) {
  if (count < 1 || count > kMostInGroup) {
    throw std::invalid_argument("a launch takes 1 to " + std::to_string(kMostInGroup) + " problems, got " +
                                std::to_string(count));
  }
}

// Blocks are counted through the problems in order.
template <class Problem>
struct Group {
  Problem items[kMostInGroup];
  uint32_t blocks[kMostInGroup] = {};   // of each
  uint32_t count = 0;

  void add(const Problem& problem, uint32_t its_blocks) {
    items[count] = problem;
    blocks[count++] = its_blocks;
  }

  uint32_t total() const {
    uint32_t total = 0;
    for (uint32_t of_one : blocks) {
      total += of_one;
    }
    return total;
  }

  // The problem of this block; `block` becomes its rank among those of the same problem.
  __device__ __forceinline__ const Problem& of_block(uint32_t& block) const {
    uint32_t item = 0;
    block = block_rank();
    while (item < kMostInGroup - 1 && block >= blocks[item]) {
      block -= blocks[item++];
    }
    return items[item];
  }
};

}  // namespace nlora::cuda
