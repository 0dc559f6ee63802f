// Every launcher of the extension. Tensors come as Matrix views; shapes are those of nn.Linear:
//   x (M, K)   weight (N, K)   bias (1, N)   A (R, K)   core (R, R), the N of the papers   B (N, R)
//   y (M, N)   T (M, R)        dy (M, N)
// A Matrix without data is an argument or a result that is not there. Checks are made in Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nlora {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;  // in elements

  explicit operator bool() const { return data != nullptr; }
};

namespace cpu {

// A frozen W (N, K) in few bits: each value is that of its code times a scale, in fp32.
enum class Codes : int {
  kNibbles,      // two a byte, the first in the high half; rows follow one another without a gap
  kInterleaved,  // [N / 32][K / 2] times 32 rows of 2 codes: in byte i row i / 2, and in its high half row 16 + i / 2
  kBytes,  // of 256 values
  kInt8,  // its own value
};
struct Quantised {
  Codes layout;
  const uint8_t* codes;
  int64_t rows, cols;
  const float* values;  // 16 or 256 of them
  // Of `block` codes. Where row_stride is 0, blocks are cut from the codes of all rows in sequence.
  const void* scales;
  Dtype scale_dtype;
  int64_t block, row_stride, block_stride;
  // Where they are there, a scale is nested_values[its byte]·nested_scales[its place / nested_block] + *offset.
  const float *nested_values, *nested_scales, *offset;
  int64_t nested_block;
};
// W as an operand: dense, or of that shape without data of its own.
struct Weight : Matrix {
  const Quantised* quantised = nullptr;

  Weight() = default;
  Weight(const Matrix& dense) : Matrix(dense) {}
  explicit Weight(const Quantised& q)
      : Matrix{const_cast<uint8_t*>(q.codes), Dtype::kFloat32, q.rows, q.cols, q.cols, 1}, quantised(&q) {}
};
// to = W from (row, col) on.
void dequantise(const Quantised& weight, int64_t row, int64_t col, const Matrix& to, int threads);

// In ascending order: every CPU has kPortable, one of Arm kNeon, one of x86 some of the others.
enum class Tier : int { kPortable, kNeon, kAvx2, kAvx512, kAmx };

// The best instruction set this CPU has, not above the cap.
Tier tier();
// Lets tests and benchmarks run the code of a lesser CPU; returns the cap before.
Tier cap_tier(Tier cap);
// Whether this CPU multiplies bf16 (avx512_bf16, amx_bf16, Arm's bf16) or fp16 (avx512_fp16, amx_fp16, Arm's asimdhp) in
// hardware.
bool multiplies(Dtype dtype);
// Bytes of a core's second-level cache, or a guess that fits most.
int64_t second_level_cache();
// True in a child of fork(), where OpenMP has lost its threads: everything below then runs on the calling thread.
bool forked();
// Ends the threads that OpenMP keeps for the calling thread, which has new ones when it needs some again.
void release_team();

// The matrix between A and B: N (R, R); or, where u is there, that of LoRA², U·diag(E ⊙ mask)·u of u (r, R), E and
// mask (1, r) and U (R, r), of which the mask may be missing; or none.
struct Core {
  Matrix N, u, E, U, mask;

  explicit operator bool() const { return N || u; }
};

// T = x·Aᵀ, y = x·Wᵀ + bias + s·(T·Nᵀ)·Bᵀ. Without weight y holds all but x·Wᵀ, and without A that and the bias alone.
// `pieces`, here and below: how many values of bf16 stand for one of fp32 in large products, at least. Three hold every bit.
struct Forward {
  Matrix x;
  Weight weight;
  Matrix A, B;
  Core core;
  Matrix bias;
  Matrix y, T;
  float scaling;
  int threads, pieces;
};
void forward(Forward f);

// G = dy·B, H = s·G·N, dx = dy·W + H·A, dA = Hᵀ·x, dB = s·dyᵀ·(T·Nᵀ), dN = s·Gᵀ·T, dW = dyᵀ·x, those that are
// there; of LoRA²'s du, dE and dU all or none. Without weight dx holds H·A alone.
struct Backward {
  Matrix dy, x, T;
  Weight weight;
  Matrix A, B;
  Core core;
  Matrix dx, dweight, dA, dB;
  Core dcore;
  float scaling;
  int threads, pieces;
};
void backward(Backward b);

// The same of layers that share x, all with weight or all without; one without A has no adapter, and a core is an N.
// dx = Σ dy·W + H·A
void forward_group(std::vector<Forward> members);
void backward_group(std::vector<Backward> members, const Matrix& dx);

// Matrices of one shape and dtype, one of each expert, `stride` elements apart; of vectors each is a row.
struct Stack {
  Matrix first;
  int64_t stride = 0;

