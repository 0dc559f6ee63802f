// LoRA² training: the rank allocator's step and the orthogonality penalty, over all layers of a model in one call.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/gram.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace nlora::cpu {
namespace {

struct Averages {
  float* mean;
  float* spread;
};

bool finite_products(const float* w, const float* g, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(std::fabs(w[i] * g[i]) <= std::numeric_limits<float>::max());
  return !bad;
}

// Without gradient, a gradient of zero.
void smooth(const float* w, const float* g, int64_t n, float beta1, float beta2, Averages& at) {
  for (int64_t i = 0; i < n; ++i) {
    const float sensitivity = g ? std::fabs(w[i] * g[i]) : 0;
    at.mean[i] = beta1 * at.mean[i] + (1 - beta1) * sensitivity;
    at.spread[i] = beta2 * at.spread[i] + (1 - beta2) * std::fabs(sensitivity - at.mean[i]);
  }
  at.mean += n;
  at.spread += n;
}

// S(E_i) + mean over k of S(u[i, :]) + mean over k of S(U[:, i])
void score(int64_t r, int64_t k, const float* mean, const float* spread, float* scores) {
  const float *u_mean = mean + r, *u_spread = spread + r;
  const float *U_mean = u_mean + r * k, *U_spread = u_spread + r * k;
  for (int64_t i = 0; i < r; ++i) {
    float vectors = 0;
    for (int64_t c = 0; c < k; ++c)
      vectors += u_mean[i * k + c] * u_spread[i * k + c] + U_mean[c * r + i] * U_spread[c * r + i];
    scores[i] = mean[i] * spread[i] + vectors / k;
  }
}

}  // namespace

bool lora2_allocate(const std::vector<Lora2Layer>& layers, float* exp_avg, float* exp_unc, uint8_t* kept, float beta1,
                    float beta2, bool scoring, int64_t budget) {
  if (scoring) {
    for (const Lora2Layer& l : layers) {
      const int64_t vectors = l.r * l.k;
      if ((l.dE && !finite_products(l.E, l.dE, l.r)) || (l.du && !finite_products(l.u, l.du, vectors)) ||
          (l.dU && !finite_products(l.U, l.dU, vectors)))
        return false;
    }
    Averages at{exp_avg, exp_unc};
    for (const Lora2Layer& l : layers) {
      smooth(l.E, l.dE, l.r, beta1, beta2, at);
      smooth(l.u, l.du, l.r * l.k, beta1, beta2, at);
      smooth(l.U, l.dU, l.r * l.k, beta1, beta2, at);
    }
  }
  if (budget < 0) return true;

  std::vector<float> scores;
  for (const Lora2Layer& l : layers) {
    scores.resize(scores.size() + l.r);
    score(l.r, l.k, exp_avg, exp_unc, scores.data() + scores.size() - l.r);
    exp_avg += l.r + 2 * l.r * l.k;
    exp_unc += l.r + 2 * l.r * l.k;
  }
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + budget, order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
  std::memset(kept, 0, order.size());
  for (int64_t n = 0; n < budget; ++n) kept[order[n]] = 1;
  for (const Lora2Layer& l : layers) {
    for (int64_t i = 0; i < l.r; ++i) {
      l.E[i] *= kept[i];
      if (l.mask) l.mask[i] = kept[i];
    }
    kept += l.r;
  }
  return true;
}

