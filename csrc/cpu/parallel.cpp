// Teams of threads from the OpenMP runtime that the process has loaded, which is PyTorch's. It is looked up by the names
// that GCC calls, to which LLVM's and Intel's runtimes answer too. Nothing is linked and no compiler needs OpenMP: what a
// compiler links by itself may be a second runtime, whose threads take the cores from the first's.
#include "cpu/parallel.h"

#include <type_traits>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "ops.h"

namespace nlora::cpu {
namespace {

struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  void (*barrier)() = nullptr;
  int (*index)() = nullptr;
  int (*count)() = nullptr;
  int (*pause)(int kind) = nullptr;
  bool found = false;

  Runtime() {
#if defined(__unix__) || defined(__APPLE__)
    const auto find = [](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
      return function != nullptr;
    };
    found = find(barrier, "GOMP_barrier") && find(index, "omp_get_thread_num") && find(count, "omp_get_num_threads") &&
            find(parallel, "GOMP_parallel");
    find(pause, "omp_pause_resource_all");  // Of OpenMP 5.0.
#endif
  }
};

const Runtime& runtime() {
  static const Runtime loaded;
  return loaded;
}

struct Team {
  void (*body)(void* data, int index, int count);
  void* data;
};

}  // namespace

void run_team(int threads, void (*body)(void* data, int index, int count), void* data) {
  if (!runtime().found) return body(data, 0, 1);
  Team team = {body, data};
  const auto call = [](void* data) {
    const Team& team = *static_cast<const Team*>(data);
    team.body(team.data, runtime().index(), runtime().count());
  };
  runtime().parallel(call, &team, unsigned(threads), 0);
}

void wait_for_team() { runtime().barrier(); }

void release_team() {
  constexpr int kSoft = 1;  // What was set stays set.
  if (runtime().pause) runtime().pause(kSoft);
}

}  // namespace nlora::cpu
