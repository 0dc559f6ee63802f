// A whole layer, forward and backward, behind a C interface.
#include "../../cuda/ampere_launch.cuh"
#include "../../cuda/finish.cuh"
#include "../../cuda/fold.cuh"
#include "../../cuda/gradient.cuh"
#include "../../cuda/linear.h"
#include "../../cuda/planned.cuh"
#include "runner.h"

namespace hopper::tests {
namespace {

struct LinearCase {
    int32_t ampere;   // which engine
    float scaling;
    nlora::Matrix matrices[14];   // in the order of csrc/ops.h
};

struct Engine {
    Context& context;
    bool ampere;

    void fold(const Matrix& B, const Matrix& core, float scaling, const Matrix& out) const {
        launch_fold(context, B, core, scaling, out);
    }
    void product(const Product& product) const {
        ampere                                             ? launch_ampere_product(context, product)
        : product.a.dtype == nlora::Dtype::kBFloat16 ? launch_planned<bf16>(context, product)
                                                     : launch_planned<fp16>(context, product);
    }
    void gradients(const Gradient* gradients, uint32_t count) const {
        ampere ? launch_ampere_gradients(context, gradients, count) : launch_gradients(context, gradients, count);
    }
    bool sums_beyond() const {
        return !ampere;
    }
    int64_t splits(int64_t m, int64_t n, int64_t w) const {
        const auto choose = ampere ? &AmpereSplits::choose : &GradientSplits::choose;
        return choose(uint32_t(m), uint32_t(n), uint32_t(w), context.processors());
    }
    void finishes(const Finish* finishes, uint32_t count) const {
        launch_finishes(context, finishes, count);
    }
};

uint32_t* state(Context& context, const LinearCase& c) {
    return static_cast<uint32_t*>(context.control(state_words(c.matrices[0].rows) * 4));
}

// x, weight, A, B, core, bias; y, T, folded.
void run_forward(Context& context, const LinearCase& c) {
    Matrices matrices(context);
    auto in = [&](int i) { return matrices.input(c.matrices[i]); };
    auto out = [&](int i) { return matrices.output(c.matrices[i]); };
    forward(Engine{context, c.ampere != 0}, {in(0), in(1), in(2), in(3), in(4), in(5), out(6), out(7), out(8),
                                             c.scaling, state(context, c)});
    matrices.fetch();
}

// dy, x, T, weight, A, B, core; dx, dA, dB, dcore, folded, shrunk, slices.
void run_backward(Context& context, const LinearCase& c) {
    Matrices matrices(context);
    auto in = [&](int i) { return matrices.input(c.matrices[i]); };
    auto out = [&](int i) { return matrices.output(c.matrices[i]); };
    Backward backward_of{in(0),  in(1),  in(2),   in(3),   in(4), in(5), in(6), out(7), out(8), out(9),
                         out(10), out(11), out(12), nullptr, c.scaling, state(context, c)};
    backward_of.slices = static_cast<float*>(out(13).data);
    backward(Engine{context, c.ampere != 0}, backward_of);
    matrices.fetch();
}

}  // namespace
}  // namespace hopper::tests

extern "C" int run_linear_forward(const hopper::tests::LinearCase* c, const hopper::tests::Options* options,
                                  hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome,
                                  [&](hopper::Context& context) { hopper::tests::run_forward(context, *c); });
}

extern "C" int run_linear_backward(const hopper::tests::LinearCase* c, const hopper::tests::Options* options,
                                   hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome,
                                  [&](hopper::Context& context) { hopper::tests::run_backward(context, *c); });
}

extern "C" int64_t linear_slice_floats(int ampere, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB,
                                       bool dcore) {
    hopper::Context context;
    return hopper::slice_floats(hopper::tests::Engine{context, ampere != 0}, m, k, n, r, dA, dB, dcore);
}