namespace {

const GramKernels& gram_kernels() {
#if defined(__x86_64__) || defined(__i386__)
  if (tier() != Tier::kPortable) return avx2_gram();
#endif
  return portable_gram();
}

// One side of an adapter: w (k, n) is v, or Vᵀ where it lies as (n, k); t (r, k) is u, or Uᵀ likewise. `saved` holds
// k·k values of D, with which the gradient of w is D·w, then the gradient of t as it lies.
struct Pair {
  const float *w, *t;
  float *saved, *dw, *dt;
  int64_t n, r, k;
  bool transposed;
};

std::vector<Pair> pairs_of(const std::vector<Lora2Vectors>& layers, float* saved) {
  std::vector<Pair> pairs;
  for (const Lora2Vectors& l : layers) {
    float* const right = saved + l.k * (l.k + l.r);
    pairs.push_back({l.v, l.u, saved, l.dv, l.du, l.in, l.r, l.k, false});
    pairs.push_back({l.V, l.U, right, l.dV, l.dU, l.out, l.r, l.k, true});
    saved = right + l.k * (l.k + l.r);
  }
  return pairs;
}

typedef std::vector<double> Small;

// a·b, of a (m, k) and b (k, n)
Small multiply(const Small& a, const Small& b, int64_t m, int64_t n, int64_t k) {
  Small c(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < n; ++j) c[i * n + j] += a[i * k + l] * b[l * n + j];
  return c;
}

// Subtracts the identity; the squared Frobenius norm of what is left.
double subtract_identity(Small& m, int64_t size) {
  for (int64_t i = 0; i < size; ++i) m[i * size + i] -= 1;
  return std::inner_product(m.begin(), m.end(), m.begin(), 0.0);
}

// The penalty of a pair; fills what it saves. Needs gram_scratch(k).
double pair_penalty(const GramKernels& kernels, const Pair& pair, bool squared, float* scratch) {
  const int64_t r = pair.r, k = pair.k;
  Small t(r * k), tt(k * r), a(k * k);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t c = 0; c < k; ++c) t[i * k + c] = tt[c * r + i] = pair.t[pair.transposed ? c * r + i : i * k + c];
  kernels.gram(pair.w, pair.n, k, pair.transposed, a.data(), scratch);
  const double a_square = subtract_identity(a, k);
  Small g = multiply(tt, t, k, k, r);
  const double g_square = subtract_identity(g, k);
  Small dt = multiply(t, g, r, k, k);
  double value;
  if (squared) {
    Small ta = multiply(t, a, r, k, k);  // u·v·vᵀ
    for (int64_t i = 0; i < r * k; ++i) ta[i] += t[i];
    Small p = multiply(ta, tt, r, r, k);
    value = a_square + g_square + subtract_identity(p, r);
    g = multiply(tt, multiply(p, t, r, k, r), k, k, r);
    ta = multiply(p, ta, r, k, r);
    for (int64_t i = 0; i < k * k; ++i) a[i] = 4 * (a[i] + g[i]);
    for (int64_t i = 0; i < r * k; ++i) dt[i] = 4 * (dt[i] + ta[i]);
  } else {
    // The norm has no gradient at 0: take 0.
    const auto inverse = [](double square) { return square > 0 ? 2 / std::sqrt(square) : 0; };
    value = std::sqrt(a_square) + std::sqrt(g_square);
    for (double& entry : a) entry *= inverse(a_square);
    for (double& entry : dt) entry *= inverse(g_square);
  }
  std::copy(a.begin(), a.end(), pair.saved);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t c = 0; c < k; ++c) pair.saved[k * k + (pair.transposed ? c * r + i : i * k + c)] = dt[i * k + c];
  return value;
}

}  // namespace

double lora2_penalty(const std::vector<Lora2Vectors>& layers, float* saved, bool squared, int threads) {
  const GramKernels& kernels = gram_kernels();
  const std::vector<Pair> pairs = pairs_of(layers, saved);
  std::vector<double> values(pairs.size());
  std::atomic<size_t> next{0};
  parallel(forked() ? 1 : threads, [&](int, int) {
    std::vector<float> scratch;
    for (size_t index; (index = next++) < pairs.size();) {
      scratch.resize(gram_scratch(pairs[index].k));
      values[index] = pair_penalty(kernels, pairs[index], squared, scratch.data());
    }
  });
  // Summed in one order, whatever thread did what.
  return std::accumulate(values.begin(), values.end(), 0.0);
}

void lora2_penalty_backward(const std::vector<Lora2Vectors>& layers, const float* saved, float scale, int threads) {
  const GramKernels& kernels = gram_kernels();
  const std::vector<Pair> pairs = pairs_of(layers, const_cast<float*>(saved));
  std::atomic<size_t> next{0};
  parallel(forked() ? 1 : threads, [&](int, int) {
    std::vector<float> D;
    for (size_t index; (index = next++) < pairs.size();) {
      const Pair& pair = pairs[index];
      const int64_t k = pair.k, padded = gram_columns(k);
      D.assign(k * padded, 0);
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) D[i * padded + j] = scale * pair.saved[i * k + j];
      kernels.product(D.data(), pair.w, pair.n, k, pair.transposed, pair.dw);
      for (int64_t i = 0; i < pair.r * k; ++i) pair.dt[i] = scale * pair.saved[k * k + i];
    }
  });
}

}  // namespace nlora::cpu
