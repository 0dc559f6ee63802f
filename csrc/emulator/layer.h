// Host side of the kernel layer: the same calls as csrc/cuda/common/layer.cuh makes on a device, each with the line it
// was called from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "clock.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#include "../cuda/common/layout.cuh"

namespace nlora::cuda {

#define NLORA_SITE emulator::Site site = emulator::Site::here()

// What a CUtensorMap says about a row-major matrix of 16-bit elements.
struct alignas(64) TensorMap {
  uint8_t* data;
  uint64_t rows, columns, row_bytes;
  uint32_t box_rows, box_columns;
  Swizzle swizzle;
};

uint32_t thread_rank();
uint32_t lane_rank();
uint32_t warp_rank();
uint32_t block_rank();
uint32_t grid_blocks();
uint32_t cluster_rank();
bool elect_one(NLORA_SITE);

uint32_t shared_base();
uint32_t map_to_rank(uint32_t address, uint32_t rank);
void load_shared(uint32_t address, void* value, uint32_t bytes, emulator::Site site);
void store_shared(uint32_t address, const void* value, uint32_t bytes, bool cluster, emulator::Site site);
void load_global(const void* address, void* value, uint32_t bytes, emulator::Site site);
void store_global(void* address, const void* value, uint32_t bytes, emulator::Site site);

template <class T>
T ld_shared(uint32_t address, NLORA_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
  T value;
  load_shared(address, &value, sizeof(T), site);
  return value;
}

template <class T>
void st_shared(uint32_t address, T value, NLORA_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
  store_shared(address, &value, sizeof(T), false, site);
}

inline void st_cluster(uint32_t address, uint32_t value, NLORA_SITE) {
  store_shared(address, &value, sizeof(value), true, site);
}

template <class T>
T ld_global(const T* address, NLORA_SITE) {
  T value;
  load_global(address, &value, sizeof(T), site);
  return value;
}

template <class T>
void st_global(T* address, T value, NLORA_SITE) {
  store_global(address, &value, sizeof(T), site);
}

// Each lane hands in 4 bytes and receives those of lane `source`.
uint32_t exchange(uint32_t bits, uint32_t source, emulator::Site site);

template <class T>
T exchange_value(T value, uint32_t source, emulator::Site site) {
  static_assert(sizeof(T) == 4, "4 bytes");
  return __builtin_bit_cast(T, exchange(__builtin_bit_cast(uint32_t, value), source, site));
}

template <class T>
T shuffle(T value, uint32_t lane, NLORA_SITE) {
  return exchange_value(value, lane % 32, site);
}

template <class T>
T shuffle_xor(T value, uint32_t mask, NLORA_SITE) {
  return exchange_value(value, (lane_rank() ^ mask) % 32, site);
}

template <class T>
T shuffle_up(T value, uint32_t delta, NLORA_SITE) {
  return exchange_value(value, lane_rank() >= delta ? lane_rank() - delta : lane_rank(), site);
}

template <class T>
T shuffle_down(T value, uint32_t delta, NLORA_SITE) {
  return exchange_value(value, lane_rank() + delta < 32 ? lane_rank() + delta : lane_rank(), site);
}

void sync_warp(NLORA_SITE);
void sync_threads(NLORA_SITE);
void bar_sync(uint32_t id, uint32_t threads, NLORA_SITE);
void bar_arrive(uint32_t id, uint32_t threads, NLORA_SITE);

void change_registers(uint32_t registers, bool increase, emulator::Site site);

template <uint32_t Registers>
void setmaxnreg_increase(NLORA_SITE) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "24 to 256 in steps of 8");
  change_registers(Registers, true, site);
}

template <uint32_t Registers>
void setmaxnreg_decrease(NLORA_SITE) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "24 to 256 in steps of 8");
  change_registers(Registers, false, site);
}

void cluster_arrive(NLORA_SITE);
void cluster_wait(NLORA_SITE);
void cluster_sync(NLORA_SITE);

void mbarrier_init(uint32_t barrier, uint32_t arrivals, NLORA_SITE);
void fence_barrier_init(NLORA_SITE);
void mbarrier_arrive(uint32_t barrier, NLORA_SITE);
void mbarrier_arrive_cluster(uint32_t barrier, NLORA_SITE);
void mbarrier_arrive_operands(uint32_t barrier, NLORA_SITE);
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes, NLORA_SITE);
void mbarrier_wait(uint32_t barrier, uint32_t parity, NLORA_SITE);
void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity, NLORA_SITE);

