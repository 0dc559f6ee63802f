// W ← W − s·B·N·A in place, batched over layers of one shape, one pass over W.
//
// fp32 accuracy from bf16 products: a number is the sum of bf16 terms of 8 bits each, and a product the sum of those
// products of terms that matter. Two terms of −s·B·N are far below the rounding of a 16-bit W, three below that of an
// fp32 one; A has as many as its dtype needs. split_kernel writes the terms, residual_kernel multiplies them.
#pragma once

#include <stdexcept>
#include <string>

#include "context.cuh"
#include "nystrom.h"
#include "strided.cuh"

namespace nlora::cuda {

struct SplitProblem {
  const void *A[kMaxLayers], *core[kMaxLayers], *B[kMaxLayers];   // contiguous
  Dtype a_dtype, core_dtype, b_dtype;
  bf16* terms;                 // per layer: left terms (out, width), then right terms (width, columns)
  uint64_t layer_stride;       // elements
  uint32_t out, in, r, width, columns, left_terms, right_terms;
  uint32_t left_blocks, right_blocks;   // of one layer
  float scaling;
  bool has_core;
};

// Σ of to[0], to[stride], … as far as there are terms: 8 numbers at a time.
__device__ __forceinline__ void store_terms(bf16* to, uint64_t stride, uint32_t terms, Eight value) {
  for (uint32_t t = 0; t < terms; ++t) {
    const Words4 words = rounded<bf16>(value);
    st_global(reinterpret_cast<Words4*>(to + t * stride), words);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      value.v[i] -= to_float(bf16{uint16_t(words.v[i / 2] >> i % 2 * 16)});
    }
  }
}

struct SplitTile : StridedTile {
  // Pieces of 8 of A that a thread loads before it stores the first, and those of a block.
  static constexpr uint32_t kBatch = 4, kPieces = kBatch * kThreads;
};

// Rows of a matrix in any strides.
__device__ __forceinline__ auto elements_of(const Matrix& matrix) {
  return single_elements([matrix](uint32_t row, uint32_t column) {
    return row < matrix.rows && column < matrix.cols ? element(matrix, row, column) : 0.0f;
  });
}

// The terms of one tile of −s·B·N.
template <class Tile>
__device__ __forceinline__ void split_left(const SplitProblem& p, const Matrix& B, const Matrix& core, bf16* terms,
                                           uint32_t block) {
  const StridedGrid grid(p.width);
  const uint32_t row0 = grid.row(block), column0 = grid.column(block);
  const auto store = [&](uint32_t row, uint32_t column, Eight value) {
    row += row0;
    column += column0;
    if (row < p.out && column < p.width) {
      store_terms(terms + uint64_t(row) * p.width + column, uint64_t(p.out) * p.width, p.left_terms,
                  times(-p.scaling, value));
    }
  };
  if (!p.has_core) {
    const auto copy = [&](auto left) {
      Eight values[Tile::kEights];
      uint32_t i = 0;
      Tile::for_eights([&](uint32_t row, uint32_t column) { values[i++] = left(row0 + row, column0 + column); });
      i = 0;
      Tile::for_eights([&](uint32_t row, uint32_t column) { store(row, column, values[i++]); });
    };
    has_wide_rows(B) ? with_wide_rows(B, copy) : copy(elements_of(B));
    return;
  }
  Tile tile;
  const auto multiply = [&](auto left, auto right) {
    tile.multiply(
        p.r, [&](uint32_t row, uint32_t k) { return left(row0 + row, k); },
        [&](uint32_t k, uint32_t column) { return right(k, column0 + column); });
  };
  if (has_wide_rows(B) && has_wide_rows(core)) {
    with_wide_rows(B, [&](auto left) { with_wide_rows(core, [&](auto right) { multiply(left, right); }); });
  } else {
    multiply(elements_of(B), elements_of(core));
  }
  tile.store_eights(store);
}

