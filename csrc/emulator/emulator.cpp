#include "emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

// Saves the callee-saved registers and the stack pointer to *from, and continues where `to` was saved. By hand,
// because swapcontext makes two system calls and AddressSanitizer wipes the stack's shadow in it.
extern "C" void flexdit_switch_fiber(void** from, void* to);
#ifndef __x86_64__
#error "the emulator's switch between fibers is written for x86-64"
#endif
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

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kPage = 4096, kWarp = 32;
constexpr size_t kMaxSharedBytes = 227 << 10, kGuardBytes = 256;  // a block's limit on sm_90
constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;

// Values of a warp operation, kept until every lane has begun another one.
struct Exchange {
  uint32_t holders = 0;
  alignas(16) unsigned char values[kWarp * kMaxLaneBytes];
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

enum class State { ready, in_warp, at_barrier, done };

struct Fiber {
  State state = State::ready;
  dim3 index;
  unsigned lane = 0, warp = 0;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  // Where it waits: a barrier's place in the source, or a warp operation and its lanes.
  const char* where = nullptr;
  int line = 0;
  uint32_t mask = 0;
  size_t bytes = 0;
  unsigned char value[kMaxLaneBytes];
  Exchange* result = nullptr;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // sizes of the committed groups of copies, oldest first
};

// Stacks with an unmapped page below, kept by each host thread between launches.
class Stacks {
 public:
  ~Stacks() {
    for (void* stack : stacks_) munmap(stack, kStackBytes);
  }
  unsigned char* get(size_t i) {
    while (stacks_.size() <= i) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      mprotect(stack, kPage, PROT_NONE);
      stacks_.push_back(stack);
    }
    return static_cast<unsigned char*>(stacks_[i]);
  }

 private:
  std::vector<void*> stacks_;
};

// A block's shared memory: poisoned pieces with canaries between them.
class SharedMemory {
 public:
  SharedMemory() : bytes_(kMaxSharedBytes + 64 * (kGuardBytes + 16) + 128) {
    ASAN_POISON_MEMORY_REGION(bytes_.data(), bytes_.size());
  }
  ~SharedMemory() { ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size()); }

  void begin_block() {
    ASAN_POISON_MEMORY_REGION(bytes_.data(), bytes_.size());
    pieces_.clear();
    used_ = 0;
    guard((128 - reinterpret_cast<uintptr_t>(bytes_.data()) % 128) % 128);  // the dynamic piece comes next, aligned
  }
  unsigned char* piece(const void* key, size_t size) {
    for (const Piece& piece : pieces_)
      if (piece.key == key) return piece.data;
    size_t total = size;
    for (const Piece& piece : pieces_) total += piece.size;
    if (total > kMaxSharedBytes) fail("needs " + std::to_string(total) + " bytes of shared memory");
    unsigned char* data = bytes_.data() + used_;
    if (used_ + size + kGuardBytes + 16 > bytes_.size()) fail("has too many shared arrays for the emulator");
    ASAN_UNPOISON_MEMORY_REGION(data, size);
    std::memset(data, kPoison, size);
    pieces_.push_back({key, data, size});
    used_ += size;
    guard((16 - size % 16) % 16);
    return data;
  }
  // Whether nobody wrote before or behind a piece.
  bool intact() {
    ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), used_);
    size_t at = 0;
    const auto canaries = [&](size_t end) {
      for (; at < end; ++at)
        if (bytes_[at] != kCanary) return false;
      return true;
    };
    for (const Piece& piece : pieces_) {
      const size_t begin = static_cast<size_t>(piece.data - bytes_.data());
      if (!canaries(begin)) return false;
      at = begin + piece.size;
    }
    return canaries(used_);
  }

 private:
  struct Piece {
    const void* key;
    unsigned char* data;
    size_t size;
  };
  void guard(size_t padding) {
    unsigned char* data = bytes_.data() + used_;
    ASAN_UNPOISON_MEMORY_REGION(data, kGuardBytes + padding);
    std::memset(data, kCanary, kGuardBytes + padding);
    ASAN_POISON_MEMORY_REGION(data, kGuardBytes + padding);
    used_ += kGuardBytes + padding;
  }

  std::vector<unsigned char> bytes_;
  std::vector<Piece> pieces_;
  size_t used_ = 0;
};

struct Machine {
  Stacks stacks;
  SharedMemory shared;
  Order order = Order::forward;
  std::vector<Fiber> fibers;
  std::deque<Exchange> exchanges;  // of all warps; a deque, so that they stay where they are
  const Configuration* configuration = nullptr;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  size_t waiting = 0, done = 0;
  std::exception_ptr error;
};
thread_local Machine machine;

