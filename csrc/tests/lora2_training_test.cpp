// LoRA² training over ragged sizes against sums in double. Built with sanitizers by `python setup.py sanitize`: every
// buffer is as large as its tensor and not a byte larger.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "ops.h"

namespace {

using namespace nlora::cpu;

std::mt19937 generator(0);
int failures = 0;

std::vector<float> normal(int64_t size) {
  std::normal_distribution<float> draw(0, 0.5f);
  std::vector<float> values(size);
  for (float& value : values) value = draw(generator);
  values.shrink_to_fit();
  return values;
}

void expect(bool holds, const char* what, int64_t r, int64_t k, int64_t n) {
  if (holds) return;
  std::printf("%s is wrong for r = %ld, k = %ld, n = %ld\n", what, long(r), long(k), long(n));
  ++failures;
}

bool near(double actual, double expected, double scale) { return std::fabs(actual - expected) <= 2e-6 * scale; }

// ‖t·w·wᵀ·tᵀ − I‖² + ‖w·wᵀ − I‖² + ‖tᵀ·t − I‖², or the last two not squared.
double penalty(const std::vector<double>& w, const std::vector<double>& t, int64_t r, int64_t k, int64_t n,
               bool squared) {
  const auto off = [](const std::vector<double>& m, int64_t rows, int64_t cols, bool outer) {
    const int64_t size = outer ? rows : cols;
    double sum = 0;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) {
        double dot = i == j ? -1 : 0;
        for (int64_t l = 0; l < (outer ? cols : rows); ++l)
          dot += outer ? m[i * cols + l] * m[j * cols + l] : m[l * cols + i] * m[l * cols + j];
        sum += dot * dot;
      }
    return sum;
  };
  std::vector<double> tw(r * n);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < k; ++j) tw[i * n + c] += t[i * k + j] * w[j * n + c];
  const double a = off(w, k, n, true), g = off(t, r, k, false);
  return squared ? off(tw, r, n, true) + a + g : std::sqrt(a) + std::sqrt(g);
}

// The penalty of one adapter, and its gradients where `scale` is a half.
void check_penalty(int64_t r, int64_t k, int64_t n, bool squared) {
  const int64_t in = n, out = n + 3;
  const std::vector<float> v = normal(k * in), u = normal(r * k), V = normal(out * k), U = normal(k * r);
  std::vector<float> saved(2 * k * (k + r), NAN), dv(k * in, NAN), du(r * k, NAN), dV(out * k, NAN), dU(k * r, NAN);
  std::vector<double> w[2], t[2];
  w[0].assign(v.begin(), v.end());
  t[0].assign(u.begin(), u.end());
  for (int64_t i = 0; i < k; ++i)
    for (int64_t c = 0; c < out; ++c) w[1].push_back(V[c * k + i]);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t c = 0; c < k; ++c) t[1].push_back(U[c * r + i]);

  const std::vector<Lora2Vectors> layers{
      {v.data(), u.data(), V.data(), U.data(), dv.data(), du.data(), dV.data(), dU.data(), in, out, r, k}};
  const double value = lora2_penalty(layers, saved.data(), squared, 2);
  const double exact = penalty(w[0], t[0], r, k, in, squared) + penalty(w[1], t[1], r, k, out, squared);
  lora2_penalty_backward(layers, saved.data(), 0.5f, 2);
  expect(near(value, exact, exact), "the penalty", r, k, n);

  // Central differences of the first and the last element of each tensor.
  const double step = 1e-5;
  for (int side : {0, 1}) {
    const int64_t columns = side ? out : in;
    const std::vector<float>&dw = side ? dV : dv, &dt = side ? dU : du;
    const auto slope = [&](std::vector<double>& tensor, int64_t at) {
      const double kept = tensor[at];
      tensor[at] = kept + step;
      const double above = penalty(w[side], t[side], r, k, columns, squared);
      tensor[at] = kept - step;
      const double below = penalty(w[side], t[side], r, k, columns, squared);
      tensor[at] = kept;
      return (above - below) / (4 * step);
    };
    for (bool last : {false, true}) {
      const int64_t i = last ? k - 1 : 0, c = last ? columns - 1 : 0, row = last ? r - 1 : 0;
      const double w_slope = slope(w[side], i * columns + c), t_slope = slope(t[side], row * k + i);
      expect(near(dw[side ? c * k + i : i * columns + c], w_slope, 1 + exact), "the gradient of w", r, k, n);
      expect(near(dt[side ? i * r + row : row * k + i], t_slope, 1 + exact), "the gradient of t", r, k, n);
    }
  }
}

// Two layers, one of them without gradients of u; the second step must refuse infinity and change nothing.
void check_allocator(int64_t r, int64_t k, int64_t budget) {
  struct Buffers {
    std::vector<float> E, u, U, mask, dE, du, dU;
  };
  std::vector<Buffers> buffers;
  for (int n = 0; n < 2; ++n)
    buffers.push_back(
        {normal(r), normal(r * k), normal(k * r), std::vector<float>(r, NAN), normal(r), normal(r * k), normal(k * r)});
  std::vector<Lora2Layer> layers;
  for (Buffers& b : buffers)
    layers.push_back({b.E.data(), b.u.data(), b.U.data(), b.mask.data(), b.dE.data(), b.du.data(), b.dU.data(), r, k});
  layers[1].du = nullptr;
  const int64_t size = 2 * (r + 2 * r * k);
  std::vector<float> mean(size), spread(size);
  std::vector<uint8_t> kept(2 * r, 2);
  expect(lora2_allocate(layers, mean.data(), spread.data(), kept.data(), 0.85f, 0.8f, true, budget), "a step", r, k, 0);
  int64_t count = 0;
  for (int64_t i = 0; i < 2 * r; ++i) {
    count += kept[i];
    const Buffers& b = buffers[i / r];
    expect(b.mask[i % r] == kept[i] && (kept[i] || b.E[i % r] == 0), "a mask", r, k, 0);
  }
  expect(count == budget, "the number of kept values", r, k, 0);
  const double product = std::fabs(double(buffers[0].u[0]) * buffers[0].du[0]);
  expect(near(mean[r], 0.15 * product, 1) && near(spread[r], 0.2 * 0.85 * product, 1), "an average", r, k, 0);
  expect(mean[size / 2 + r] == 0, "the average of a tensor without gradient", r, k, 0);

  const std::vector<float> before = mean;
  buffers[1].dU.back() = INFINITY;
  expect(!lora2_allocate(layers, mean.data(), spread.data(), kept.data(), 0.85f, 0.8f, true, 0), "a refusal", r, k, 0);
  expect(mean == before, "an average after a refusal", r, k, 0);
}

}  // namespace

int main() {
  for (int64_t r : {1, 3, 8})
    for (int64_t k : {1, 5, 8, 12, 32}) {
      for (Tier cap : {Tier::kPortable, Tier::kAvx512}) {
        cap_tier(cap);
        for (int64_t n : {1, 7, 300})
          for (bool squared : {false, true}) check_penalty(r, k, n, squared);
      }
      for (int64_t budget : {int64_t(0), r, 2 * r}) check_allocator(r, k, budget);
    }
  std::printf("LoRA² training: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
