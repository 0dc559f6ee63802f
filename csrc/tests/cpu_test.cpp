// The CPU kernels over ragged shapes, every dtype and instruction set, against sums in double. Built with sanitizers by
// `python setup.py sanitize`: every buffer is as large as its matrix and not a byte larger.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/gemm.h"
#include "ops.h"

namespace {

using nlora::Dtype;
using nlora::Matrix;
using nlora::cpu::Tier;

double rounding(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 0x1p-24 : dtype == Dtype::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Values of a dtype are eighths and quarters, which all three hold exactly.
struct Tensor {
  Matrix view;
  std::unique_ptr<char[]> storage;
  std::vector<double> exact;

  double& operator()(int64_t i, int64_t j) { return exact[i * view.cols + j]; }
};

uint16_t half_bits(double value, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) {
    const float single = float(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    return uint16_t(bits >> 16);
  }
  if (value == 0) return 0;
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);
  return uint16_t((value < 0) << 15 | (exponent + 14) << 10 | int(fraction * 2048 - 1024));
}

double read(const Matrix& m, int64_t i, int64_t j) {
  const int64_t offset = i * m.row_stride + j * m.col_stride;
  if (m.dtype == Dtype::kFloat32) return static_cast<float*>(m.data)[offset];
  const uint16_t bits = static_cast<uint16_t*>(m.data)[offset];
  if (m.dtype == Dtype::kBFloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}

// `gap` elements lie between two rows; `flipped` stores the matrix by columns.
Tensor tensor(int64_t rows, int64_t cols, Dtype dtype, unsigned seed, bool random = true, int64_t gap = 0,
              bool flipped = false) {
  const int64_t outer = flipped ? cols : rows, inner = (flipped ? rows : cols) + gap;
  const int64_t size = outer && inner ? (outer - 1) * inner + inner - gap : 0, bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  Tensor t;
  t.storage.reset(new char[size * bytes]);
  std::memset(t.storage.get(), 0xff, size * bytes);
  t.view = {t.storage.get(), dtype, rows, cols, flipped ? 1 : inner, flipped ? inner : 1};
  t.exact.resize(rows * cols);
  uint32_t state = seed * 2654435761u + 1;
  for (int64_t i = 0; random && i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      state = state * 1664525u + 1013904223u;
      const double value = (int(state >> 24 & 15) - 8) / 8.0;
      const int64_t offset = i * t.view.row_stride + j * t.view.col_stride;
      t(i, j) = value;
      if (dtype == Dtype::kFloat32) {
        reinterpret_cast<float*>(t.storage.get())[offset] = float(value);
      } else {
        reinterpret_cast<uint16_t*>(t.storage.get())[offset] = half_bits(value, dtype);
      }
    }
  return t;
}

int failures = 0;

// Every element of `actual` against `exact`, where `size` bounds what was added up to an element.
void compare(const char* name, const Tensor& actual, const std::vector<double>& exact, double size, const char* where,
             int pieces = 3) {
  const double operands = pieces == 1 ? 0x1p-7 : pieces == 2 ? 0x1p-14 : 0;
  const double bound = size * (rounding(actual.view.dtype) * 2 + 0x1p-18 + operands);
  for (int64_t i = 0; i < actual.view.rows; ++i)
    for (int64_t j = 0; j < actual.view.cols; ++j) {
      const double value = read(actual.view, i, j), expected = exact[i * actual.view.cols + j];
      if (std::fabs(value - expected) <= bound) continue;
      std::printf("%s: %s(%d, %d) is %g, expected %g within %g\n", where, name, int(i), int(j), value, expected, bound);
      ++failures;
      return;
    }
}

std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, int64_t m, int64_t k, int64_t n,
                            double factor = 1, bool a_by_cols = false, bool b_by_cols = false) {
  std::vector<double> c(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) {
      const double left = factor * (a_by_cols ? a[p * m + i] : a[i * k + p]);
      for (int64_t j = 0; j < n; ++j) c[i * n + j] += left * (b_by_cols ? b[j * k + p] : b[p * n + j]);
    }
  return c;
}

std::vector<double> add(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

struct Shape {
  int64_t M, K, N, R;
};

// What stands between A and B.
enum class Between { kNothing, kN, kLora2 };

void check(const Shape& s, Dtype dtype, Dtype adapter, Between between, bool with_weight, bool strided, int threads,
           int pieces = 3, bool by_columns = false) {
  const auto [M, K, N, R] = s;
  char where[160];
  std::snprintf(
      where, sizeof where,
      "M=%d K=%d N=%d R=%d dtype=%d/%d core=%d weight=%d by_columns=%d strided=%d threads=%d pieces=%d tier=%d", int(M),
      int(K), int(N), int(R), int(dtype), int(adapter), int(between), with_weight, by_columns, strided, threads, pieces,
      int(nlora::cpu::tier()));
  const int64_t gap = strided ? 3 : 0;
  const float scaling = 0.5f;
  Tensor x = tensor(M, K, dtype, 1, true, gap), W = tensor(N, K, dtype, 2, true, gap, by_columns),
         A = tensor(R, K, adapter, 3);
  Tensor B = tensor(N, R, adapter, 4, true, gap, strided), C = tensor(R, R, adapter, 5, true, gap, strided);
  Tensor bias = tensor(1, N, dtype, 6), dy = tensor(M, N, dtype, 7, true, gap);
  const int64_t r = R + 3;
  Tensor u = tensor(r, R, adapter, 8, true, gap), E = tensor(1, r, adapter, 9),
         U = tensor(R, r, adapter, 10, true, gap, strided);
  Tensor mask = tensor(1, r, Dtype::kFloat32, 11);
  const Matrix weight = with_weight ? W.view : Matrix();
  const bool masked = !strided;
  std::vector<double> inner(R * R), weights = E.exact;
  nlora::cpu::Core core = {};
  double size = 1;  // bounds the sums of a row of `inner`
  if (between == Between::kN) {
    core.N = C.view, inner = C.exact, size = double(R);
  } else if (between == Between::kLora2) {
    core = {{}, u.view, E.view, U.view, masked ? mask.view : Matrix()};
    std::vector<double> scaled = U.exact;
    for (int64_t j = 0; masked && j < r; ++j) weights[j] *= mask.exact[j];
    for (int64_t i = 0; i < R * r; ++i) scaled[i] *= weights[i % r];
    inner = product(scaled, u.exact, R, r, R), size = double(R * r);
  } else {
    for (int64_t i = 0; i < R; ++i) inner[i * R + i] = 1;
  }

  Tensor y = tensor(M, N, dtype, 0, false), T = tensor(M, R, dtype, 0, false);
  nlora::cpu::forward({x.view, weight, A.view, B.view, core, bias.view, y.view, T.view, scaling, threads, pieces});
  const auto exact_T = product(x.exact, A.exact, M, K, R, 1, false, true);
  const auto P = product(exact_T, inner, M, R, R, scaling, false, true);
  auto exact_y = product(P, B.exact, M, R, N, 1, false, true);
  if (with_weight) exact_y = add(exact_y, product(x.exact, W.exact, M, K, N, 1, false, true));
  for (int64_t i = 0; i < M * N; ++i) exact_y[i] += bias.exact[i % N];
  const double wide = 2 + K + double(K) * R * size;
  compare("T", T, exact_T, 1 + K, where, pieces);
  compare("y", y, exact_y, wide, where, pieces);

  // Backward from the T that forward rounded.
  std::vector<double> kept(M * R);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < R; ++j) kept[i * R + j] = read(T.view, i, j);
  Tensor dx = tensor(M, K, dtype, 0, false), dW = tensor(N, K, dtype, 0, false), dA = tensor(R, K, adapter, 0, false);
  Tensor dB = tensor(N, R, adapter, 0, false), dC = tensor(R, R, adapter, 0, false);
  Tensor du = tensor(r, R, adapter, 0, false), dE = tensor(1, r, adapter, 0, false),
         dU = tensor(R, r, adapter, 0, false);
  nlora::cpu::Core dcore = {};
  if (between == Between::kN) dcore.N = dC.view;
  if (between == Between::kLora2) dcore.u = du.view, dcore.E = dE.view, dcore.U = dU.view;
  nlora::cpu::backward({dy.view, x.view, T.view, weight, A.view, B.view, core, dx.view, dW.view, dA.view, dB.view,
                        dcore, scaling, threads, pieces});
  const auto G = product(dy.exact, B.exact, M, N, R);
  const auto H = product(G, inner, M, R, R, scaling);
  auto exact_dx = product(H, A.exact, M, R, K);
  if (with_weight) exact_dx = add(exact_dx, product(dy.exact, W.exact, M, N, K));
  compare("dx", dx, exact_dx, 1 + N + N * R * size, where, pieces);
  compare("dW", dW, product(dy.exact, x.exact, N, M, K, 1, true), 1 + M, where, pieces);
  compare("dA", dA, product(H, x.exact, R, M, K, 1, true), 1 + M * N * size, where, pieces);
  const auto kept_P = product(kept, inner, M, R, R, scaling, false, true);
  compare("dB", dB, product(dy.exact, kept_P, N, M, R, 1, true), 1 + M * K * size, where, pieces);
  const auto dN = product(G, kept, R, M, R, scaling, true);
  const double dN_size = 1 + double(M) * N * K;
  if (between == Between::kN) compare("dN", dC, dN, dN_size, where, pieces);
  if (between == Between::kLora2) {
    // dU = dN·uᵀ·diag(e), du = diag(e)·Uᵀ·dN, dE = mask ⊙ diag(Uᵀ·dN·uᵀ)
    auto exact_dU = product(dN, u.exact, R, R, r, 1, false, true), exact_du = product(U.exact, dN, r, R, R, 1, true);
    std::vector<double> exact_dE(r);
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < R; ++j) {
        exact_dE[i] += exact_du[i * R + j] * u(i, j) * (masked ? mask(0, i) : 1);
        exact_du[i * R + j] *= weights[i], exact_dU[j * r + i] *= weights[i];
      }
    compare("dU", dU, exact_dU, dN_size * R, where, pieces);
    compare("du", du, exact_du, dN_size * R, where, pieces);
    compare("dE", dE, exact_dE, dN_size * R * R, where, pieces);
  }
}