std::string text(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// What keeps a thread from going on.
std::string describe(const Fiber& fiber) {
  const std::string name = "thread " + text(fiber.index);
  if (fiber.state == State::done) return name + " has exited";
  if (fiber.state == State::at_barrier)
    return name + " waits at the barrier in " + fiber.where + ":" + std::to_string(fiber.line);
  char mask[16];
  std::snprintf(mask, sizeof mask, "%08x", fiber.mask);
  return name + " waits in " + fiber.where + " with mask " + mask;
}

[[noreturn]] void fail_at(const Fiber& fiber, const std::string& message) {
  throw Error(std::string(machine.configuration->kernel) + ", block " + text(blockIdx) + ", thread " +
              text(fiber.index) + ": " + message);
}

void switch_to_scheduler(Fiber& fiber, bool forever) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  (void)forever;
  flexdit_switch_fiber(&fiber.stack_pointer, machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  Fiber& fiber = *machine.current;
  try {
    (*machine.body)();
    for (const Fiber& other : machine.fibers)
      if (other.state == State::at_barrier) fail("exits, but " + describe(other));
  } catch (...) {
    machine.error = std::current_exception();
  }
  if (fiber.result) fiber.result->holders &= ~(1u << fiber.lane);
  fiber.state = State::done;
  ++machine.done;
  switch_to_scheduler(fiber, true);
  std::abort();
}

void resume(Fiber& fiber, size_t index) {
  machine.current = &fiber;
  threadIdx = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, machine.stacks.get(index), kStackBytes);
#endif
  (void)index;
  flexdit_switch_fiber(&machine.scheduler, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
  if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
}

void begin_fiber(Fiber& fiber, size_t i, const dim3& block) {
  fiber.index = dim3(static_cast<unsigned>(i) % block.x, static_cast<unsigned>(i) / block.x % block.y,
                     static_cast<unsigned>(i) / (block.x * block.y));
  fiber.lane = static_cast<unsigned>(i % kWarp), fiber.warp = static_cast<unsigned>(i / kWarp);
  unsigned char* stack = machine.stacks.get(i);
  ASAN_UNPOISON_MEMORY_REGION(stack + kPage, kStackBytes - kPage);  // a fiber that failed leaves its frames poisoned
  // Six registers, the address that `ret` takes, and a return address of nobody: as if fiber_main had been called.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Nobody is ready: some lanes wait for one that will not come.
[[noreturn]] void fail_divergent() {
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.state != State::in_warp) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      const size_t other = fiber.warp * kWarp + lane;
      if (other >= machine.fibers.size())
        fail_at(fiber, std::string("waits in ") + fiber.where + " for lane " + std::to_string(lane) +
                           ", which the block does not have");
      const Fiber& culprit = machine.fibers[other];
      if (culprit.state != State::in_warp || culprit.mask != fiber.mask || culprit.where != fiber.where)
        fail_at(fiber, describe(fiber) + ", but " + describe(culprit));
    }
  }
  throw Error(std::string(machine.configuration->kernel) + ": no thread can go on");
}

void release_barrier() {
  for (Fiber& fiber : machine.fibers) fiber.state = State::ready;
  machine.waiting = 0;
}

// Lets every ready thread of a warp go on once; whether there was one.
bool run_warp(size_t warp) {
  const size_t begin = warp * kWarp, end = std::min(begin + kWarp, machine.fibers.size());
  bool progress = false;
  for (size_t i = begin; i < end; ++i) {
    const size_t index = machine.order == Order::forward ? i : begin + end - 1 - i;
    if (machine.fibers[index].state != State::ready) continue;
    resume(machine.fibers[index], index);
    progress = true;
  }
  return progress;
}

// Each warp goes as far as it can before the next one starts: a missing barrier shows.
void run_block(const dim3& block) {
  const size_t threads = size_t{block.x} * block.y * block.z, warps = (threads + kWarp - 1) / kWarp;
  machine.fibers.assign(threads, Fiber());
  machine.exchanges.clear();
  machine.waiting = machine.done = 0;
  machine.shared.begin_block();
  if (machine.configuration->shared_bytes) machine.shared.piece(nullptr, machine.configuration->shared_bytes);
  for (size_t i = 0; i < threads; ++i) begin_fiber(machine.fibers[i], i, block);
  while (machine.done < threads) {
    bool progress = false;
    for (size_t w = 0; w < warps; ++w)
      while (run_warp(machine.order == Order::forward ? w : warps - 1 - w)) progress = true;
    if (machine.waiting == threads)
      release_barrier();
    else if (!progress)
      fail_divergent();
  }
  if (!machine.shared.intact())
    throw Error(std::string(machine.configuration->kernel) + ", block " + text(blockIdx) +
                ": wrote outside its shared memory");
}

