// Memory that is held between calls, and captured graphs, on whichever device.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "cuda/runtime.h"
#include "ops/device.h"
#include "ops/trace.h"

namespace flexdit {

// Calls one of two expressions; without CUDA kernels nothing gets here with another device.
#ifdef FLEXDIT_CUDA
#define FLEXDIT_ON(exec, on_cpu, on_cuda) ((exec).device == Device::cpu ? (on_cpu) : (on_cuda))
#else
#define FLEXDIT_ON(exec, on_cpu, on_cuda) ((void)(exec), on_cpu)
#endif

// Memory on exec's device, aligned to 128 bytes; not initialised.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t bytes, const Execution& exec) : exec_(exec), bytes_(bytes > 0 ? bytes : 1) {
    data_ = FLEXDIT_ON(exec, host(bytes_), cuda::allocate(bytes_, exec));
    if (trace::recorder()) trace::recorder()->allocated(data_, bytes_);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_), std::swap(exec_, other.exec_);
    return *this;
  }
  ~Buffer() {
    if (!data_ || (trace::recorder() && trace::recorder()->keeps(data_))) return;
    FLEXDIT_ON(exec_, std::free(data_), cuda::release(data_, exec_));
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // Room for `bytes`; true if the memory moved, and what it held is gone.
  bool reserve(int64_t bytes, const Execution& exec) {
    if (data_ && bytes <= bytes_) return false;
    *this = Buffer();  // give the old memory back first
    *this = Buffer(bytes, exec);
    return true;
  }
  // What lies there is not to be read any more: only the arena checker listens.
  void discard() const { trace::discard(data_, bytes_); }
  void discard(int64_t begin, int64_t count) const { trace::discard(as<char>() + begin, count); }

 private:
  static void* host(int64_t bytes) {
    void* memory = std::aligned_alloc(128, static_cast<size_t>((bytes + 127) / 128 * 128));
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  Execution exec_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// In the order of exec's stream. Host memory must stay until the copy is done: see Uploads for what may go.
inline void copy_bytes(void* to, const void* from, int64_t bytes, const Execution& exec) {
  if (bytes <= 0) return;
  trace::copy(to, from, bytes);
  FLEXDIT_ON(exec, (void)std::memcpy(to, from, static_cast<size_t>(bytes)), cuda::copy(to, from, bytes, exec));
}
inline void synchronize(const Execution& exec) { FLEXDIT_ON(exec, void(), cuda::synchronize(exec)); }

// Small host tables on their way to the device.
class Uploader {
 public:
  void upload(void* to, const void* from, int64_t bytes, const Execution& exec) {
    if (exec.device == Device::cpu) return copy_bytes(to, from, bytes, exec);
    trace::copy(to, from, bytes);
    FLEXDIT_ON(exec, void(), slots().upload(to, from, bytes, exec));
  }

 private:
#ifdef FLEXDIT_CUDA
  cuda::Uploads& slots() { return slots_ ? *slots_ : slots_.emplace(); }
  std::optional<cuda::Uploads> slots_;
#endif
};

// Work that is repeated: on a GPU a captured graph from the second time on (the first loads kernels and asks for
// algorithms, which cannot be captured), on the CPU just run.
class Repeated {
 public:
  template <class Body>
  void run(const Execution& exec, Body&& body) {
#ifdef FLEXDIT_CUDA
    if (exec.device == Device::cuda && runs_++ > 0) {
      if (!graph_) {
        auto graph = std::make_unique<cuda::Graph>();
        graph->capture(exec, body);
        graph_ = std::move(graph);
      }
      return graph_->launch(exec);
    }
#endif
    body(exec);
  }
  // The memory that the work uses has moved.
  void forget() {
#ifdef FLEXDIT_CUDA
    graph_.reset();
#endif
  }

 private:
#ifdef FLEXDIT_CUDA
  int64_t runs_ = 0;
  std::unique_ptr<cuda::Graph> graph_;
#endif
};

}  // namespace flexdit