// The terms of some pieces of A, which are counted through its rows.
template <class Tile>
__device__ __forceinline__ void split_right(const SplitProblem& p, const Matrix& A, bf16* terms, uint32_t block) {
  const uint32_t across = p.columns / 8, first = block * Tile::kPieces + thread_rank();
  const auto split = [&](auto rows) {
    Eight values[Tile::kBatch];
#pragma unroll
    for (uint32_t i = 0; i < Tile::kBatch; ++i) {
      const uint32_t piece = first + i * Tile::kThreads;
      values[i] = rows(piece / across, piece % across * 8);
    }
#pragma unroll
    for (uint32_t i = 0; i < Tile::kBatch; ++i) {
      const uint32_t piece = first + i * Tile::kThreads;
      if (piece < p.width * across) {
        store_terms(terms + uint64_t(piece) * 8, uint64_t(p.width) * p.columns, p.right_terms, values[i]);
      }
    }
  };
  has_wide_rows(A) ? with_wide_rows(A, split) : split(elements_of(A));
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 4) split_kernel(const __grid_constant__ SplitProblem p) {
  const uint32_t blocks = p.left_blocks + p.right_blocks;
  const uint32_t layer = block_rank() / blocks, block = block_rank() % blocks;
  bf16* terms = p.terms + layer * p.layer_stride;
  const auto contiguous = [](const void* data, Dtype dtype, uint32_t rows, uint32_t columns) {
    return Matrix{const_cast<void*>(data), dtype, rows, columns, columns, 1};
  };
  if (block < p.left_blocks) {
    split_left<Tile>(p, contiguous(p.B[layer], p.b_dtype, p.out, p.r),
                     contiguous(p.core[layer], p.core_dtype, p.r, p.r), terms, block);
  } else {
    split_right<Tile>(p, contiguous(p.A[layer], p.a_dtype, p.r, p.in), terms + uint64_t(p.left_terms) * p.out * p.width,
                      block - p.left_blocks);
  }
}

template <class T>
struct ResidualProblem {
  T* weight[kMaxLayers];   // rows of 16-byte alignment
  const bf16* terms;       // as split_kernel leaves them
  uint64_t layer_stride;
  int64_t row_stride;
  uint32_t out, in, width, columns, right_terms;
};

// 128 rows by 128 columns of a 16-bit W, or by 64 of an fp32 one: 8 warps as 2 × 4 hold 64 rows each.
template <class T>
struct ResidualTile {
  static constexpr uint32_t kThreads = 256, kRows = 128, kColumns = 256 / sizeof(T), kStages = sizeof(T) == 4 ? 2 : 3;
  static constexpr uint32_t kWarpColumns = kColumns / 4, kBlocks = kWarpColumns / 8;
  static constexpr uint32_t kTerms = sizeof(T) == 4 ? 3 : 2;
  // Small products have a sum of their own in fp32, or each of them would cost the large sum a rounding.
  static constexpr uint32_t kSums = sizeof(T) == 4 ? 2 : 1;
  // Rows are a little longer than their contents, so that ldmatrix and the accumulators meet every bank once.
  static constexpr uint32_t kLeftPitch = 48, kRightPitch = kColumns * 2 + 16, kWeightPitch = 256 + 16;
  static constexpr uint32_t kBytesLeft = kRows * kLeftPitch, kBytesRight = 16 * kRightPitch;
  static constexpr uint32_t kBytesStage = kTerms * (kBytesLeft + kBytesRight);
  static constexpr uint32_t kWeightAt = kStages * kBytesStage;
  static constexpr uint32_t kSharedBytes = kWeightAt + kRows * kWeightPitch;
  static_assert(kSharedBytes + kSharedAlignment <= 99 * 1024, "more than a block can have on sm_86 and sm_89");
};

constexpr uint32_t kCopyThreads = 256;

