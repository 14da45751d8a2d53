#include "emulator/emulator.h"

#include <algorithm>
#include <deque>
#include <exception>
#include <utility>
#include <vector>

#include "emulator/fibers.h"
#include "emulator/shared_memory.h"

namespace emulator {
namespace {

constexpr size_t kWarp = 32;

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

struct Thread {
  Fiber fiber;
  State state = State::ready;
  dim3 index;
  unsigned lane = 0, warp = 0;
  bool awaited = false;
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

struct Machine {
  SharedMemory shared;
  Order order = Order::forward;
  std::vector<Thread> threads;
  std::deque<Exchange> exchanges;  // of all warps; a deque, so that they stay where they are
  const Configuration* configuration = nullptr;
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;
  size_t waiting = 0, done = 0;
  std::exception_ptr error;
};
// The calling host thread's. A pointer, because an object would be asked at every access whether it exists.
constinit thread_local Machine* machine = nullptr;

void make_machine() {
  static thread_local Machine made;
  machine = &made;
}

std::string text(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// What keeps a thread from going on.
std::string describe(const Thread& thread) {
  const std::string name = "thread " + text(thread.index);
  if (thread.state == State::done) return name + " has exited";
  if (thread.state == State::at_barrier)
    return name + " waits at the barrier in " + thread.where + ":" + std::to_string(thread.line);
  char mask[16];
  std::snprintf(mask, sizeof mask, "%08x", thread.mask);
  return name + " waits in " + thread.where + " with mask " + mask;
}

[[noreturn]] void fail_at(const Thread& thread, const std::string& message) {
  throw Error(std::string(machine->configuration->kernel) + ", block " + text(blockIdx) + ", thread " +
              text(thread.index) + ": " + message);
}

void thread_main() {
  Fiber::entered();
  Thread& thread = *machine->current;
  try {
    (*machine->body)();
    for (const Thread& other : machine->threads)
      if (other.state == State::at_barrier) fail("exits, but " + describe(other));
  } catch (...) {
    machine->error = std::current_exception();
  }
  if (thread.result) thread.result->holders &= ~(1u << thread.lane);
  thread.state = State::done;
  ++machine->done;
  thread.fiber.suspend(true);
}

void resume(Thread& thread) {
  machine->current = &thread;
  threadIdx = thread.index;
  thread.fiber.resume();
  machine->current = nullptr;
  if (machine->error) std::rethrow_exception(std::exchange(machine->error, nullptr));
}

void begin_thread(Thread& thread, size_t i, const dim3& block) {
  thread.index = dim3(static_cast<unsigned>(i) % block.x, static_cast<unsigned>(i) / block.x % block.y,
                      static_cast<unsigned>(i) / (block.x * block.y));
  thread.lane = static_cast<unsigned>(i % kWarp), thread.warp = static_cast<unsigned>(i / kWarp);
  thread.fiber.begin(i, thread_main);
}

// Nobody is ready: some lanes wait for one that will not come.
[[noreturn]] void fail_divergent() {
  for (const Thread& thread : machine->threads) {
    if (thread.state != State::in_warp) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(thread.mask >> lane & 1)) continue;
      const size_t other = thread.warp * kWarp + lane;
      if (other >= machine->threads.size())
        fail_at(thread, std::string("waits in ") + thread.where + " for lane " + std::to_string(lane) +
                            ", which the block does not have");
      const Thread& culprit = machine->threads[other];
      if (culprit.state != State::in_warp || culprit.mask != thread.mask || culprit.where != thread.where)
        fail_at(thread, describe(thread) + ", but " + describe(culprit));
    }
  }
  throw Error(std::string(machine->configuration->kernel) + ": no thread can go on");
}

void release_barrier() {
  for (Thread& thread : machine->threads) thread.state = State::ready;
  machine->waiting = 0;
}

// Lets every ready thread of a warp go on once; whether there was one.
bool run_warp(size_t warp) {
  const size_t begin = warp * kWarp, end = std::min(begin + kWarp, machine->threads.size());
  bool progress = false;
  for (size_t i = begin; i < end; ++i) {
    const size_t index = machine->order == Order::forward ? i : begin + end - 1 - i;
    if (machine->threads[index].state != State::ready) continue;
    resume(machine->threads[index]);
    progress = true;
  }
  return progress;
}

// Each warp goes as far as it can before the next one starts: a missing barrier shows.
void run_block(const dim3& block) {
  const size_t threads = size_t{block.x} * block.y * block.z, warps = (threads + kWarp - 1) / kWarp;
  machine->threads.assign(threads, Thread());
  machine->exchanges.clear();
  machine->waiting = machine->done = 0;
  machine->shared.begin_block();
  if (machine->configuration->shared_bytes) machine->shared.piece(nullptr, machine->configuration->shared_bytes);
  for (size_t i = 0; i < threads; ++i) begin_thread(machine->threads[i], i, block);
  while (machine->done < threads) {
    bool progress = false;
    for (size_t w = 0; w < warps; ++w)
      while (run_warp(machine->order == Order::forward ? w : warps - 1 - w)) progress = true;
    if (machine->waiting == threads)
      release_barrier();
    else if (!progress)
      fail_divergent();
  }
  if (!machine->shared.intact())
    throw Error(std::string(machine->configuration->kernel) + ", block " + text(blockIdx) +
                ": wrote outside its shared memory");
}

// Whether all lanes of the thread's mask wait in its operation.
bool complete(const Thread& thread) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    const size_t other = thread.warp * kWarp + lane;
    if (other >= machine->threads.size()) return false;
    const Thread& t = machine->threads[other];
    if (t.state != State::in_warp || t.mask != thread.mask || t.where != thread.where || t.bytes != thread.bytes)
      return false;
  }
  return true;
}

