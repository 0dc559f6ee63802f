// The narrow gradients of sm_90a behind a C interface.
#include "../../cuda/gradient.cuh"
#include "runner.h"

extern "C" uint32_t hopper_splits(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
    return hopper::GradientSplits::choose(m, n, w, processors);
}

extern "C" int run_hopper_gradient(const hopper::tests::Case* c, const hopper::tests::Options* options,
                                   hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome, [&](hopper::Context& context) {
        hopper::tests::Matrices matrices(context);
        const auto wide = matrices.input(c->matrices[0]), narrow = matrices.input(c->matrices[1]);
        launch_gradient(context, {wide, narrow, matrices.output(c->matrices[2]), uint32_t(c->number)});
        matrices.fetch();
    });
}