// Layers of so many columns each that share x, forward and backward.
void check_group(int64_t M, int64_t K, const std::vector<int64_t>& widths, Dtype dtype, int threads, int pieces) {
  const int64_t R = 4;
  const float scaling = 0.5f;
  struct Member {
    Tensor W, A, B, dy, y, T, dA, dB;
  };
  std::vector<Member> members;
  std::vector<nlora::cpu::Forward> forwards;
  std::vector<nlora::cpu::Backward> backwards;
  const Tensor x = tensor(M, K, dtype, 1), dx = tensor(M, K, dtype, 0, false);
  for (const int64_t N : widths) {
    const unsigned seed = 10 * unsigned(members.size());
    members.push_back({tensor(N, K, dtype, seed + 2), tensor(R, K, dtype, seed + 3), tensor(N, R, dtype, seed + 4),
                       tensor(M, N, dtype, seed + 5), tensor(M, N, dtype, 0, false), tensor(M, R, dtype, 0, false),
                       tensor(R, K, dtype, 0, false), tensor(N, R, dtype, 0, false)});
    const Member& m = members.back();
    forwards.push_back({x.view, m.W.view, m.A.view, m.B.view, {}, {}, m.y.view, m.T.view, scaling, threads, pieces});
    backwards.push_back({m.dy.view,
                         x.view,
                         m.T.view,
                         m.W.view,
                         m.A.view,
                         m.B.view,
                         {},
                         {},
                         {},
                         m.dA.view,
                         m.dB.view,
                         {},
                         scaling,
                         threads,
                         pieces});
  }
  nlora::cpu::forward_group(forwards);
  nlora::cpu::backward_group(backwards, dx.view);
  std::vector<double> exact_dx(M * K);
  double columns = 1;
  for (size_t i = 0; i < members.size(); ++i) {
    const Member& m = members[i];
    const int64_t N = widths[i];
    char where[160];
    std::snprintf(where, sizeof where, "member %d of %d: M=%d K=%d N=%d dtype=%d threads=%d pieces=%d tier=%d", int(i),
                  int(widths.size()), int(M), int(K), int(N), int(dtype), threads, pieces, int(nlora::cpu::tier()));
    const auto T = product(x.exact, m.A.exact, M, K, R, scaling, false, true);
    const auto H = product(m.dy.exact, m.B.exact, M, N, R, scaling);
    const auto y =
        add(product(x.exact, m.W.exact, M, K, N, 1, false, true), product(T, m.B.exact, M, R, N, 1, false, true));
    compare("y", m.y, y, 1 + K + double(K) * R, where, pieces);
    compare("dA", m.dA, product(H, x.exact, R, M, K, 1, true), 1 + double(M) * N, where, pieces);
    compare("dB", m.dB, product(m.dy.exact, T, N, M, R, 1, true), 1 + double(M) * K, where, pieces);
    exact_dx = add(exact_dx, add(product(m.dy.exact, m.W.exact, M, N, K), product(H, m.A.exact, M, R, K)));
    columns += N + N * R;
  }
  compare("dx", dx, exact_dx, columns, "a group", pieces);
}

