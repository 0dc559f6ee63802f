// One small kernel for each primitive of the layer. It writes what it saw to `output`, byte for byte the same on
// the emulator and on a device: inputs are small integers, so every sum is exact.
#pragma once

#include "../../cuda/common/layer.cuh"

namespace nlora::cuda::tests {

struct ProbeProblem {
  TensorMap a, b;
  const uint32_t* input;
  uint32_t* output;
  uint32_t* control;
  uint32_t bytes_a, bytes_b;      // of the operands or boxes in shared memory
  int32_t column, row;            // of a box
  uint64_t descriptor_a, descriptor_b;   // with start address 0
  uint32_t step_a, step_b;        // bytes from one 16 of K to the next
  uint32_t options;
};

struct alignas(16) Vector {
  uint32_t x, y, z, w;
};

// Shared memory words [from, from + bytes) -> output, by all threads of the block.
__device__ inline void dump(const ProbeProblem& p, uint32_t from, uint32_t bytes, uint32_t threads) {
  for (uint32_t word = thread_rank(); word < bytes / 4; word += threads) {
    st_global(p.output + block_rank() * (bytes / 4) + word, ld_shared<uint32_t>(from + 4 * word));
  }
}

// input -> shared memory, by all threads of the block.
__device__ inline void fill(const ProbeProblem& p, uint32_t to, uint32_t bytes, uint32_t threads) {
  for (uint32_t word = thread_rank(); word < bytes / 4; word += threads) {
    st_shared(to + 4 * word, ld_global(p.input + word));
  }
}

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  if (thread_rank() == 0) {
    mbarrier_init(barrier, arrivals);
    fence_barrier_init();
  }
  sync_threads();
}

// 4 blocks of 64 in clusters of 2.
__global__ void identity_kernel(const __grid_constant__ ProbeProblem p) {
  uint32_t elected = elect_one();
  for (uint32_t mask = 1; mask < 32; mask *= 2) {
    elected += shuffle_xor(elected, mask);
  }
  const uint32_t values[8] = {thread_rank(), lane_rank(),    warp_rank(), block_rank(),
                              grid_blocks(), cluster_rank(), elected,     shared_base() % kSharedAlignment};
  for (uint32_t i = 0; i < 8; ++i) {
    st_global(p.output + (block_rank() * 64 + thread_rank()) * 8 + i, values[i]);
  }
}

__global__ void shuffle_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t lane = lane_rank(), value = 3 * lane + 1;
  const uint32_t values[5] = {shuffle(value, 31 - lane), shuffle_xor(value, 5), shuffle_up(value, 3),
                              shuffle_down(value, 4), uint32_t(shuffle_xor(float(value), 1))};
  for (uint32_t i = 0; i < 5; ++i) {
    st_global(p.output + lane * 5 + i, values[i]);
  }
}

// 128 threads: 16-byte stores to swizzled addresses in each mode, read back in address order.
__global__ void shared_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), t = thread_rank();
  const Swizzle modes[] = {Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32};
  for (uint32_t m = 0; m < 4; ++m) {
    st_shared(swizzled(base + m * 2048 + t * 16, modes[m]), Vector{t, t + 1000, t + 2000, t + 3000});
  }
  sync_threads();
  const auto last = ld_shared<Vector>(base + 2048 + (127 - t) * 16);
  st_global(p.output + 2048 + t, last.x + last.w);
  dump(p, base, 8192, 128);
}

// 64 threads copy 0 to 16 bytes each, in two groups.
__global__ void cp_async_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), t = thread_rank();
  cp_async(base + t * 16, p.input + t * 4, t % 17);
  cp_async_commit();
  cp_async(base + (64 + t) * 16, p.input + (64 + t) * 4, 16);
  cp_async_commit();
  cp_async_wait<1>();
  st_global(p.output + 512 + t, ld_shared<uint32_t>(base + t * 16));
  cp_async_wait<0>();
  sync_threads();
  dump(p, base, 2048, 64);
}

__global__ void ldmatrix_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), lane = lane_rank();
  fill(p, base, 512, 32);
  sync_threads();
  uint32_t plain[4], transposed[4];
  ldmatrix(plain, base + lane * 16);
  ldmatrix<true>(transposed, base + lane * 16);
  for (uint32_t j = 0; j < 4; ++j) {
    st_global(p.output + lane * 8 + j, plain[j]);
    st_global(p.output + lane * 8 + 4 + j, transposed[j]);
  }
}

__global__ void stmatrix_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), lane = lane_rank();
  uint32_t r[4];
  for (uint32_t j = 0; j < 4; ++j) {
    r[j] = ld_global(p.input + lane * 4 + j);
  }
  stmatrix(base + lane * 16, r);
  stmatrix<true>(base + 512 + lane * 16, r);
  sync_threads();
  dump(p, base, 1024, 32);
}

