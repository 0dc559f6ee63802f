// What every C entry point of the test libraries shares: options in, report or error out.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "../../cuda/common/context.cuh"
#include "../../cuda/common/gradient.h"
#include "../../ops.h"

// NOTE: nvcc hides a function whose arguments have a type of an unnamed namespace.
#define NLORA_ENTRY extern "C" __attribute__((visibility("default")))

namespace nlora::cuda::tests {

// Matrices of a case: copied to the memory of the run, and the results back.
class Matrices {
 public:
  explicit Matrices(Context& context) : context_(context) {}

  Matrix input(Matrix matrix) {
    if (matrix) {
      matrix.data = context_.input(matrix.data, bytes(matrix));
    }
    return matrix;
  }

  Matrix output(Matrix matrix) {
    if (matrix) {
      results_.push_back({matrix.data, context_.output(bytes(matrix)), bytes(matrix)});
      matrix.data = results_.back().device;
    }
    return matrix;
  }

  void fetch() {
    for (const Result& result : results_) {
      context_.fetch(result.host, result.device, result.bytes);
    }
  }

 private:
  struct Result {
    void *host, *device;
    size_t bytes;
  };

  // From the first element to the last.
  static size_t bytes(const Matrix& matrix) {
    const int64_t elements = (matrix.rows - 1) * matrix.row_stride + (matrix.cols - 1) * matrix.col_stride + 1;
    return size_t(elements) * (matrix.dtype == Dtype::kFloat32 ? 4 : 2);
  }

  Context& context_;
  std::vector<Result> results_;
};

// One launch: which one, and its arguments in order.
struct Case {
  int32_t kernel;
  int32_t number;   // of splits, or what else the kernel counts
  int32_t flag;
  float scaling;
  Matrix matrices[9];
};

// The gradients of a case: wide, narrow and slices of each, all of case.number splits; one wide may be that of several.
inline std::vector<Gradient> gradients_of(const Case& c, Matrices& matrices) {
  std::vector<Gradient> gradients;
  for (const Matrix* m = c.matrices; m != c.matrices + 9 && *m; m += 3) {
    const bool again = m != c.matrices && m[0].data == m[-3].data;
    const Matrix wide = again ? gradients.back().wide : matrices.input(m[0]);
    gradients.push_back({wide, matrices.input(m[1]), matrices.output(m[2]), uint32_t(c.number)});
  }
  return gradients;
}

// Ignored on a device.
struct Options {
  uint64_t seed;
  int32_t lanes, resident, skipped_line, bounded;
  const char* source;   // whose lines are meant, or null: any file's
};

constexpr int kMaxLines = 256;

struct Outcome {
  char rule[64];
  char text[16384];
  int32_t line_count;
  int32_t lines[kMaxLines];   // of the synchronisation calls that ran
};

// 0: the run ended without a report; 1: it has one; 2: it could not run.
template <class Body>
int guarded(const Options& options, Outcome& outcome, Body body) {
  outcome = {};
  try {
    Context context;
#ifndef __CUDACC__
    context.setup.seed = options.seed;
    context.setup.lanes = options.lanes != 0;
    context.setup.resident = uint32_t(options.resident);
    context.setup.skipped_line = options.skipped_line;
    context.setup.bounded = options.bounded != 0;
    context.setup.source = options.source ? options.source : "";
    body(context);
    context.finish();
    for (int line : context.report.synchronisation_lines) {
      outcome.lines[outcome.line_count++] = line;
    }
    std::snprintf(outcome.rule, sizeof(outcome.rule), "%s", context.report.rule.c_str());
    std::snprintf(outcome.text, sizeof(outcome.text), "%s", context.report.text.c_str());
    return context.report ? 1 : 0;
#else
    (void)options;
    body(context);
    return 0;
#endif
  } catch (const std::exception& error) {
    std::snprintf(outcome.rule, sizeof(outcome.rule), "error");
    std::snprintf(outcome.text, sizeof(outcome.text), "%s", error.what());
    return 2;
  }
}

}  // namespace nlora::cuda::tests
