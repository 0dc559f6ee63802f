// The kernels for sm_80 behind a C interface.
#include "../../cuda/sm80/ampere_launch.cuh"
#include "runner.h"

namespace nlora::cuda::tests {

using namespace sm80;

namespace {

struct PlacesProblem {
  uint32_t* out;   // (4, 128)
};

// Where each thread copies to, reads fragments of A and of B, and stores a pair of the result, as offsets.
template <class Tile, int Rows, Major major>
__global__ void places_kernel(const __grid_constant__ PlacesProblem problem) {
  using Operand = AmpereOperand<Tile, Rows, major>;
  const uint32_t row = warp_rank() * 16 % Rows, lane = lane_rank();
  const uint32_t places[4] = {Operand::at(Operand::copied_row(), Operand::copied_k()), Operand::lane_at(row, true),
                              Operand::lane_at(row, false), panel_at(0, Rows, row + lane / 4, lane % 4 * 2)};
  for (uint32_t i = 0; i < 4; ++i) {
    st_global(problem.out + i * Tile::kThreads + thread_rank(), places[i]);
  }
}

template <class Tile>
void run_places(Context& context, bool across, const PlacesProblem& problem) {
  const auto kernel =
      across ? &places_kernel<Tile, Tile::kBlockM, Major::MN> : &places_kernel<Tile, Tile::kBlockM, Major::K>;
  context.launch({1, Tile::kThreads, 1, 1024, Tile::kRegisters}, kernel, problem);
}

void run_case(Context& context, const Case& c) {
  Matrices matrices(context);
  auto in = [&](int i) { return matrices.input(c.matrices[i]); };
  auto out = [&](int i) { return matrices.output(c.matrices[i]); };
  if (c.kernel == 0) {
    Product product;
    product.major = c.flag ? Major::MN : Major::K;
    product.a = in(0);
    product.b = in(1);
    product.c = out(2);
    product.bias = in(3);
    product.shrink = in(6);
    product.p = product.shrink ? out(4) : in(4);
    product.wide = in(5);
    launch_products(context, &product, 1);
  } else if (c.kernel == 1) {
    const auto gradients = gradients_of(c, matrices);
    launch_gradients(context, gradients.data(), uint32_t(gradients.size()));
  } else {
    const PlacesProblem problem{static_cast<uint32_t*>(out(0).data)};
    c.number == 128 ? run_places<AmpereLarge>(context, c.flag, problem)
                    : run_places<AmpereSmall>(context, c.flag, problem);
  }
  matrices.fetch();
}

}  // namespace

extern "C" uint32_t ampere_splits(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
  return AmpereSplits::choose(m, n, w, processors);
}

NLORA_ENTRY int ampere_takes_large(uint32_t m, uint32_t n, uint32_t processors) {
  AmpereProblem problem{};
  problem.m = m;
  problem.n = n;
  return takes_large_tiles(&problem, 1, processors);
}

NLORA_ENTRY int run_ampere(const Case* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_case(context, *c); });
}

}  // namespace nlora::cuda::tests