// input: a (16, 16) then bᵀ (8, 16); output: d (16, 8).
template <class T>
__global__ void mma_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), lane = lane_rank();
  fill(p, base, 768, 32);
  sync_threads();
  uint32_t a[4], b[4];
  ldmatrix(a, base + (lane % 16) * 32 + lane / 16 * 16);
  ldmatrix(b, base + 512 + (lane % 8) * 32 + lane / 8 % 2 * 16);
  const uint32_t b_fragment[2] = {b[0], b[1]};
  float d[4] = {0, 1, 2, 3};
  mma<T>(d, a, b_fragment);
  for (uint32_t e = 0; e < 4; ++e) {
    const uint32_t row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
    st_global(p.output + row * 8 + column, __builtin_bit_cast(uint32_t, d[e]));
  }
}

// One box of map `a`, as it lies in shared memory.
__global__ void tma_load_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t barrier = shared_base(), box = barrier + 1024;
  init_barrier(barrier, 1);
  if (thread_rank() == 0) {
    prefetch_tensor_map(&p.a);
    mbarrier_arrive_expect_tx(barrier, p.bytes_a);
    tma_load(box, &p.a, barrier, p.column, p.row);
  }
  mbarrier_wait(barrier, 0);
  dump(p, box, p.bytes_a, 128);
}

// input, as it lies in shared memory -> a box of map `a`, which covers part of output.
__global__ void tma_store_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t box = shared_base();
  fill(p, box, p.bytes_a, 128);
  fence_async_shared();
  sync_threads();
  if (thread_rank() == 0) {
    tma_store(&p.a, box, p.column, p.row);
    bulk_commit();
    bulk_wait<0>();
  }
}

// Each of 2 blocks loads one half of the tile for both.
__global__ void multicast_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t barrier = shared_base(), box = barrier + 1024, rank = cluster_rank();
  init_barrier(barrier, 1);
  cluster_sync();
  if (thread_rank() == 0) {
    mbarrier_arrive_expect_tx(barrier, 2 * p.bytes_a);
    tma_load_multicast(box + rank * p.bytes_a, &p.a, barrier, 0, int32_t(rank) * 16, 3);
  }
  mbarrier_wait(barrier, 0);
  dump(p, box, 2 * p.bytes_a, 128);
  sync_warp();
  cluster_sync();
}

// A token goes round 4 warps three times, handed on by mbarriers.
__global__ void mbarrier_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), token = base + 64, warp = warp_rank();
  if (thread_rank() == 0) {
    for (uint32_t w = 0; w < 4; ++w) {
      mbarrier_init(base + 16 * w, 1);
    }
    st_shared(token, 1u);
  }
  sync_threads();
  for (uint32_t lap = 0; lap < 3; ++lap) {
    if (lane_rank() == 0) {
      // Warp 0 begins, since a fresh barrier passes parity 1.
      mbarrier_wait(base + 16 * warp, warp == 0 ? (lap & 1) ^ 1 : lap & 1);
      const auto value = ld_shared<uint32_t>(token);
      st_global(p.output + lap * 4 + warp, value);
      st_shared(token, value * 3 + warp);
      mbarrier_arrive(base + 16 * ((warp + 1) % 4));
    }
    sync_warp();
  }
}

// Two warps write and go on, two wait for them and read.
__global__ void named_barrier_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base(), t = thread_rank();
  for (uint32_t round = 0; round < 3; ++round) {
    const uint32_t slot = base + round % 2 * 256;
    if (warp_rank() < 2) {
      if (round >= 2) {
        bar_sync(3 + round % 2, 128);
      }
      st_shared(slot + 4 * t, 100 * round + t);
      bar_arrive(1 + round % 2, 128);
    } else {
      bar_sync(1 + round % 2, 128);
      st_global(p.output + round * 64 + t - 64, ld_shared<uint32_t>(slot + 4 * (127 - t)));
      if (round < 1) {
        bar_arrive(3 + round % 2, 128);
      }
    }
  }
}

// Registers of d = a·bᵀ over K = 32: operands lie in shared memory as input gives them.
template <int N, class T, Major MajorA, Major MajorB>
__global__ void __launch_bounds__(128, 1) wgmma_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t base = shared_base();
  fill(p, base, p.bytes_a + p.bytes_b, 128);
  fence_async_shared();
  sync_threads();
  const uint64_t a = advanced(p.descriptor_a, base), b = advanced(p.descriptor_b, base + p.bytes_a);
  float d[N / 2];
  wgmma_fence(d);
  wgmma<N, T, MajorA, MajorB>(d, a, b, false);
  wgmma<N, T, MajorA, MajorB>(d, advanced(a, p.step_a), advanced(b, p.step_b), true);
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    st_global(p.output + thread_rank() * (N / 2) + i, __builtin_bit_cast(uint32_t, d[i]));
  }
}