void exchange(const Thread& thread) {
  auto free = std::find_if(machine->exchanges.begin(), machine->exchanges.end(),
                           [](const Exchange& e) { return e.holders == 0; });
  Exchange& result = free == machine->exchanges.end() ? machine->exchanges.emplace_back() : *free;
  result.holders = thread.mask;
  std::memset(result.values, kPoison, kWarp * thread.bytes);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    Thread& other = machine->threads[thread.warp * kWarp + lane];
    std::memcpy(result.values + lane * thread.bytes, other.value, thread.bytes);
    other.result = &result;
    other.state = State::ready;
  }
}

}  // namespace

void set_order(Order order) {
  make_machine();
  machine->order = order;
}

const char* launch_error(const Configuration& c) {
  const auto within = [](const dim3& d, unsigned x, unsigned y, unsigned z) {
    return d.x >= 1 && d.y >= 1 && d.z >= 1 && d.x <= x && d.y <= y && d.z <= z;
  };
  const bool holds = within(c.grid, 0x7fffffff, 65535, 65535) && within(c.block, 1024, 1024, 64) &&
                     size_t{c.block.x} * c.block.y * c.block.z <= 1024;
  return !holds ? "invalid configuration argument" : c.shared_bytes > kMaxSharedBytes ? "invalid argument" : nullptr;
}

void run(const Configuration& configuration, const std::function<void()>& body) {
  make_machine();
  machine->configuration = &configuration;
  machine->body = &body;
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

void await_predecessor() { machine->current->awaited = true; }
void expect_awaited() {
  if (!machine->current->awaited) fail("ends without having waited for the kernel before it");
}

void fail(const std::string& message) { fail_at(*machine->current, message); }

unsigned lane_id() { return machine->current->lane; }

const unsigned char* warp_exchange(const void* value, size_t bytes, uint32_t mask, const char* operation) {
  Thread& thread = *machine->current;
  if (!(mask >> thread.lane & 1)) fail(std::string(operation) + " whose mask lacks the calling lane");
  if (bytes > kMaxLaneBytes) fail(std::string(operation) + " of more than kMaxLaneBytes");
  if (thread.result) thread.result->holders &= ~(1u << thread.lane);
  thread.result = nullptr;
  thread.where = operation, thread.mask = mask, thread.bytes = bytes;
  if (bytes) std::memcpy(thread.value, value, bytes);
  thread.state = State::in_warp;
  if (complete(thread))
    exchange(thread);
  else
    thread.fiber.suspend(false);
  return thread.result->values;
}

void barrier(const char* file, int line) {
  Thread& thread = *machine->current;
  thread.state = State::at_barrier;
  thread.where = file, thread.line = line;
  ++machine->waiting;
  for (const Thread& other : machine->threads) {
    const bool elsewhere = other.state == State::at_barrier && (other.line != line || std::strcmp(other.where, file));
    if (elsewhere || other.state == State::done) fail(describe(thread) + ", but " + describe(other));
    if (other.state == State::at_barrier && &other != &thread) break;  // it has looked at all before
  }
  thread.fiber.suspend(false);
}

unsigned char* dynamic_shared() { return machine->shared.piece(nullptr, 0); }
void* static_shared(const void* key, size_t bytes) { return machine->shared.piece(key, bytes); }

void check_shared(const void* address, size_t bytes, const char* operation) {
  if (!machine->shared.holds(address, bytes)) fail(std::string(operation) + " outside of shared memory");
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  check_shared(shared, bytes, "asynchronous copy");
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("asynchronous copy to an address that is not aligned");
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes) fail("asynchronous copy from an address not aligned");
  machine->current->copies.push_back({shared, valid ? global : nullptr, bytes});
}

void commit_copies() {
  Thread& thread = *machine->current;
  size_t grouped = 0;
  for (size_t size : thread.groups) grouped += size;
  thread.groups.push_back(thread.copies.size() - grouped);
}

void wait_copies(size_t groups_left) {
  Thread& thread = *machine->current;
  for (; thread.groups.size() > groups_left; thread.groups.erase(thread.groups.begin())) {
    const auto end = thread.copies.begin() + static_cast<std::ptrdiff_t>(thread.groups.front());
    for (auto copy = thread.copies.begin(); copy != end; ++copy) {
      if (copy->from)
        std::memcpy(copy->to, copy->from, copy->bytes);
      else
        std::memset(copy->to, 0, copy->bytes);
    }
    thread.copies.erase(thread.copies.begin(), end);
  }
}

}  // namespace emulator
