// Gather and residual behind a C interface: compiled by a host compiler for the emulator and by nvcc for a device.
#include "../../cuda/common/gather.cuh"
#include "../../cuda/common/residual.cuh"
#include "runner.h"

namespace nlora::cuda::tests {
namespace {

// Layer l of W begins at `weight` + l·layer_stride; everything else is contiguous, layer after layer.
struct NystromCase {
  int32_t dtype, a_dtype, core_dtype, b_dtype;   // of Dtype
  uint32_t layers, out, in, r;
  int64_t row_stride, col_stride, layer_stride, elements;   // of W
  void* weight;
  const int64_t *rows, *cols;
  void *A, *core, *B;   // core may be null for a residual
  float scaling;
};

size_t bytes_of(int32_t dtype) { return Dtype(dtype) == Dtype::kFloat32 ? 4 : 2; }

std::vector<Matrix> matrices(void* data, int32_t dtype, const NystromCase& c, int64_t rows, int64_t cols) {
  std::vector<Matrix> all;
  for (uint32_t l = 0; data && l < c.layers; ++l) {
    all.push_back({static_cast<char*>(data) + l * rows * cols * bytes_of(dtype), Dtype(dtype), rows, cols, cols, 1});
  }
  return all;
}

std::vector<Matrix> weights(void* data, const NystromCase& c) {
  std::vector<Matrix> all;
  for (uint32_t l = 0; l < c.layers; ++l) {
    char* layer = static_cast<char*>(data) + l * c.layer_stride * bytes_of(c.dtype);
    all.push_back({layer, Dtype(c.dtype), c.out, c.in, c.row_stride, c.col_stride});
  }
  return all;
}

void gather(Context& context, const NystromCase& c) {
  const size_t size = bytes_of(c.dtype), layers = c.layers, r = c.r;
  void* weight = context.inout(c.weight, c.elements * size);
  auto indices = [&](const int64_t* from) {
    const auto* data = static_cast<const int64_t*>(context.inout(from, layers * r * 8));
    std::vector<const int64_t*> all;
    for (size_t l = 0; l < layers; ++l) {
      all.push_back(data + l * r);
    }
    return all;
  };
  const size_t A_bytes = layers * r * c.in * size, core_bytes = layers * r * r * size,
               B_bytes = layers * c.out * r * size;
  void *A = context.output(A_bytes), *core = context.output(core_bytes), *B = context.output(B_bytes);
  launch_gather(context, Gather{weights(weight, c), indices(c.rows), indices(c.cols), matrices(A, c.dtype, c, r, c.in),
                                matrices(core, c.dtype, c, r, r), matrices(B, c.dtype, c, c.out, r)});
  context.fetch(c.A, A, A_bytes);
  context.fetch(c.core, core, core_bytes);
  context.fetch(c.B, B, B_bytes);
}

void residual(Context& context, const NystromCase& c) {
  const size_t weight_bytes = c.elements * bytes_of(c.dtype), layers = c.layers, r = c.r;
  void* weight = context.inout(c.weight, weight_bytes);
  void* A = context.input(c.A, layers * r * c.in * bytes_of(c.a_dtype));
  void* core = c.core ? context.input(c.core, layers * r * r * bytes_of(c.core_dtype)) : nullptr;
  void* B = context.input(c.B, layers * c.out * r * bytes_of(c.b_dtype));
  void* terms = context.output(residual_bytes(Dtype(c.dtype), Dtype(c.a_dtype), c.out, c.in, r, layers));
  launch_residual(
      context, Residual{weights(weight, c), matrices(A, c.a_dtype, c, r, c.in), matrices(core, c.core_dtype, c, r, r),
                        matrices(B, c.b_dtype, c, c.out, r), c.scaling, terms});
  context.fetch(c.weight, weight, weight_bytes);
}

}  // namespace

NLORA_ENTRY int run_gather(const NystromCase* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { gather(context, *c); });
}

NLORA_ENTRY int run_residual(const NystromCase* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { residual(context, *c); });
}

}  // namespace nlora::cuda::tests
