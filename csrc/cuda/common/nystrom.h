// What Nyström's launches are asked to do: plain structs, filled by host code.
#pragma once

#include <algorithm>

#include "../../ops.h"

namespace nlora::cuda {

// Of one launch: their addresses travel in the kernel's parameters.
constexpr uint32_t kMaxLayers = 16;

// One entry a layer. All of one kind have the same shape, dtype and strides; A, core and B are contiguous.
struct Gather {
  std::vector<Matrix> weight;
  std::vector<const int64_t*> rows, cols;   // r indices each
  std::vector<Matrix> A, core, B;           // in the dtype of weight
};

struct Residual {
  std::vector<Matrix> weight;        // rows aligned to 16 bytes, columns side by side
  std::vector<Matrix> A, core, B;    // core may be empty: the identity
  float scaling;
  void* terms;                       // residual_bytes() of workspace, aligned to 16 bytes
};

// What one layer of a residual needs: how its terms lie in the workspace.
struct TermLayout {
  uint32_t width, columns, left_terms, right_terms;
  uint64_t elements;

  TermLayout(Dtype weight, Dtype A, uint64_t out, uint64_t in, uint64_t r)
      : width(uint32_t((r + 15) / 16 * 16)),
        columns(uint32_t((in + 7) / 8 * 8)),
        left_terms(weight == Dtype::kFloat32 ? 3 : 2),
        right_terms(A == Dtype::kBFloat16  ? 1
                    : A == Dtype::kFloat16 ? 2
                                           : left_terms),
        elements((left_terms * out + right_terms * columns) * width) {}
};

// Bytes of workspace for `layers` residuals; those of one launch are enough.
inline uint64_t residual_bytes(Dtype weight, Dtype A, uint64_t out, uint64_t in, uint64_t r, uint64_t layers) {
  return TermLayout(weight, A, out, in, r).elements * 2 * std::min<uint64_t>(layers, kMaxLayers);
}

// Calls launch(first layer, number of layers) for as many layers at a time as one launch takes.
template <class Launch>
void for_layers(size_t layers, Launch launch) {
  for (size_t first = 0; first < layers; first += kMaxLayers) {
    launch(first, uint32_t(std::min<size_t>(kMaxLayers, layers - first)));
  }
}

}  // namespace nlora::cuda
