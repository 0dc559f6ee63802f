// The narrow gradients of sm_90a behind a C interface.
#include "../../cuda/gradient.cuh"
#include "runner.h"

extern "C" uint32_t hopper_splits(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
    return hopper::GradientSplits::choose(m, n, w, processors);
}

HOPPER_ENTRY int run_hopper_gradient(const hopper::tests::Case* c, const hopper::tests::Options* options,
                                   hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome, [&](hopper::Context& context) {
        hopper::tests::Matrices matrices(context);
        const auto gradients = gradients_of(*c, matrices);
        launch_gradients(context, gradients.data(), uint32_t(gradients.size()));
        matrices.fetch();
    });
}
