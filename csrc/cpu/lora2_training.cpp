// LoRA² training: the rank allocator's step and the orthogonality penalty, over all layers of a model in one call.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "ops.h"

namespace nlora::cpu {
namespace {

// Sums run in fp32 over this many terms, and in double over the blocks.
constexpr int64_t kBlock = 256;

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
  std::nth_element(order.begin(), order.begin() + budget, order.end(), [&](int64_t a, int64_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
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

void add_scaled(const float* __restrict x, float scale, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

// w·wᵀ, (k, k): from w (k, n), or from its transpose (n, k).
void gram(const Lora2Pair& p, std::vector<double>& out, std::vector<float>& block) {
  const int64_t k = p.k, n = p.n;
  out.assign(k * k, 0);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    if (p.transposed) {
      block.assign(k * k, 0);
      for (int64_t row = start; row < end; ++row)
        for (int64_t i = 0; i < k; ++i) add_scaled(p.w + row * k, p.w[row * k + i], k, &block[i * k]);
      for (int64_t ij = 0; ij < k * k; ++ij) out[ij] += block[ij];
      continue;
    }
    for (int64_t i = 0; i < k; ++i) {
      const float* a = p.w + i * n;
      for (int64_t j = i; j < k; ++j) {
        const float* b = p.w + j * n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = start; c < end; ++c) sum += a[c] * b[c];
        out[i * k + j] = out[j * k + i] += sum;
      }
    }
  }
}

// C (m, n) = a (m, k)·b (k, n), each of them as stored or transposed.
void multiply(const double* a, bool a_transposed, const double* b, bool b_transposed, int64_t m, int64_t n, int64_t k,
              double* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += (a_transposed ? a[l * m + i] : a[i * k + l]) * (b_transposed ? b[j * k + l] : b[l * n + j]);
      c[i * n + j] = sum;
    }
}

// Subtracts the identity; the squared Frobenius norm of what is left.
double subtract_identity(std::vector<double>& m, int64_t size) {
  for (int64_t i = 0; i < size; ++i) m[i * size + i] -= 1;
  return std::inner_product(m.begin(), m.end(), m.begin(), 0.0);
}

}  // namespace

double lora2_penalty(const std::vector<Lora2Pair>& pairs, bool squared, int threads) {
  std::vector<double> values(pairs.size());
#pragma omp parallel num_threads(forked() ? 1 : threads)
  {
    std::vector<float> block;
    std::vector<double> t, a, g, ta, p, pt, dt;
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < pairs.size(); ++index) {
      const Lora2Pair& pair = pairs[index];
      const int64_t r = pair.r, k = pair.k;
      const auto at = [&](int64_t i, int64_t c) { return pair.transposed ? c * r + i : i * k + c; };
      t.resize(r * k);
      for (int64_t i = 0; i < r; ++i)
        for (int64_t c = 0; c < k; ++c) t[i * k + c] = pair.t[at(i, c)];
      for (auto* m : {&ta, &pt, &dt}) m->resize(r * k);
      gram(pair, a, block);
      if (squared) multiply(t.data(), false, a.data(), false, r, k, k, ta.data());  // u·v·vᵀ
      const double a_square = subtract_identity(a, k);
      g.resize(k * k);
      multiply(t.data(), true, t.data(), false, k, k, r, g.data());
      const double g_square = subtract_identity(g, k);
      multiply(t.data(), false, g.data(), false, r, k, k, dt.data());
      if (squared) {
        p.resize(r * r);
        multiply(ta.data(), false, t.data(), true, r, r, k, p.data());
        values[index] = a_square + g_square + subtract_identity(p, r);
        multiply(p.data(), false, t.data(), false, r, k, r, pt.data());
        multiply(t.data(), true, pt.data(), false, k, k, r, g.data());
        for (int64_t c = 0; c < k * k; ++c) pair.D[c] = 4 * (a[c] + g[c]);
        multiply(p.data(), false, ta.data(), false, r, k, r, pt.data());
        for (int64_t c = 0; c < r * k; ++c) dt[c] = 4 * (dt[c] + pt[c]);
      } else {
        // The norm has no gradient at 0: take 0.
        const auto inverse = [](double square) { return square > 0 ? 2 / std::sqrt(square) : 0; };
        values[index] = std::sqrt(a_square) + std::sqrt(g_square);
        for (int64_t c = 0; c < k * k; ++c) pair.D[c] = inverse(a_square) * a[c];
        for (double& value : dt) value *= inverse(g_square);
      }
      for (int64_t i = 0; i < r; ++i)
        for (int64_t c = 0; c < k; ++c) pair.dt[at(i, c)] = dt[i * k + c];
    }
  }
  // Summed in one order, whatever thread did what.
  return std::accumulate(values.begin(), values.end(), 0.0);
}

void lora2_penalty_backward(const std::vector<Lora2Pair>& pairs, float scale, int threads) {
#pragma omp parallel num_threads(forked() ? 1 : threads)
  {
    std::vector<float> D;
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < pairs.size(); ++index) {
      const Lora2Pair& pair = pairs[index];
      const int64_t k = pair.k, n = pair.n;
      D.assign(pair.D, pair.D + k * k);
      for (float& value : D) value *= scale;
      std::memset(pair.dw, 0, k * n * sizeof(float));
      if (pair.transposed) {
        for (int64_t row = 0; row < n; ++row)
          for (int64_t i = 0; i < k; ++i)
            add_scaled(&D[i * k], pair.w[row * k + i], k, pair.dw + row * k);
        continue;
      }
      for (int64_t start = 0; start < n; start += kBlock)
        for (int64_t i = 0; i < k; ++i)
          for (int64_t j = 0; j < k; ++j)
            add_scaled(pair.w + j * n + start, D[i * k + j], std::min(kBlock, n - start), pair.dw + i * n + start);
    }
  }
}

}  // namespace nlora::cpu
