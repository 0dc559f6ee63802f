// The probes behind a C interface: compiled by a host compiler for the emulator and by nvcc for a device.
#include <cstring>

#include "../../cuda/common/context.cuh"
#include "probes.cuh"
#include "runner.h"

namespace nlora::cuda::tests {
namespace {

// How to lay a row-major matrix of 16-bit elements over a buffer.
struct MapShape {
  uint32_t rows, columns, row_bytes, box_rows, box_columns, swizzle;
};

struct ProbeCase {
  char name[32];
  const void* input;
  uint64_t input_bytes;
  void* output;
  uint64_t output_bytes;
  MapShape a, b;                 // box_rows = 0: no map
  uint64_t offset_b;             // of map b's matrix in input
  int32_t column, row;
  uint32_t bytes_a, bytes_b;
  uint64_t descriptor_a, descriptor_b;
  uint32_t step_a, step_b;
  uint32_t options;              // see the kernel; for wgmma: N | fp16 << 16 | MN-major A << 17 | MN-major B << 18
  uint32_t grid, block, cluster;
};

using Kernel = void (*)(ProbeProblem);

template <int N>
Kernel wgmma_probe(uint32_t options) {
  switch (options >> 16 & 7) {
    case 0: return &wgmma_kernel<N, bf16, Major::K, Major::K>;
    case 1: return &wgmma_kernel<N, fp16, Major::K, Major::K>;
    case 2: return &wgmma_kernel<N, bf16, Major::MN, Major::K>;
    case 4: return &wgmma_kernel<N, bf16, Major::K, Major::MN>;
    case 6: return &wgmma_kernel<N, bf16, Major::MN, Major::MN>;
    case 7: return &wgmma_kernel<N, fp16, Major::MN, Major::MN>;
    default: return nullptr;
  }
}

Kernel wgmma_probe_of_width(uint32_t options) {
  switch (options & 0xFFFF) {
    case 16: return wgmma_probe<16>(options);
    case 32: return wgmma_probe<32>(options);
    case 64: return wgmma_probe<64>(options);
    case 96: return wgmma_probe<96>(options);
    case 128: return wgmma_probe<128>(options);
    case 192: return wgmma_probe<192>(options);
    case 256: return wgmma_probe<256>(options);
    default: return nullptr;
  }
}

Kernel tma_wgmma_probe(uint32_t options) {
  switch (options >> 17 & 3) {
    case 0: return &tma_wgmma_kernel<Major::K, Major::K>;
    case 1: return &tma_wgmma_kernel<Major::MN, Major::K>;
    case 2: return &tma_wgmma_kernel<Major::K, Major::MN>;
    default: return &tma_wgmma_kernel<Major::MN, Major::MN>;
  }
}

Kernel probe_named(const ProbeCase& c) {
  const std::pair<const char*, Kernel> probes[] = {
      {"identity", &identity_kernel},
      {"shuffle", &shuffle_kernel},
      {"shared", &shared_kernel},
      {"cp_async", &cp_async_kernel},
      {"ldmatrix", &ldmatrix_kernel},
      {"stmatrix", &stmatrix_kernel},
      {"mma_bf16", &mma_kernel<bf16>},
      {"mma_fp16", &mma_kernel<fp16>},
      {"tma_load", &tma_load_kernel},
      {"tma_store", &tma_store_kernel},
      {"multicast", &multicast_kernel},
      {"mbarrier", &mbarrier_kernel},
      {"named_barrier", &named_barrier_kernel},
      {"setmaxnreg", &setmaxnreg_kernel},
      {"publish", &publish_kernel},
      {"cluster", &cluster_kernel},
      {"convert", &convert_kernel},
      {"wgmma", wgmma_probe_of_width(c.options)},
      {"tma_wgmma", tma_wgmma_probe(c.options)},
  };
  for (const auto& [name, kernel] : probes) {
    if (std::strcmp(name, c.name) == 0 && kernel) {
      return kernel;
    }
  }
  throw std::invalid_argument(std::string("no probe is called ") + c.name);
}

void run_case(Context& context, const ProbeCase& c) {
  ProbeProblem problem{};
  auto input = static_cast<const uint8_t*>(c.input_bytes ? context.input(c.input, c.input_bytes) : nullptr);
  auto output = static_cast<uint8_t*>(context.output(c.output_bytes));
  auto map = [](const MapShape& shape, const void* data) {
    return tensor_map(data, shape.rows, shape.columns, shape.row_bytes, shape.box_rows, shape.box_columns,
                      Swizzle(shape.swizzle));
  };
  const bool maps_output = std::strcmp(c.name, "tma_store") == 0 || std::strcmp(c.name, "publish") == 0;
  if (c.a.box_rows) {
    problem.a = map(c.a, maps_output ? output : input);
  }
  if (c.b.box_rows) {
    problem.b = map(c.b, input + c.offset_b);
  }
  problem.input = reinterpret_cast<const uint32_t*>(input);
  problem.output = reinterpret_cast<uint32_t*>(output);
  problem.control = static_cast<uint32_t*>(context.control(32));
  problem.bytes_a = c.bytes_a;
  problem.bytes_b = c.bytes_b;
  problem.column = c.column;
  problem.row = c.row;
  problem.descriptor_a = c.descriptor_a;
  problem.descriptor_b = c.descriptor_b;
  problem.step_a = c.step_a;
  problem.step_b = c.step_b;
  problem.options = c.options;
  context.launch({c.grid, c.block, c.cluster, 64 * 1024, 168}, probe_named(c), problem);
  context.fetch(c.output, output, c.output_bytes);
}

}  // namespace

NLORA_ENTRY int run_probe(const ProbeCase* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_case(context, *c); });
}

// The device's name goes into outcome->text.
NLORA_ENTRY int name_device(const Options* options, Outcome* outcome) {
  std::string name;
  const int status = guarded(*options, *outcome, [&](Context& context) { name = context.name(); });
  if (status == 0) {
    std::snprintf(outcome->text, sizeof(outcome->text), "%s", name.c_str());
  }
  return status;
}

}  // namespace nlora::cuda::tests
