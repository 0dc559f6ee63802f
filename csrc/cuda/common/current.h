// Which context of a device is current in this thread. Plain C++: its tests need no device.
#pragma once

#include <atomic>
#include <cstdint>

namespace nlora::cuda {

// Makes a context current while it lives, and then what was current before: that of another device, one that is not
// the runtime's, or none. NOTE: cudaSetDevice, called to go back, would start a context on a device that has none.
template <class Driver, class Handle>
class Current {
 public:
  Current(const Driver& driver, Handle context) : driver_(driver), pushed_(driver.current() != context) {
    if (pushed_) {
      driver_.push(context);
    }
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  ~Current() {
    if (pushed_) {
      driver_.pop();
    }
  }

 private:
  const Driver& driver_;
  bool pushed_;
};

// Of the calling thread, never 0 and never given again.
inline uint64_t thread_number() {
  static std::atomic<uint64_t> last{0};
  static thread_local const uint64_t number = ++last;
  return number;
}

}  // namespace nlora::cuda