// Copies a tile of 16-byte pieces, `pieces` a row; piece(row, i) gives the source and how many bytes of it there are.
template <class Piece>
__device__ __forceinline__ void copy_tile(uint32_t to, uint32_t pitch, uint32_t rows, uint32_t pieces, Piece piece) {
  for (uint32_t at = thread_rank(); at < rows * pieces; at += kCopyThreads) {
    const uint32_t row = at / pieces, i = at % pieces;
    const auto [from, bytes] = piece(row, i);
    cp_async(to + row * pitch + i * 16, from, bytes);
  }
}

struct Piece {
  const void* from;
  uint32_t bytes;
};

// The terms' columns (of left) and rows (of right) k … k + 15, zero beyond the edges.
template <class T>
__device__ __forceinline__ void load_terms(uint32_t stage, const bf16* left, const bf16* right, uint32_t row,
                                           uint32_t column, uint32_t k, const ResidualProblem<T>& p) {
  using Tile = ResidualTile<T>;
  for (uint32_t t = 0; t < Tile::kTerms; ++t) {
    const bf16* term = left + uint64_t(t) * p.out * p.width;
    copy_tile(stage + t * Tile::kBytesLeft, Tile::kLeftPitch, Tile::kRows, 2, [&](uint32_t i, uint32_t piece) {
      const bool inside = row + i < p.out;
      return Piece{term + (inside ? uint64_t(row + i) * p.width + k + piece * 8 : 0), inside ? 16u : 0u};
    });
  }
  stage += Tile::kTerms * Tile::kBytesLeft;
  for (uint32_t t = 0; t < p.right_terms; ++t) {
    const bf16* term = right + uint64_t(t) * p.width * p.columns;
    copy_tile(stage + t * Tile::kBytesRight, Tile::kRightPitch, 16, Tile::kColumns / 8,
              [&](uint32_t i, uint32_t piece) {
                const bool inside = column + piece * 8 < p.columns;
                return Piece{term + (inside ? uint64_t(k + i) * p.columns + column + piece * 8 : 0), inside ? 16u : 0u};
              });
  }
}

// acc[0] += left term 0 · right term 0 over 16 k, and the last of acc += the other pairs (i, j) with i + j < kTerms.
template <class T>
__device__ __forceinline__ void multiply_terms(float (&acc)[ResidualTile<T>::kSums][4][ResidualTile<T>::kBlocks][4],
                                               uint32_t stage, uint32_t right_terms) {
  using Tile = ResidualTile<T>;
  const uint32_t lane = lane_rank(), warp = warp_rank();
  const uint32_t left = stage + (warp / 4 * 64 + lane % 16) * Tile::kLeftPitch + lane / 16 * 16;
  const uint32_t right = stage + Tile::kTerms * Tile::kBytesLeft + lane % 16 * Tile::kRightPitch +
                         (warp % 4 * Tile::kWarpColumns + lane / 16 * 8) * 2;
#pragma unroll
  for (uint32_t j = 0; j < Tile::kTerms; ++j) {
    if (j == right_terms) {
      break;
    }
    uint32_t b[Tile::kBlocks / 2][4];
#pragma unroll
    for (uint32_t n = 0; n < Tile::kBlocks / 2; ++n) {
      ldmatrix<true>(b[n], right + j * Tile::kBytesRight + n * 32);
    }
#pragma unroll
    for (uint32_t i = 0; i + j < Tile::kTerms; ++i) {
#pragma unroll
      for (uint32_t m = 0; m < 4; ++m) {
        uint32_t a[4];
        ldmatrix(a, left + i * Tile::kBytesLeft + m * 16 * Tile::kLeftPitch);
#pragma unroll
        for (uint32_t n = 0; n < Tile::kBlocks; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma<bf16>(acc[i + j ? Tile::kSums - 1 : 0][m][n], a, pair);
        }
      }
    }
  }
}

// Adds two neighbours to what shared memory holds; the sum is rounded once.
template <class T>
__device__ __forceinline__ void add_pair(uint32_t at, float low, float high) {
  if constexpr (sizeof(T) == 4) {
    st_shared(at, ld_shared<float>(at) + low);
    st_shared(at + 4, ld_shared<float>(at + 4) + high);
  } else {
    const auto both = ld_shared<uint32_t>(at);
    st_shared(at, pack2<T>(to_float(T{uint16_t(both)}) + low, to_float(T{uint16_t(both >> 16)}) + high));
  }
}

