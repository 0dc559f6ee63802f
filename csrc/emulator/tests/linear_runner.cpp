// A whole layer, forward and backward, behind a C interface: what the extension calls, on a context.
#include "../../ops.h"
#include "runner.h"

namespace nlora::cuda::tests {
namespace {

struct LinearCase {
  int32_t ampere;   // which engine
  float scaling;
  Matrix matrices[12];   // in the order of csrc/ops.h
};

Queue queue(Context& context, bool ampere) {
#ifdef __CUDACC__
  (void)context, (void)ampere;
  return {0, nullptr};
#else
  context.architecture = ampere ? 80 : 90;
  return {context.id, &context};
#endif
}

// x, weight, A, B, core, bias; y, T, workspace.
void run_forward(Context& context, const LinearCase& c) {
  Matrices matrices(context);
  auto in = [&](int i) { return matrices.input(c.matrices[i]); };
  auto out = [&](int i) { return matrices.output(c.matrices[i]); };
  forward(queue(context, c.ampere), in(0), in(1), in(2), in(3), in(4), in(5), out(6), out(7), out(8), c.scaling);
  matrices.fetch();
}

// dy, x, T, weight, A, B, core; dx, dA, dB, dcore, workspace.
void run_backward(Context& context, const LinearCase& c) {
  Matrices matrices(context);
  auto in = [&](int i) { return matrices.input(c.matrices[i]); };
  auto out = [&](int i) { return matrices.output(c.matrices[i]); };
  backward(queue(context, c.ampere), in(0), in(1), in(2), in(3), in(4), in(5), in(6), out(7), out(8), out(9), out(10),
           out(11), c.scaling);
  matrices.fetch();
}

}  // namespace

NLORA_ENTRY int run_linear_forward(const LinearCase* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_forward(context, *c); });
}

NLORA_ENTRY int run_linear_backward(const LinearCase* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_backward(context, *c); });
}

extern "C" int64_t linear_forward_bytes(int64_t k, int64_t n, int64_t r) { return forward_bytes(k, n, r); }

NLORA_ENTRY int64_t linear_backward_bytes(int ampere, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB,
                                          bool dcore) {
  Context context;
  return backward_bytes(queue(context, ampere), m, k, n, r, dA, dB, dcore);
}

}  // namespace nlora::cuda::tests