  explicit operator bool() const { return bool(first); }
};

// `forward` of every expert e with its rows of x, y and T, those from ends[e - 1] to ends[e].
struct ExpertsForward {
  std::vector<int64_t> ends;
  Matrix x;
  Stack weight, A, B, N, bias;
  Matrix y, T;
  float scaling;
  int threads, pieces;
};
void forward_experts(const ExpertsForward& f);

// `backward` of every expert; without rows its gradients are zero.
struct ExpertsBackward {
  std::vector<int64_t> ends;
  Matrix dy, x, T;
  Stack weight, A, B, N;
  Matrix dx;
  Stack dweight, dA, dB, dN;
  float scaling;
  int threads, pieces;
};
void backward_experts(const ExpertsBackward& b);

// out = U·diag(E ⊙ mask)·u, and the gradients of u, E and U from that of N.
void lora2_core(const Core& core, const Matrix& out);
void lora2_core_backward(const Matrix& dN, const Core& core, const Core& dcore);

// weight (N, K) += left (N, R)·right (R, K), all fp32 and weight with its columns side by side. False, with nothing done,
// where the library does it faster.
bool add_product(const Matrix& weight, const Matrix& left, const Matrix& right, int threads);

// LoRA² training, over all layers of a model. Everything is contiguous fp32.
// The scored tensors of an adapter, E (r), u (r, k), U (k, r), their gradients, nullptr for zero, and the mask (r) if it
// is to be written.
struct Lora2Layer {
  float *E, *u, *U, *mask;
  const float *dE, *du, *dU;
  int64_t r, k;
};
// Moves the averages (per layer those of E, u and U), then keeps the `budget` values of highest score, if it is not
// negative. False, with nothing changed, if a product w·∂w is not finite.
bool lora2_allocate(const std::vector<Lora2Layer>& layers, float* exp_avg, float* exp_unc, uint8_t* kept, float beta1,
                    float beta2, bool scoring, int64_t budget);

// The vectors of an adapter, v (k, in), u (r, k), V (out, k), U (k, r), and where their gradients go.
struct Lora2Vectors {
  const float *v, *u, *V, *U;
  float *dv, *du, *dV, *dU;
  int64_t in, out, r, k;
};
// The penalty of penalty.py in its form "paper" where `squared`, else the sum of norms of which "reference" is the mean.
// `saved`, for the gradients, takes 2k(k + r) values a layer.
double lora2_penalty(const std::vector<Lora2Vectors>& layers, float* saved, bool squared, int threads);
// The gradients times scale.
void lora2_penalty_backward(const std::vector<Lora2Vectors>& layers, const float* saved, float scale, int threads);

}  // namespace cpu

// Launches on one stream; nothing waits for the device. Workspaces are the caller's.
namespace cuda {

struct Queue {
  int device;
  void* stream;
};

// A layer as on the CPU, with A, B and core, and dA, dB and dcore, of any dtype, all else of one 16-bit dtype. Without A
// it has no adapter. Where x or T would not be used, it may be missing.
struct Forward {
  Matrix x, weight, A, B, core, bias;
  Matrix y, T;
  float scaling;
};
struct Backward {
  Matrix dy, x, T, weight, A, B, core;
  Matrix dx, dA, dB, dcore;
  float scaling;
};

// Size of the workspace of a forward, and of a backward that makes these gradients; those of a group are added up.
int64_t forward_bytes(int64_t k, int64_t n, int64_t r);
int64_t backward_bytes(const Queue& queue, int64_t m, int64_t k, int64_t n, int64_t r, bool dA, bool dB, bool dcore);

// Bytes a cycle that one processor gets from the L2 cache when all ask: what the plans of later products go by, 40 at
// first.
void set_bytes_per_cycle(double bytes);

// y = x·Wᵀ + bias, the products of a layer without its adapter: what benchmarks hold against the library.
void linear(const Queue& queue, const Matrix& x, const Matrix& weight, const Matrix& bias, const Matrix& y);
// Up to 4 layers that share x, and dx, which is their sum.
void forward(const Queue& queue, const Forward* layers, size_t count, const Matrix& workspace);
void backward(const Queue& queue, const Backward* layers, size_t count, const Matrix& workspace);

// As on the CPU, in any dtypes.
void lora2_core(const Queue& queue, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                const Matrix& core);
void lora2_core_backward(const Queue& queue, const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U,
                         const Matrix& mask, const Matrix& du, const Matrix& dE, const Matrix& dU);

// A = W[rows, :], core = W[rows][:, cols], B = W[:, cols], for layers of one shape.
void gather(const Queue& queue, const std::vector<Matrix>& weight, const std::vector<const int64_t*>& rows,
            const std::vector<const int64_t*>& cols, const std::vector<Matrix>& A, const std::vector<Matrix>& core,
            const std::vector<Matrix>& B);
// W ← W − s·B·core·A in place, for layers of one shape; core may be empty. `terms` holds residual_bytes().
int64_t residual_bytes(const Matrix& weight, const Matrix& A, int64_t layers);
void residual(const Queue& queue, const std::vector<Matrix>& weight, const std::vector<Matrix>& A,
              const std::vector<Matrix>& core, const std::vector<Matrix>& B, const Matrix& terms, float scaling);

}  // namespace cuda
}  // namespace nlora
