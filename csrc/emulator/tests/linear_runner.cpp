// A whole layer, forward and backward, behind a C interface: what the extension calls, on a context.
#include "../../ops.h"
#include "runner.h"

namespace hopper::tests {
namespace {

struct LinearCase {
    int32_t ampere;   // which engine
    float scaling;
    nlora::Matrix matrices[14];   // in the order of csrc/ops.h
};

nlora::cuda::Queue queue(Context& context, bool ampere) {
#ifdef __CUDACC__
    (void)context, (void)ampere;
    return {0, nullptr};
#else
    context.architecture = ampere ? 80 : 90;
    return {context.id, &context};
#endif
}

// x, weight, A, B, core, bias; y, T, folded.
void run_forward(Context& context, const LinearCase& c) {
    Matrices matrices(context);
    auto in = [&](int i) { return matrices.input(c.matrices[i]); };
    auto out = [&](int i) { return matrices.output(c.matrices[i]); };
    nlora::cuda::forward(queue(context, c.ampere), in(0), in(1), in(2), in(3), in(4), in(5), out(6), out(7), out(8),
                         c.scaling);
    matrices.fetch();
}

// dy, x, T, weight, A, B, core; dx, dA, dB, dcore, folded, shrunk, slices.
void run_backward(Context& context, const LinearCase& c) {
    Matrices matrices(context);
    auto in = [&](int i) { return matrices.input(c.matrices[i]); };
    auto out = [&](int i) { return matrices.output(c.matrices[i]); };
    nlora::cuda::backward(queue(context, c.ampere), in(0), in(1), in(2), in(3), in(4), in(5), in(6), out(7), out(8),
                          out(9), out(10), out(11), out(12), out(13), c.scaling);
    matrices.fetch();
}

}  // namespace
}  // namespace hopper::tests

HOPPER_ENTRY int run_linear_forward(const hopper::tests::LinearCase* c, const hopper::tests::Options* options,
                                  hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome,
                                  [&](hopper::Context& context) { hopper::tests::run_forward(context, *c); });
}

HOPPER_ENTRY int run_linear_backward(const hopper::tests::LinearCase* c, const hopper::tests::Options* options,
                                   hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome,
                                  [&](hopper::Context& context) { hopper::tests::run_backward(context, *c); });
}

HOPPER_ENTRY int64_t linear_slice_floats(int ampere, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB,
                                       bool dcore) {
    hopper::Context context;
    return nlora::cuda::slice_floats(hopper::tests::queue(context, ampere), m, k, n, r, dA, dB, dcore);
}
