// The narrow gradients of sm_90a behind a C interface.
#include "../../cuda/sm90/gradient.cuh"
#include "runner.h"

namespace nlora::cuda::tests {

using namespace sm90;

extern "C" uint32_t hopper_splits(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
  return GradientSplits::choose(m, n, w, processors);
}

NLORA_ENTRY int run_hopper_gradient(const Case* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) {
    Matrices matrices(context);
    const auto gradients = gradients_of(*c, matrices);
    launch_gradients(context, gradients.data(), uint32_t(gradients.size()));
    matrices.fetch();
  });
}

}  // namespace nlora::cuda::tests
