// The small kernels of an adapter behind a C interface: fold, core of LoRA², finish of a gradient.
#include "../../cuda/common/core.cuh"
#include "../../cuda/common/finish.cuh"
#include "../../cuda/common/fold.cuh"
#include "runner.h"

namespace nlora::cuda::tests {
namespace {

void run_case(Context& context, const Case& c) {
  Matrices matrices(context);
  auto in = [&](int i) { return matrices.input(c.matrices[i]); };
  auto out = [&](int i) { return matrices.output(c.matrices[i]); };
  switch (c.kernel) {
    case 0: {
      std::vector<Fold> folds;
      for (int i = 0; i < 9 && c.matrices[i]; i += 3) {
        folds.push_back({in(i), in(i + 1), out(i + 2), c.scaling});
      }
      launch_folds(context, folds.data(), uint32_t(folds.size()));
      break;
    }
    case 1: launch_core(context, in(0), in(1), in(2), in(3), out(4)); break;
    case 2: launch_core_backward(context, in(0), in(1), in(2), in(3), in(4), out(5), out(6), out(7)); break;
    case 3: {
      std::vector<Finish> finishes;
      for (int i = 0; i < 9 && c.matrices[i]; i += 3) {
        finishes.push_back({in(i), uint32_t(c.number), in(i + 1), out(i + 2), c.scaling, c.flag != 0});
      }
      launch_finishes(context, finishes.data(), uint32_t(finishes.size()));
      break;
    }
    default: throw std::invalid_argument("kernel must be 0 to 3, got " + std::to_string(c.kernel));
  }
  matrices.fetch();
}

}  // namespace

NLORA_ENTRY int run_adapter(const Case* c, const Options* options, Outcome* outcome) {
  return guarded(*options, *outcome, [&](Context& context) { run_case(context, *c); });
}

}  // namespace nlora::cuda::tests
