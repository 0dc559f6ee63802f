#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace nlora::cuda::emulator {
namespace {

Fiber* running;

// Stacks go back to a pool: mapping 1,500 of them costs more than a small kernel. A guard page lies below each.
std::vector<void*> free_stacks;

void* take_stack() {
  if (!free_stacks.empty()) {
    void* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  const size_t guard = size_t(sysconf(_SC_PAGESIZE));
  void* mapped =
      mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped, guard, PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  return static_cast<char*>(mapped) + guard;
}

}  // namespace

void Fiber::release() {
  if (stack_) {
    free_stacks.push_back(stack_);
    stack_ = nullptr;
  }
}

void Fiber::first_frame() {
  running->entry_();
  __builtin_trap();
}

#if defined(__x86_64__)

// Saves the callee-saved registers and swaps stacks; swapcontext would make a system call each time.
extern "C" void nlora_switch_stack(void** save, void* load);
asm(R"(
    .text
    .globl nlora_switch_stack
    .type nlora_switch_stack, @function
nlora_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size nlora_switch_stack, .-nlora_switch_stack
)");

namespace {
void* outside;
}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  stack_ = stack_ ? stack_ : take_stack();
  auto top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + kStackBytes);
  *--top = 0;   // keeps the stack aligned as after a call
  *--top = reinterpret_cast<uintptr_t>(&first_frame);
  for (int saved_register = 0; saved_register < 6; ++saved_register) {
    *--top = 0;
  }
  context_ = top;
}

void Fiber::resume() {
  running = this;
  nlora_switch_stack(&outside, context_);
}

void Fiber::suspend() { nlora_switch_stack(&context_, outside); }

#else

namespace {
ucontext_t outside;
}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  stack_ = stack_ ? stack_ : take_stack();
  // The context itself lies at the low end of the stack.
  static_assert(sizeof(ucontext_t) < kStackBytes / 4);
  auto context = new (stack_) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = static_cast<char*>(stack_) + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, &first_frame, 0);
  context_ = context;
}

void Fiber::resume() {
  running = this;
  swapcontext(&outside, static_cast<ucontext_t*>(context_));
}

void Fiber::suspend() { swapcontext(static_cast<ucontext_t*>(context_), &outside); }

#endif

}  // namespace nlora::cuda::emulator
