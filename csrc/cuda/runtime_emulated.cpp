#include <malloc.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cuda/device.h"
#include "cuda/runtime.h"

namespace flexdit::cuda {

// Fresh memory holds NaNs, so that reading what nobody wrote shows, and so does what is given back, for graphs that go
// on with it.
void* allocate(int64_t bytes, const Execution&) {
  const auto size = static_cast<size_t>((bytes + 127) / 128 * 128);
  void* memory = std::aligned_alloc(128, size > 0 ? size : 128);
  if (!memory) throw std::bad_alloc();
  return std::memset(memory, 0xff, size);
}
void release(void* memory, const Execution&) noexcept {
  std::memset(memory, 0xff, malloc_usable_size(memory));
  asm volatile("" : : "r"(memory) : "memory");  // or the compiler leaves it out before a free
  std::free(memory);
}

void copy(void* to, const void* from, int64_t bytes, const Execution&) {
  emulator::submit([=] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}
void synchronize(const Execution&) {}

struct Uploads::Slots {};
Uploads::Uploads() = default;
Uploads::~Uploads() = default;
void Uploads::upload(void* to, const void* from, int64_t bytes, const Execution& exec) { copy(to, from, bytes, exec); }

struct Graph::Captured {
  std::vector<std::function<void()>> launches;
};
Graph::Graph() = default;
Graph::~Graph() = default;

void Graph::capture(const Execution& exec, const std::function<void(const Execution&)>& body) {
  auto captured = std::make_unique<Captured>();
  emulator::record(&captured->launches);
  try {
    body(exec);
  } catch (...) {
    emulator::record(nullptr);
    throw;
  }
  emulator::record(nullptr);
  captured_ = std::move(captured);
}
void Graph::launch(const Execution&) const {
  for (const auto& launch : captured_->launches) launch();
}

}  // namespace flexdit::cuda
