#include "emulator/fibers.h"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(FLEXDIT_UCONTEXT)
// Saves the callee-saved registers and the stack pointer to *from, and continues where `to` was saved. By hand, because
// swapcontext makes two system calls, and AddressSanitizer wipes the stack's shadow in it.
extern "C" void flexdit_switch_fiber(void** from, void* to);
asm(R"(
.text
.globl flexdit_switch_fiber
.type flexdit_switch_fiber, @function
flexdit_switch_fiber:
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
.size flexdit_switch_fiber, .-flexdit_switch_fiber
)");
#else
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;  // a multiple of every page size

#if defined(__x86_64__) && !defined(FLEXDIT_UCONTEXT)
struct Context {
  void* stack_pointer = nullptr;

  void begin(unsigned char* stack, void (*entry)()) {
    // Six registers, the address that `ret` takes, and a return address of nobody: as if entry had been called.
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
  void switch_to(Context& other) { flexdit_switch_fiber(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t saved;

  void begin(unsigned char* stack, void (*entry)()) {
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = kStackBytes;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&saved, &other.saved); }
};
#endif

// A stack above unmapped memory, and where its fiber goes on.
class Stack {
 public:
  Stack() : memory_(mmap(nullptr, kAll, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuardBytes, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(memory_, kAll); }
  unsigned char* begin() const { return static_cast<unsigned char*>(memory_) + kGuardBytes; }

  Context context;

 private:
  static constexpr size_t kAll = kGuardBytes + kStackBytes;
  void* memory_;
};

// Each host thread keeps its stacks between launches.
struct Host {
  std::deque<Stack> stacks;
  Context context;
  const void* stack = nullptr;  // the host thread's own, as AddressSanitizer knows it
  size_t stack_bytes = 0;
};
constinit thread_local Host* host = nullptr;  // a pointer for the sake of speed: see emulator.cpp

}  // namespace

void Fiber::begin(size_t index, void (*entry)()) {
  static thread_local Host made;
  host = &made;
  while (host->stacks.size() <= index) host->stacks.emplace_back();
  Stack& stack = host->stacks[index_ = index];
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack.begin(), kStackBytes);  // a fiber that failed leaves its frames poisoned
#endif
  stack.context.begin(stack.begin(), entry);
}

void Fiber::resume() {
  Stack& stack = host->stacks[index_];
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack.begin(), kStackBytes);
#endif
  host->context.switch_to(stack.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend(bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, host->stack, host->stack_bytes);
#endif
  host->stacks[index_].context.switch_to(host->context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  if (last) std::abort();
}

void Fiber::entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host->stack, &host->stack_bytes);
#endif
}

}  // namespace emulator
