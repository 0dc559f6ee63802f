// How a slice of a narrow gradient is written.
#pragma once

#include "layer.cuh"

namespace nlora::cuda {

struct alignas(8) FloatPair {
  float low, high;
};

// Two neighbours of slice (rows, columns), of fewer than 2^32 elements, unless they lie beyond its edges. Four lanes
// fill a sector of 32 bytes.
__device__ __forceinline__ void store_pair(float* slice, uint32_t rows, uint32_t columns, uint32_t row, uint32_t column,
                                           float low, float high) {
  if (row < rows && column < columns) {
    st_global(reinterpret_cast<FloatPair*>(slice + (row * columns + column)), FloatPair{low, high});
  }
}

}  // namespace nlora::cuda
