// The GEMM behind a C interface: compiled by a host compiler for the emulator and by nvcc for a device.
#include "../../cuda/sm90/gemm_launch.cuh"
#include "runner.h"

namespace nlora::cuda::tests {

using namespace sm90;

namespace {

// One product; the operands and results as in Product, all host memory. `launch` is the number of its launch: what
// products of one share is that of the first.
struct GemmCase {
  int32_t tile, major, launch;
  uint32_t blocks, tall;
  Matrix a, b, c, bias, p, wide, shrink, t, slices;
};

void run_tile(Context& context, int32_t tile, const Product* products, uint32_t count, uint32_t blocks, uint32_t tall) {
  switch (tile) {
    case 0: return launch_products<GemmTile<128, 128, 4>>(context, products, count, blocks, tall);
    case 1: return launch_products<GemmTile<128, 256, 3>>(context, products, count, blocks, tall);
    case 2: return launch_products<GemmTile<128, 128, 4, 2>>(context, products, count, blocks, tall);
    case 3: return launch_products<GemmTile<128, 256, 4, 2, 2>>(context, products, count, blocks, tall);
    // Two stages only: slots are reused at once.
    case 4: return launch_products<GemmTile<128, 64, 2, 2>>(context, products, count, blocks, tall);
    default: throw std::invalid_argument("tile must be 0 to 4, got " + std::to_string(tile));
  }
}

// Launches one after the other on the same control words. `control` holds the ticket, the epoch and what is in
// every flag, before and, but for the flags, after.
void run_cases(Context& context, const GemmCase* cases, int32_t count, uint32_t* control) {
  const auto bytes = [](const Matrix& x) {
    return size_t((x.rows - 1) * x.row_stride + x.cols) * (x.dtype == Dtype::kFloat32 ? 4 : 2);
  };
  size_t words = 0;
  for (const GemmCase* c = cases; c < cases + count; ++c) {
    words = std::max(words, state_words(c->a.rows));
  }
  std::vector<uint32_t> before(words, control[2]);
  before[0] = control[0];
  before[State::kWord] = control[1];
  auto state = static_cast<uint32_t*>(context.control(words * sizeof(uint32_t), before.data()));
  const auto on_device = [&](Matrix x, bool written) {
    if (x) {
      // As far from a multiple of 16 as the host's data.
      const size_t shift = reinterpret_cast<uintptr_t>(x.data) % 16;
      const auto from = static_cast<const uint8_t*>(x.data) - shift;
      void* data = written ? context.output(shift + bytes(x)) : context.input(from, shift + bytes(x));
      x.data = static_cast<uint8_t*>(data) + shift;
    }
    return x;
  };
  std::vector<Product> products;
  const Product* first = nullptr;
  products.reserve(size_t(count));
  for (const GemmCase* c = cases; c < cases + count; ++c) {
    const bool begins = c == cases || c->launch != c[-1].launch, sums = Major(c->major) == Major::MN;
    Product product{!begins && !sums ? first->a : on_device(c->a, false),
                    on_device(c->b, false),
                    !begins && sums ? first->c : on_device(c->c, true),
                    on_device(c->bias, false),
                    on_device(c->p, bool(c->shrink)),
                    on_device(c->wide, false),
                    on_device(c->shrink, false),
                    on_device(c->t, false),
                    on_device(c->slices, true),
                    Major(c->major),
                    false,
                    state};
    products.push_back(product);
    first = begins ? &products.back() : first;
  }
  // Each may begin beside the one before it.
  for (int32_t i = 0, next = 0; i < count; i = next) {
    while (next < count && cases[next].launch == cases[i].launch) {
      ++next;
    }
    run_tile(context, cases[i].tile, &products[i], uint32_t(next - i), cases[i].blocks, cases[i].tall);
  }
  for (int32_t i = 0; i < count; ++i) {
    const GemmCase& c = cases[i];
    context.fetch(c.c.data, products[i].c.data, bytes(c.c));
    if (c.shrink) {
      context.fetch(c.p.data, products[i].p.data, bytes(c.p));
    }
    if (c.t) {
      context.fetch(c.slices.data, products[i].slices.data, bytes(c.slices));
    }
  }
  context.fetch(control, state, sizeof(uint32_t));
  context.fetch(control + 1, state + State::kWord, sizeof(uint32_t));
}

}  // namespace

NLORA_ENTRY int run_gemm(const GemmCase* cases, int32_t count, uint32_t* control, const Options* options,
                         Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_cases(context, cases, count, control); });
}

}  // namespace nlora::cuda::tests
