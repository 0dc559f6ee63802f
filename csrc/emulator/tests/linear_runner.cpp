// Whole layers that share x, forward and backward, behind a C interface: what the extension calls, on a context.
#include "../../ops.h"
#include "runner.h"

namespace nlora::cuda::tests {
namespace {

// Matrices in the order of csrc/ops.h, the workspace last. Those that the layers of a call share are given with the
// first.
struct LinearCase {
  int32_t ampere;   // which engine
  float scaling;
  Matrix matrices[12];
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
void run_forward(Context& context, const LinearCase* cases, int32_t count) {
  Matrices matrices(context);
  std::vector<Forward> layers;
  const Matrix x = matrices.input(cases->matrices[0]), workspace = matrices.output(cases->matrices[8]);
  for (const LinearCase* c = cases; c < cases + count; ++c) {
    auto in = [&](int i) { return matrices.input(c->matrices[i]); };
    auto out = [&](int i) { return matrices.output(c->matrices[i]); };
    layers.push_back({x, in(1), in(2), in(3), in(4), in(5), out(6), out(7), c->scaling});
  }
  forward(queue(context, cases->ampere), layers.data(), layers.size(), workspace);
  matrices.fetch();
}

// dy, x, T, weight, A, B, core; dx, dA, dB, dcore, workspace.
void run_backward(Context& context, const LinearCase* cases, int32_t count) {
  Matrices matrices(context);
  std::vector<Backward> layers;
  const Matrix x = matrices.input(cases->matrices[1]);
  const Matrix dx = matrices.output(cases->matrices[7]), workspace = matrices.output(cases->matrices[11]);
  for (const LinearCase* c = cases; c < cases + count; ++c) {
    auto in = [&](int i) { return matrices.input(c->matrices[i]); };
    auto out = [&](int i) { return matrices.output(c->matrices[i]); };
    layers.push_back({in(0), x, in(2), in(3), in(4), in(5), in(6), dx, out(8), out(9), out(10), c->scaling});
  }
  backward(queue(context, cases->ampere), layers.data(), layers.size(), workspace);
  matrices.fetch();
}

}  // namespace

NLORA_ENTRY int run_linear_forward(const LinearCase* cases, int32_t count, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_forward(context, cases, count); });
}

NLORA_ENTRY int run_linear_backward(const LinearCase* cases, int32_t count, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_backward(context, cases, count); });
}

extern "C" int64_t linear_forward_bytes(int64_t k, int64_t n, int64_t r) { return forward_bytes(k, n, r); }

NLORA_ENTRY int64_t linear_backward_bytes(int ampere, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB,
                                          bool dcore) {
  Context context;
  return backward_bytes(queue(context, ampere), m, k, n, r, dA, dB, dcore);
}

}  // namespace nlora::cuda::tests