template <int kBlocks>
void mbarrier_arrive_in(uint32_t barrier, uint32_t rank, NLORA_SITE) {
  kBlocks == 1 ? mbarrier_arrive(barrier, site) : mbarrier_arrive_cluster(map_to_rank(barrier, rank), site);
}

template <int kBlocks>
void mbarrier_wait_in(uint32_t barrier, uint32_t parity, NLORA_SITE) {
  kBlocks == 1 ? mbarrier_wait(barrier, parity, site) : mbarrier_wait_cluster(barrier, parity, site);
}

inline void prefetch_tensor_map(const TensorMap*) {}
void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row, NLORA_SITE);
void tma_load_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                        uint16_t ranks, NLORA_SITE);
void tma_store(const TensorMap* map, uint32_t from, int32_t column, int32_t row, NLORA_SITE);
void bulk_commit(NLORA_SITE);
void wait_bulk(int pending, bool written, emulator::Site site);

template <int Pending>
void bulk_wait_read(NLORA_SITE) {
  wait_bulk(Pending, false, site);
}

template <int Pending>
void bulk_wait(NLORA_SITE) {
  wait_bulk(Pending, true, site);
}

void fence_async_shared(NLORA_SITE);
void fence_async_global(NLORA_SITE);

void grid_launch_dependents(NLORA_SITE);
void grid_wait(NLORA_SITE);

void flag_release_add(uint32_t* flag, uint32_t value, NLORA_SITE);
void flag_release_store(uint32_t* flag, uint32_t value, NLORA_SITE);
uint32_t flag_acquire(const uint32_t* flag, NLORA_SITE);
void flag_wait(const uint32_t* flag, uint32_t target, NLORA_SITE);
uint32_t ticket_take(uint32_t* counter, NLORA_SITE);
void ticket_reset(uint32_t* counter, NLORA_SITE);

void fence_accumulators(emulator::Site site);
void issue_wgmma(float* d, int columns, bool is_bf16, Major major_a, Major major_b, uint64_t a_descriptor,
                 uint64_t b_descriptor, bool accumulate, emulator::Site site);
void wgmma_commit(NLORA_SITE);
void wait_wgmma(int pending, emulator::Site site);

template <int Count>
void wgmma_fence(float (&)[Count], NLORA_SITE) {
  fence_accumulators(site);
}

template <int N, class T, Major MajorA = Major::K, Major MajorB = Major::K, int Count>
void wgmma(float (&d)[Count], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate, NLORA_SITE) {
  static_assert(Count >= N / 2, "too few accumulators");
  static_assert(N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "unsupported width");
  issue_wgmma(d, N, std::is_same_v<T, bf16>, MajorA, MajorB, a_descriptor, b_descriptor, accumulate, site);
}

template <int Pending, int Count>
void wgmma_wait(float (&)[Count], NLORA_SITE) {
  wait_wgmma(Pending, site);
}

void store_matrix(uint32_t row, const uint32_t* r, bool transposed, emulator::Site site);
void load_matrix(uint32_t* r, uint32_t row, bool transposed, emulator::Site site);
void multiply_fragments(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, emulator::Site site);

template <bool Transposed = false>
void stmatrix(uint32_t row, const uint32_t (&r)[4], NLORA_SITE) {
  store_matrix(row, r, Transposed, site);
}

template <bool Transposed = false>
void ldmatrix(uint32_t (&r)[4], uint32_t row, NLORA_SITE) {
  load_matrix(r, row, Transposed, site);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], NLORA_SITE) {
  multiply_fragments(d, a, b, std::is_same_v<T, bf16>, site);
}

uint16_t round_to_16(float value, bool is_bf16, emulator::Site site);
float widen(uint16_t bits, bool is_bf16);

template <class T>
uint32_t pack2(float low, float high, NLORA_SITE) {
  constexpr bool is_bf16 = std::is_same_v<T, bf16>;
  return round_to_16(low, is_bf16, site) | uint32_t(round_to_16(high, is_bf16, site)) << 16;
}

template <class T>
float to_float(T value) {
  return widen(value.bits, std::is_same_v<T, bf16>);
}

void cp_async(uint32_t to, const void* from, uint32_t bytes, NLORA_SITE);
void cp_async_commit(NLORA_SITE);
void wait_cp_async(int pending, emulator::Site site);

template <int Pending>
void cp_async_wait(NLORA_SITE) {
  wait_cp_async(Pending, site);
}

}  // namespace nlora::cuda