struct Bytes16 {
  uint32_t words[4];
};

template <class T>
__global__ void __launch_bounds__(ResidualTile<T>::kThreads, 2)
    residual_kernel(const __grid_constant__ ResidualProblem<T> p) {
  using Tile = ResidualTile<T>;
  constexpr uint32_t kPerPiece = 16 / sizeof(T), kPieces = Tile::kColumns / kPerPiece;
  const uint32_t across = ceil_div(p.in, Tile::kColumns), tiles = across * ceil_div(p.out, Tile::kRows);
  const uint32_t layer = block_rank() / tiles, tile = block_rank() % tiles;
  const uint32_t row = tile / across * Tile::kRows, column = tile % across * Tile::kColumns;
  T* weight = p.weight[layer];
  const bf16* left = p.terms + layer * p.layer_stride;
  const bf16* right = left + uint64_t(Tile::kTerms) * p.out * p.width;
  const uint32_t shared = shared_base(), w = shared + Tile::kWeightAt;

  // W is on its way while the terms are multiplied.
  copy_tile(w, Tile::kWeightPitch, Tile::kRows, kPieces, [&](uint32_t i, uint32_t piece) {
    const uint32_t at = column + piece * kPerPiece;
    const bool inside = row + i < p.out && at < p.in;
    const uint32_t count = inside ? (p.in - at < kPerPiece ? p.in - at : kPerPiece) : 0;
    return Piece{weight + (inside ? int64_t(row + i) * p.row_stride + at : 0), count * uint32_t(sizeof(T))};
  });
  for (uint32_t k = 0; k < (Tile::kStages - 1) * 16; k += 16) {
    if (k < p.width) {
      load_terms(shared + k / 16 * Tile::kBytesStage, left, right, row, column, k, p);
    }
    cp_async_commit();
  }
  float acc[Tile::kSums][4][Tile::kBlocks][4] = {};
  for (uint32_t k = 0, slot = 0; k < p.width; k += 16, slot = slot + 1 == Tile::kStages ? 0 : slot + 1) {
    cp_async_wait<Tile::kStages - 2>();
    // Everybody's copies have landed, and everybody is done with the slot that is filled next.
    sync_threads();
    const uint32_t next = k + (Tile::kStages - 1) * 16;
    if (next < p.width) {
      load_terms(shared + (slot + Tile::kStages - 1) % Tile::kStages * Tile::kBytesStage, left, right, row, column,
                 next, p);
    }
    cp_async_commit();
    multiply_terms<T>(acc, shared + slot * Tile::kBytesStage, p.right_terms);
  }

  const uint32_t lane = lane_rank(), warp = warp_rank();
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
#pragma unroll
    for (uint32_t n = 0; n < Tile::kBlocks; ++n) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t i = warp / 4 * 64 + m * 16 + half * 8 + lane / 4;
        const uint32_t j = warp % 4 * Tile::kWarpColumns + n * 8 + lane % 4 * 2;
        float sums[2] = {acc[0][m][n][2 * half], acc[0][m][n][2 * half + 1]};
        if constexpr (Tile::kSums == 2) {
          sums[0] += acc[1][m][n][2 * half];
          sums[1] += acc[1][m][n][2 * half + 1];
        }
        add_pair<T>(w + i * Tile::kWeightPitch + j * sizeof(T), sums[0], sums[1]);
      }
    }
  }
  sync_threads();
  for (uint32_t at = thread_rank(); at < Tile::kRows * kPieces; at += Tile::kThreads) {
    const uint32_t i = at / kPieces, j = column + at % kPieces * kPerPiece;
    if (row + i < p.out && j < p.in) {
      const auto piece = ld_shared<Bytes16>(w + i * Tile::kWeightPitch + at % kPieces * 16);
      T* to = weight + int64_t(row + i) * p.row_stride + j;
      if (j + kPerPiece <= p.in) {
        st_global(reinterpret_cast<Bytes16*>(to), piece);
      } else {
        T values[kPerPiece];
        memcpy(values, &piece, 16);
#pragma unroll
        for (uint32_t e = 0; e < kPerPiece; ++e) {
          if (j + e < p.in) {
            st_global(to + e, values[e]);
          }
        }
      }
    }
  }
}

