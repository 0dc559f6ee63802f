// What the CPU can do, asked once.
#include "cpu/kernels.h"

#include <atomic>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nlora::cpu {
namespace {

#if defined(__x86_64__) || defined(__i386__)
unsigned leaf7(unsigned subleaf, int output) {
  unsigned registers[4] = {};
  if (!__get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3])) return 0;
  return registers[output];
}

// Whether AMX multiplies bf16 and the operating system lets this process use its registers.
bool has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
#if defined(__SANITIZE_ADDRESS__)
  return true;  // tiles_amx.cpp then does without
#endif
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  const unsigned features = leaf7(0, 3);
  return features >> 22 & 1 && features >> 24 & 1 && !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#else
  return false;
#endif
}

// NOTE: the compiler's own check also asks whether the operating system saves the registers.
Tier detect() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return has_tiles() ? Tier::kAmx : Tier::kAvx512;
  // Every CPU with AVX2 and FMA converts fp16 too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Tier::kAvx2;
  return Tier::kPortable;
}

bool has_bf16() { return has_avx512_bf16() || leaf7(0, 3) >> 22 & 1; }
bool has_fp16() { return leaf7(0, 3) >> 23 & 1 || leaf7(1, 0) >> 21 & 1; }
#else
Tier detect() { return Tier::kPortable; }
bool has_bf16() { return false; }
bool has_fp16() { return false; }
#endif

std::atomic<Tier> cap{Tier::kAmx};
std::atomic<bool> in_child{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered [[maybe_unused]] = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

}  // namespace

Tier tier() {
  static const Tier best = detect();
  const Tier limit = cap;
  return best < limit ? best : limit;
}

Tier cap_tier(Tier limit) { return cap.exchange(limit); }

bool multiplies(Dtype dtype) {
  static const bool bf16 = has_bf16(), fp16 = has_fp16();
  if (dtype == Dtype::kFloat32) return true;
  return tier() >= Tier::kAvx512 && (dtype == Dtype::kBFloat16 ? bf16 : fp16);
}

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 << 10;
}

#if defined(__x86_64__) || defined(__i386__)
bool has_avx512_bf16() { return leaf7(1, 0) >> 5 & 1; }
#endif

bool forked() { return in_child; }

}  // namespace nlora::cpu
