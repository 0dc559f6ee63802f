// The kernels for sm_80 behind a C interface.
#include "../../cuda/ampere_launch.cuh"
#include "runner.h"

namespace hopper::tests {
namespace {

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
        launch_ampere_product(context, product);
    } else {
        launch_ampere_gradient(context, {in(0), in(1), out(2), uint32_t(c.number)});
    }
    matrices.fetch();
}

}  // namespace
}  // namespace hopper::tests

extern "C" uint32_t ampere_splits(uint32_t m, uint32_t n, uint32_t w, uint32_t processors) {
    return hopper::AmpereSplits::choose(m, n, w, processors);
}

extern "C" int run_ampere(const hopper::tests::Case* c, const hopper::tests::Options* options,
                          hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome,
                                  [&](hopper::Context& context) { hopper::tests::run_case(context, *c); });
}
