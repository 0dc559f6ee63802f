// What the CPU can do, asked once.
#include "cpu/kernels.h"

#include <atomic>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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
#elif defined(__aarch64__)
// AT_HWCAP and AT_HWCAP2 of Linux.
constexpr unsigned long kHwcap = 16, kHwcap2 = 26;

// By the bit that Linux sets, or the name that macOS has for it.
bool has_feature([[maybe_unused]] unsigned long value, [[maybe_unused]] int bit, [[maybe_unused]] const char* name) {
#if defined(__linux__)
  return getauxval(value) >> bit & 1;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return !sysctlbyname(name, &found, &size, nullptr, 0) && found;
#else
  return false;
#endif
}

// NOTE: a part of every 64-bit Arm CPU.
Tier detect() { return Tier::kNeon; }
bool has_bf16() { return has_neon_bf16(); }
bool has_fp16() { return has_feature(kHwcap, 10, "hw.optional.arm.FEAT_FP16"); }
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
  if (best <= limit) return best;
  return limit == Tier::kNeon ? Tier::kPortable : limit;
}

Tier cap_tier(Tier limit) { return cap.exchange(limit); }

bool multiplies(Dtype dtype) {
  static const bool bf16 = has_bf16(), fp16 = has_fp16();
  if (dtype == Dtype::kFloat32) return true;
  const Tier used = tier();
  if (used == Tier::kPortable || used == Tier::kAvx2) return false;
  return dtype == Dtype::kBFloat16 ? bf16 : fp16;
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
#elif defined(__aarch64__)
bool has_neon_bf16() { return has_feature(kHwcap2, 14, "hw.optional.arm.FEAT_BF16"); }
#endif

bool forked() { return in_child; }

}  // namespace nlora::cpu