// Whether all lanes of the fiber's mask wait in its operation.
bool complete(const Fiber& fiber) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    const size_t other = fiber.warp * kWarp + lane;
    if (other >= machine.fibers.size()) return false;
    const Fiber& f = machine.fibers[other];
    if (f.state != State::in_warp || f.mask != fiber.mask || f.where != fiber.where || f.bytes != fiber.bytes)
      return false;
  }
  return true;
}

void exchange(const Fiber& fiber) {
  auto free = std::find_if(machine.exchanges.begin(), machine.exchanges.end(),
                           [](const Exchange& e) { return e.holders == 0; });
  Exchange& result = free == machine.exchanges.end() ? machine.exchanges.emplace_back() : *free;
  result.holders = fiber.mask;
  std::memset(result.values, kPoison, kWarp * fiber.bytes);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    Fiber& other = machine.fibers[fiber.warp * kWarp + lane];
    std::memcpy(result.values + lane * fiber.bytes, other.value, fiber.bytes);
    other.result = &result;
    other.state = State::ready;
  }
}

}  // namespace

void set_order(Order order) { machine.order = order; }

const char* launch_error(const Configuration& c) {
  const auto within = [](const dim3& d, unsigned x, unsigned y, unsigned z) {
    return d.x >= 1 && d.y >= 1 && d.z >= 1 && d.x <= x && d.y <= y && d.z <= z;
  };
  const bool holds = within(c.grid, 0x7fffffff, 65535, 65535) && within(c.block, 1024, 1024, 64) &&
                     size_t{c.block.x} * c.block.y * c.block.z <= 1024;
  return !holds ? "invalid configuration argument" : c.shared_bytes > kMaxSharedBytes ? "invalid argument" : nullptr;
}

void run(const Configuration& configuration, const std::function<void()>& body) {
  machine.configuration = &configuration;
  machine.body = &body;
  gridDim = configuration.grid;
  blockDim = configuration.block;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(configuration.block);
      }
}

namespace {
thread_local std::vector<std::function<void()>>* recorded = nullptr;
}  // namespace

void record(std::vector<std::function<void()>>* list) { recorded = list; }
void submit(std::function<void()> work) {
  if (recorded)
    recorded->push_back(std::move(work));
  else
    work();
}

void fail(const std::string& message) { fail_at(*machine.current, message); }

unsigned lane_id() { return machine.current->lane; }

const unsigned char* warp_exchange(const void* value, size_t bytes, uint32_t mask, const char* operation) {
  Fiber& fiber = *machine.current;
  if (!(mask >> fiber.lane & 1)) fail(std::string(operation) + " whose mask lacks the calling lane");
  if (bytes > kMaxLaneBytes) fail(std::string(operation) + " of more than kMaxLaneBytes");
  if (fiber.result) fiber.result->holders &= ~(1u << fiber.lane);
  fiber.result = nullptr;
  fiber.where = operation, fiber.mask = mask, fiber.bytes = bytes;
  if (bytes) std::memcpy(fiber.value, value, bytes);
  fiber.state = State::in_warp;
  if (complete(fiber))
    exchange(fiber);
  else
    switch_to_scheduler(fiber, false);
  return fiber.result->values;
}

void barrier(const char* file, int line) {
  Fiber& fiber = *machine.current;
  fiber.state = State::at_barrier;
  fiber.where = file, fiber.line = line;
  ++machine.waiting;
  for (const Fiber& other : machine.fibers) {
    const bool elsewhere = other.state == State::at_barrier && (other.line != line || std::strcmp(other.where, file));
    if (elsewhere || other.state == State::done) fail(describe(fiber) + ", but " + describe(other));
    if (other.state == State::at_barrier && &other != &fiber) break;  // it has looked at all before
  }
  switch_to_scheduler(fiber, false);
}

unsigned char* dynamic_shared() { return machine.shared.piece(nullptr, 0); }
void* static_shared(const void* key, size_t bytes) { return machine.shared.piece(key, bytes); }

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("asynchronous copy to an address that is not aligned");
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes) fail("asynchronous copy from an address not aligned");
  machine.current->copies.push_back({shared, valid ? global : nullptr, bytes});
}

void commit_copies() {
  Fiber& fiber = *machine.current;
  size_t grouped = 0;
  for (size_t size : fiber.groups) grouped += size;
  fiber.groups.push_back(fiber.copies.size() - grouped);
}

void wait_copies(size_t groups_left) {
  Fiber& fiber = *machine.current;
  for (; fiber.groups.size() > groups_left; fiber.groups.erase(fiber.groups.begin())) {
    const auto end = fiber.copies.begin() + static_cast<std::ptrdiff_t>(fiber.groups.front());
    for (auto copy = fiber.copies.begin(); copy != end; ++copy) {
      if (copy->from)
        std::memcpy(copy->to, copy->from, copy->bytes);
      else
        std::memset(copy->to, 0, copy->bytes);
    }
    fiber.copies.erase(fiber.copies.begin(), end);
  }
}

}  // namespace emulator