// d (64 × 64) = a·bᵀ with K = 64 through TMA, in row-major order: maps and descriptors must agree.
template <Major MajorA, Major MajorB>
__global__ void __launch_bounds__(128, 1) tma_wgmma_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t barrier = shared_base(), a_at = barrier + 1024, b_at = a_at + p.bytes_a;
  init_barrier(barrier, 1);
  if (thread_rank() == 0) {
    mbarrier_arrive_expect_tx(barrier, p.bytes_a + p.bytes_b);
    tma_load(a_at, &p.a, barrier, 0, 0);
    tma_load(b_at, &p.b, barrier, 0, 0);
  }
  sync_warp();
  mbarrier_wait(barrier, 0);
  const uint64_t a = advanced(p.descriptor_a, a_at), b = advanced(p.descriptor_b, b_at);
  float d[32];
  wgmma_fence(d);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wgmma<64, bf16, MajorA, MajorB>(d, advanced(a, step * p.step_a), advanced(b, step * p.step_b), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const uint32_t row = accumulator_row(warp_rank(), lane_rank(), i), column = accumulator_column(lane_rank(), i);
    st_global(p.output + row * 64 + column, __builtin_bit_cast(uint32_t, d[i]));
  }
}

// 384 threads: one warpgroup gives registers away, two take them.
__global__ void __launch_bounds__(384, 1) setmaxnreg_kernel(const __grid_constant__ ProbeProblem p) {
  if (warp_rank() < 4) {
    setmaxnreg_decrease<40>();
    st_global(p.output + thread_rank(), 40u);
  } else {
    setmaxnreg_increase<232>();
    st_global(p.output + thread_rank(), 232u);
  }
}

// Tiles of 8 × 64 handed from block to block through global memory: row r of tile t is tile t - 1's plus one. The
// tile number is a ticket, so any number of resident blocks will do. options: 1 to store the flag, 0 to add to it.
__global__ void publish_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t barrier = shared_base(), box = barrier + 1024, t = thread_rank();
  uint32_t *const counter = p.control, *const flag = p.control + 4;
  init_barrier(barrier, 1);
  uint32_t tile = 0;
  if (t == 0) {
    tile = ticket_take(counter);
    if (tile > 0) {
      flag_wait(flag, tile);
      fence_async_global();
      mbarrier_arrive_expect_tx(barrier, p.bytes_a);
      tma_load(box, &p.a, barrier, 0, int32_t(tile - 1) * 8);
      mbarrier_wait(barrier, 0);
    }
    st_shared(barrier + 16, tile);
  }
  sync_threads();
  tile = ld_shared<uint32_t>(barrier + 16);
  for (uint32_t word = t; word < p.bytes_a / 4; word += 64) {
    st_shared(box + 4 * word, tile == 0 ? word : ld_shared<uint32_t>(box + 4 * word) + 1);
  }
  fence_async_shared();
  sync_threads();
  if (t == 0) {
    tma_store(&p.a, box, 0, int32_t(tile) * 8);
    bulk_commit();
    bulk_wait<0>();
    fence_async_global();
    p.options ? flag_release_store(flag, tile + 1) : flag_release_add(flag, 1);
    if (tile + 1 == grid_blocks()) {
      ticket_reset(counter);
    }
  }
}

// Two blocks store into each other's shared memory.
__global__ void cluster_kernel(const __grid_constant__ ProbeProblem p) {
  const uint32_t barrier = shared_base(), slot = barrier + 1024, rank = cluster_rank(), t = thread_rank();
  init_barrier(barrier, 64);
  cluster_sync();
  st_cluster(map_to_rank(slot + 4 * t, rank ^ 1), 1000 * (rank + 1) + t);
  mbarrier_arrive_cluster(map_to_rank(barrier, rank ^ 1));
  mbarrier_wait_cluster(barrier, 0);
  st_global(p.output + rank * 64 + t, ld_shared<uint32_t>(slot + 4 * t));
  cluster_arrive();
  cluster_wait();
}

// input: pairs of floats. output: each pair packed as bf16 and as fp16, and the packed low halves widened again.
__global__ void convert_kernel(const __grid_constant__ ProbeProblem p) {
  for (uint32_t i = thread_rank(); i < p.options; i += 128) {
    const auto low = __builtin_bit_cast(float, ld_global(p.input + 2 * i));
    const auto high = __builtin_bit_cast(float, ld_global(p.input + 2 * i + 1));
    const uint32_t as_bf16 = pack2<bf16>(low, high), as_fp16 = pack2<fp16>(low, high);
    const float wide_bf16 = to_float(bf16{uint16_t(as_bf16)}), wide_fp16 = to_float(fp16{uint16_t(as_fp16)});
    st_global(p.output + 4 * i, as_bf16);
    st_global(p.output + 4 * i + 1, as_fp16);
    st_global(p.output + 4 * i + 2, __builtin_bit_cast(uint32_t, wide_bf16));
    st_global(p.output + 4 * i + 3, __builtin_bit_cast(uint32_t, wide_fp16));
  }
}

}  // namespace nlora::cuda::tests
