// Host side of gemm.cuh: builds the tensor maps and launches the persistent grid.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "context.cuh"
#include "gemm.cuh"

namespace hopper {

// y (m, n) = x (m, k) · weight (n, k)ᵀ + bias (n); all row-major and contiguous, bias may be null.
// `ticket` is one zero word with 16 bytes of its own; blocks = 0 means one for each processor.
template <class Tile, class T>
void launch_gemm(Context& context, const T* x, const T* weight, const T* bias, T* y, uint32_t* ticket, uint32_t m,
                 uint32_t n, uint32_t k, uint32_t blocks = 0) {
    if (m == 0 || n == 0 || k == 0 || n % 8 || k % 8) {
        throw std::invalid_argument("m, n and k must be positive, n and k multiples of 8, got " + std::to_string(m) +
                                    ", " + std::to_string(n) + " and " + std::to_string(k));
    }
    GemmProblem<T> problem;
    problem.x = tensor_map(x, m, k, uint64_t(k) * 2, Tile::kBlockM, Tile::kBlockK, Swizzle::B128);
    problem.weight = tensor_map(weight, n, k, uint64_t(k) * 2, Tile::kBlockN / Tile::kCluster, Tile::kBlockK,
                                Swizzle::B128);
    problem.y = tensor_map(y, m, n, uint64_t(n) * 2, 64, 64, Swizzle::B128);
    problem.bias = bias;
    problem.ticket = ticket;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    blocks = std::max(blocks ? blocks : context.processors(), uint32_t(Tile::kCluster));
    const uint32_t work = Schedule(m, n, 0, Tile::kBlockM * Tile::kCluster, Tile::kBlockN).count() * Tile::kCluster;
    const uint32_t grid = std::min(blocks / Tile::kCluster * Tile::kCluster, work);
    context.launch({grid, Tile::kThreads, Tile::kCluster, Tile::kSharedBytes, Tile::kRegisters},
                   &gemm_kernel<Tile, T>, problem);
}

}  // namespace hopper
