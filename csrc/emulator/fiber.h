// Fibers: one stack and one saved stack pointer for each CUDA thread.
#pragma once

#include <cstddef>

namespace nlora::cuda::emulator {

constexpr size_t kStackBytes = 64 * 1024;

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { release(); }

  // The first resume() calls entry, which must never return.
  void start(void (*entry)());

  // Runs the fiber until it suspends; called from outside every fiber.
  void resume();

  // Back to the caller of resume(); called inside the fiber.
  void suspend();

  // Gives the stack back; the fiber must not be resumed any more.
  void release();

 private:
  static void first_frame();

  void* stack_ = nullptr;
  void* context_ = nullptr;
  void (*entry_)() = nullptr;
};

}  // namespace nlora::cuda::emulator
