// What csrc/ops.h declares: chooses the engine of the device, and says of every error which call met it.
#include "../../ops.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>

#include "../sm90/plan.h"
#include "group.cuh"
#include "launchers.h"
#include "linear.h"
#include "remembered.h"
#include "splits.h"
#include "states.h"

namespace nlora::cuda {
namespace {

std::string shape(const Matrix& matrix) {
  return "(" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.cols) + ")";
}

// Of each device.
std::mutex launching[64];

// Runs body(stream) on the queue; a failure of CUDA becomes an error that names the operation() and its shapes. The
// launches of one call come one after another whatever other threads launch: a product may begin while those before it
// run, and shares its control words with products of other calls.
template <class Operation, class Body>
void on(const Queue& queue, Operation operation, Body body) {
  const std::lock_guard<std::mutex> lock(launching[queue.device % std::size(launching)]);
  try {
    Stream stream(queue.device, queue.stream);
    body(stream);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(operation() + " on cuda:" + std::to_string(queue.device) + ": " + error.what());
  }
}

// Control words for products of m rows on a stream.
uint32_t* state(const Queue& queue, const Stream& stream, int64_t m) {
  static std::mutex mutex;
  // NOTE: never destroyed, for the driver may be gone before it.
  static auto& states = *new std::map<int, States>;
  const Sequence sequence = stream.sequence();
  const std::lock_guard<std::mutex> lock(mutex);
  return states[queue.device].words(sequence, state_words(m),
                                    [&](size_t bytes) { return stream.allocate_zeroed(bytes); });
}

// Hopper's kernels hold for compute capability 9.0 alone, Ampere's from 8.0 on.
struct Engine {
  Stream& stream;
  bool is_hopper = stream.architecture() == 90;
  uint32_t processors = stream.processors();

  void folds(const Fold* folds, uint32_t count) const { by_groups(&launch_folds<Stream>, folds, count); }
  void products(const Product* products, uint32_t count) const {
    const auto launch = !is_hopper                              ? &sm80::launch_products<Stream>
                        : products->a.dtype == Dtype::kBFloat16 ? &sm90::launch_planned<bf16, Stream>
                                                                : &sm90::launch_planned<fp16, Stream>;
    launch(stream, products, count);
  }
  void gradients(const Gradient* gradients, uint32_t count) const {
    by_groups(is_hopper ? &sm90::launch_gradients<Stream> : &sm80::launch_gradients<Stream>, gradients, count);
  }
  bool sums_beyond() const { return is_hopper; }
  int64_t splits(int64_t m, int64_t n, int64_t w) const {
    static thread_local Remembered<uint32_t, 5> splits;
    const auto choose = is_hopper ? &GradientSplits::choose : &AmpereSplits::choose;
    return splits.get({double(m), double(n), double(w), double(processors), double(is_hopper)},
                      [&] { return choose(uint32_t(m), uint32_t(n), uint32_t(w), processors); });
  }
  void finishes(const Finish* finishes, uint32_t count) const { by_groups(&launch_finishes<Stream>, finishes, count); }

 private:
  // As few launches as take them all.
  template <class Problem>
  void by_groups(void (*launch)(Stream&, const Problem*, uint32_t), const Problem* problems, uint32_t count) const {
    for (uint32_t first = 0; first < count; first += kMostInGroup) {
      launch(stream, problems + first, std::min(count - first, kMostInGroup));
    }
  }
};

template <class Layer>
std::string sizes(const Matrix& rows, const Layer* layers, size_t count) {
  std::string text = shape(rows);
  for (size_t i = 0; i < count; ++i) {
    text += ", weight " + shape(layers[i].weight) + ", lora_A " + shape(layers[i].A);
  }
  return text;
}

}  // namespace

int64_t forward_bytes(int64_t k, int64_t n, int64_t r) {
  // F, and room for A.
  return 2 * r * (n + k);
}

int64_t backward_bytes(const Queue& queue, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB, bool dcore) {
  Stream stream(queue.device, queue.stream);
  return backward_bytes(Engine{stream}, m, k, n, r, dA, dB, dcore);
}

void set_bytes_per_cycle(double bytes) {
  if (!(bytes > 0)) {
    throw std::invalid_argument("bytes must be positive, got " + std::to_string(bytes));
  }
  sm90::bytes_per_cycle() = bytes;
}

void linear(const Queue& queue, const Matrix& x, const Matrix& weight, const Matrix& bias, const Matrix& y) {
  on(
      queue, [&] { return "product of x " + shape(x) + ", weight " + shape(weight); },
      [&](Stream& stream) {
        Product product;
        product.a = x;
        product.b = weight;
        product.c = y;
        product.bias = bias;
        product.state = state(queue, stream, x.rows);
        Engine{stream}.products(&product, 1);
      });
}

void forward(const Queue& queue, const Forward* layers, size_t count, const Matrix& workspace) {
  on(
      queue, [&] { return "forward of x " + sizes(layers->x, layers, count); },
      [&](Stream& stream) {
        forward(Engine{stream}, layers, count, {workspace.data, state(queue, stream, layers->x.rows)});
      });
}

void backward(const Queue& queue, const Backward* layers, size_t count, const Matrix& workspace) {
  on(
      queue, [&] { return "backward of dy " + sizes(layers->dy, layers, count); },
      [&](Stream& stream) {
        backward(Engine{stream}, layers, count, {workspace.data, state(queue, stream, layers->dy.rows)});
      });
}

void lora2_core(const Queue& queue, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                const Matrix& core) {
  on(
      queue, [&] { return "LoRA² core of u " + shape(u); },
      [&](Stream& stream) { launch_core(stream, u, E, U, mask, core); });
}

void lora2_core_backward(const Queue& queue, const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U,
                         const Matrix& mask, const Matrix& du, const Matrix& dE, const Matrix& dU) {
  on(
      queue, [&] { return "gradient of the LoRA² core of u " + shape(u); },
      [&](Stream& stream) { launch_core_backward(stream, dcore, u, E, U, mask, du, dE, dU); });
}

void gather(const Queue& queue, const std::vector<Matrix>& weight, const std::vector<const int64_t*>& rows,
            const std::vector<const int64_t*>& cols, const std::vector<Matrix>& A, const std::vector<Matrix>& core,
            const std::vector<Matrix>& B) {
  on(
      queue, [&] { return "gather from weight " + shape(weight[0]); },
      [&](Stream& stream) { launch_gather(stream, {weight, rows, cols, A, core, B}); });
}

int64_t residual_bytes(const Matrix& weight, const Matrix& A, int64_t layers) {
  return int64_t(residual_bytes(weight.dtype, A.dtype, weight.rows, weight.cols, A.rows, layers));
}

void residual(const Queue& queue, const std::vector<Matrix>& weight, const std::vector<Matrix>& A,
              const std::vector<Matrix>& core, const std::vector<Matrix>& B, const Matrix& terms, float scaling) {
  on(
      queue, [&] { return "residual of weight " + shape(weight[0]) + ", A " + shape(A[0]); },
      [&](Stream& stream) { launch_residual(stream, {weight, A, core, B, scaling, terms.data}); });
}

}  // namespace nlora::cuda
