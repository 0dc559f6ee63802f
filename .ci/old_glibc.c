/* What GCC's static libstdc++ asks of a glibc newer than the wheels' oldest, hidden so that nobody else is given it. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* glibc 2.32. 0: there may be other threads, which is always safe to believe. */
HIDDEN char __libc_single_threaded = 0;

/* glibc 2.36; std::random_device refers to it, which no kernel uses. */
HIDDEN uint32_t arc4random(void) {
  uint32_t value;
  if (syscall(SYS_getrandom, &value, sizeof value, 0) != (long)sizeof value) abort();
  return value;
}