// weight += left·right where it is done, and nothing where it is left to the library.
void check_add_product(int64_t N, int64_t K, int64_t R, int64_t gap, int threads) {
  const Tensor left = tensor(N, R, Dtype::kFloat32, 1), right = tensor(R, K, Dtype::kFloat32, 2, true, gap);
  const Tensor weight = tensor(N, K, Dtype::kFloat32, 3, true, gap);
  const bool done = nlora::cpu::add_product(weight.view, left.view, right.view, threads);
  const std::vector<double> sum = add(product(left.exact, right.exact, N, R, K), weight.exact);
  compare("weight", weight, done ? sum : weight.exact, R + 1.0, done ? "add_product" : "nothing");
}

// Every value of a 16-bit dtype to fp32 and back, and the fp32 values halfway between two of them, which round to even.
void check_conversions(Dtype dtype) {
  const auto& kernel = nlora::cpu::kernels();
  const int64_t n = 1 << 16;
  std::vector<uint16_t> all(n), rounded(n);
  std::vector<float> wide(n), halfway(n);
  for (int64_t i = 0; i < n; ++i) all[i] = uint16_t(i);
  const Matrix narrow = {all.data(), dtype, 1, n, n, 1}, to = {rounded.data(), dtype, 1, n, n, 1};
  nlora::cpu::copy(kernel, narrow, {wide.data(), Dtype::kFloat32, 1, n, n, 1});
  kernel.round(wide.data(), n, to);
  const int infinity = dtype == Dtype::kFloat16 ? 0x7c00 : 0x7f80;
  for (int64_t i = 0; i < n; ++i) {
    const int magnitude = i & 0x7fff;
    const bool as_it_was = magnitude < infinity ? wide[i] == read(narrow, 0, i) : std::isinf(wide[i]);
    const bool right =
        magnitude > infinity ? std::isnan(wide[i]) && (rounded[i] & 0x7fff) > infinity : as_it_was && rounded[i] == i;
    if (!right) std::printf("dtype=%d: %04x became %g and %04x\n", int(dtype), int(i), wide[i], rounded[i]), ++failures;
    halfway[i] = magnitude + 1 < infinity ? float((read(narrow, 0, i) + read(narrow, 0, i + 1)) / 2) : 0;
  }
  kernel.round(halfway.data(), n, to);
  for (int64_t i = 0; i < n; ++i) {
    if (!halfway[i] || rounded[i] == i + (i & 1)) continue;
    std::printf("dtype=%d: %g became %04x\n", int(dtype), halfway[i], rounded[i]), ++failures;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 1 && !std::strcmp(argv[1], "--long");
  std::vector<Shape> shapes = {{0, 5, 3, 2},      {1, 1, 1, 1},       {1, 33, 17, 5},    {2, 1, 49, 3},
                               {16, 65, 1, 8},    {17, 31, 47, 7},    {33, 130, 97, 9},  {50, 70, 100, 33},
                               {130, 300, 60, 4}, {17, 2100, 200, 3}, {18, 400, 900, 2}, {20, 50, 60, 200},
                               {66, 1400, 90, 3}, {70, 100, 50, 65},  {7, 80, 110, 37}};
  if (all)
    for (int64_t M : {1, 16, 17, 65})
      for (int64_t K : {1, 16, 129, 513})
        for (int64_t N : {1, 47, 49, 200})
          for (int64_t R : {1, 8, 33}) shapes.push_back({M, K, N, R});
  int checks = 0, team = 0;
  nlora::cpu::parallel(3, [&](int index, int count) {
    if (!index) team = count;
  });
  if (team != 3) return std::printf("expected a team of 3 threads, got %d\n", team), 1;
  for (Tier tier : {Tier::kPortable, Tier::kNeon, Tier::kAvx2, Tier::kAvx512, Tier::kAmx}) {
    nlora::cpu::cap_tier(tier);
    if (nlora::cpu::tier() != tier) continue;
    for (Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) check_conversions(dtype);
    for (const Shape& s : shapes)
      for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
        // Each shape takes another combination of the rest; over the shapes all of them come.
        const unsigned mix = unsigned(checks++) * 2654435761u >> 24;
        const Dtype adapter = mix & 1 ? dtype : Dtype::kFloat32;
        const Between between = mix & 2 ? mix & 16 ? Between::kLora2 : Between::kN : Between::kNothing;
        check(s, dtype, adapter, between, true, mix & 4, mix & 8 ? 1 : 3);
        check(s, dtype, adapter, between, false, mix & 4, mix & 8 ? 3 : 1);
        check(s, dtype, adapter, between, true, mix & 8, mix & 4 ? 1 : 3, mix & 32 ? 1 : 2);
        check(s, dtype, adapter, between, true, mix & 32, mix & 64 ? 1 : 3, mix & 128 ? 1 : 3, true);
      }
    // Parts of members that are one block of columns where the whole member is two, by several runs over k.
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
      for (int threads : {2, 3}) {
        check_group(17 + threads, 900, {900, 130, 128}, dtype, threads, threads == 2 ? 1 : 3);
        check_group(16 + threads, 580, {576, 192, 192}, dtype, threads, threads == 2 ? 3 : 1);
        check_group(15, 70, {50, 1, 97}, dtype, threads, 3);
      }
    for (int64_t R : {8, 33, 160, 161})
      for (const Shape& s : {Shape{0, 5, 3, 0}, {0, 48, 8, 0}, {0, 16, 7, 0}, {0, 150, 130, 0}, {0, 97, 517, 0}})
        check_add_product(s.N, s.K, R, R % 3, 1 + R % 2);
  }
  std::printf("%d shapes and dtypes, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