template <class Context, class T>
void launch_residual_of(Context& context, const Residual& residual) {
  const Matrix &weight = residual.weight[0], &A = residual.A[0], &B = residual.B[0];
  const TermLayout layout(weight.dtype, A.dtype, weight.rows, weight.cols, A.rows);
  for_layers(residual.weight.size(), [&](size_t first, uint32_t layers) {
    SplitProblem split{};
    ResidualProblem<T> p{};
    for (uint32_t i = 0; i < layers; ++i) {
      split.A[i] = residual.A[first + i].data;
      split.B[i] = residual.B[first + i].data;
      split.core[i] = residual.core.empty() ? nullptr : residual.core[first + i].data;
      p.weight[i] = static_cast<T*>(residual.weight[first + i].data);
    }
    split.a_dtype = A.dtype;
    split.b_dtype = B.dtype;
    split.has_core = !residual.core.empty();
    split.core_dtype = split.has_core ? residual.core[0].dtype : Dtype::kFloat32;
    split.terms = static_cast<bf16*>(residual.terms);
    split.layer_stride = layout.elements;
    split.out = uint32_t(weight.rows);
    split.in = uint32_t(weight.cols);
    split.r = uint32_t(A.rows);
    split.width = layout.width;
    split.columns = layout.columns;
    split.left_terms = layout.left_terms;
    split.right_terms = layout.right_terms;
    split.scaling = residual.scaling;
    split.left_blocks = StridedGrid::blocks(split.out, split.width);
    split.right_blocks = ceil_div(split.width * (split.columns / 8), SplitTile::kPieces);
    launch_strided(context, (split.left_blocks + split.right_blocks) * layers, &split_kernel<SplitTile>, split);

    using Tile = ResidualTile<T>;
    p.terms = split.terms;
    p.layer_stride = layout.elements;
    p.row_stride = weight.row_stride;
    p.out = split.out;
    p.in = split.in;
    p.width = layout.width;
    p.columns = layout.columns;
    p.right_terms = layout.right_terms;
    const uint32_t tiles = ceil_div(p.out, Tile::kRows) * ceil_div(p.in, Tile::kColumns);
    context.launch({tiles * layers, Tile::kThreads, 1, Tile::kSharedBytes, 128}, &residual_kernel<T>, p);
  });
}

template <class Context>
void launch_residual(Context& context, const Residual& residual) {
  const Matrix& weight = residual.weight[0];
  // Pieces of A are counted in 32 bits.
  constexpr int64_t kWidest = int64_t(1) << 26;
  if (weight.cols > kWidest) {
    throw std::invalid_argument("weight must have at most " + std::to_string(kWidest) + " columns, got " +
                                std::to_string(weight.cols));
  }
  const auto address = reinterpret_cast<uintptr_t>(weight.data);
  const int64_t row_bytes = weight.row_stride * (weight.dtype == Dtype::kFloat32 ? 4 : 2);
  if (weight.col_stride != 1 || row_bytes % 16 || address % 16) {
    throw std::invalid_argument("rows of weight must be contiguous and aligned to 16 bytes, got strides (" +
                                std::to_string(weight.row_stride) + ", " + std::to_string(weight.col_stride) +
                                ") at address " + std::to_string(address));
  }
  switch (weight.dtype) {
    case Dtype::kFloat32: return launch_residual_of<Context, float>(context, residual);
    case Dtype::kBFloat16: return launch_residual_of<Context, bf16>(context, residual);
    case Dtype::kFloat16: return launch_residual_of<Context, fp16>(context, residual);
  }
}

}  // namespace nlora::cuda
