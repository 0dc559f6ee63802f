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

namespace hopper {

struct SplitProblem {
    const void *A[kMaxLayers], *core[kMaxLayers], *B[kMaxLayers];   // contiguous
    uint32_t a_dtype, core_dtype, b_dtype;                          // of Dtype
    bf16* terms;                 // per layer: left terms (out, width), then right terms (width, columns)
    uint64_t layer_stride;       // elements
    uint32_t out, in, r, width, columns, left_terms, right_terms, blocks;
    float scaling;
    bool has_core;
};

__device__ __forceinline__ float load_float(const void* data, uint32_t dtype, uint64_t i) {
    if (dtype == uint32_t(Dtype::kFloat32)) {
        return ld_global(static_cast<const float*>(data) + i);
    }
    return dtype == uint32_t(Dtype::kBFloat16) ? to_float(ld_global(static_cast<const bf16*>(data) + i))
                                               : to_float(ld_global(static_cast<const fp16*>(data) + i));
}

// value = to[0] + to[stride] + to[2·stride], as far as there are terms.
__device__ __forceinline__ void store_terms(bf16* to, uint64_t stride, uint32_t terms, float value) {
    for (uint32_t t = 0; t < terms; ++t) {
        const bf16 term{uint16_t(pack2<bf16>(value, 0))};
        st_global(to + t * stride, term);
        value -= to_float(term);
    }
}

struct SplitTile {
    static constexpr uint32_t kThreads = 256;
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) split_kernel(const __grid_constant__ SplitProblem p) {
    const uint32_t layer = block_rank() / p.blocks;
    bf16* left = p.terms + layer * p.layer_stride;
    const uint64_t left_size = uint64_t(p.out) * p.width, right_size = uint64_t(p.width) * p.columns;
    bf16* right = left + p.left_terms * left_size;
    for (uint64_t at = uint64_t(block_rank() % p.blocks) * Tile::kThreads + thread_rank();
         at < left_size + right_size; at += uint64_t(p.blocks) * Tile::kThreads) {
        if (at < left_size) {
            const uint64_t i = at / p.width;
            const auto j = uint32_t(at % p.width);
            float sum = 0;
            if (j < p.r && !p.has_core) {
                sum = load_float(p.B[layer], p.b_dtype, i * p.r + j);
            } else if (j < p.r) {
#pragma unroll 4
                for (uint32_t k = 0; k < p.r; ++k) {
                    sum += load_float(p.B[layer], p.b_dtype, i * p.r + k) *
                           load_float(p.core[layer], p.core_dtype, uint64_t(k) * p.r + j);
                }
            }
            store_terms(left + at, left_size, p.left_terms, -p.scaling * sum);
        } else {
            const auto i = uint32_t((at - left_size) / p.columns), j = uint32_t((at - left_size) % p.columns);
            const bool inside = i < p.r && j < p.in;
            const float value = inside ? load_float(p.A[layer], p.a_dtype, uint64_t(i) * p.in + j) : 0;
            store_terms(right + (at - left_size), right_size, p.right_terms, value);
        }
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
                      return Piece{term + (inside ? uint64_t(k + i) * p.columns + column + piece * 8 : 0),
                                   inside ? 16u : 0u};
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
            load_terms(shared + (slot + Tile::kStages - 1) % Tile::kStages * Tile::kBytesStage, left, right, row,
                       column, next, p);
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
        split.a_dtype = uint32_t(A.dtype);
        split.b_dtype = uint32_t(B.dtype);
        split.has_core = !residual.core.empty();
        split.core_dtype = split.has_core ? uint32_t(residual.core[0].dtype) : 0;
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
        const uint64_t items = (uint64_t(split.out) + split.columns) * split.width;
        split.blocks = uint32_t(std::min<uint64_t>((items + SplitTile::kThreads - 1) / SplitTile::kThreads,
                                                   8 * context.processors()));
        context.launch({split.blocks * layers, SplitTile::kThreads, 1, 0, 64}, &split_kernel<SplitTile>, split);

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

}  // namespace hopper
