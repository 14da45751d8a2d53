// Memory, copies and captured graphs of a CUDA device, for what holds memory between calls: the sampling engine.
// runtime_cuda.cpp asks CUDA, runtime_emulated.cpp the emulator, whose device memory is the host's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "flexdit/tensor.h"

namespace flexdit::cuda {

void* allocate(int64_t bytes, const Execution& exec);  // throws DeviceError with the bytes and CUDA's words
void release(void* memory, const Execution& exec) noexcept;

// In the stream's order, between any two of device and host memory. The host's must stay until the copy is done.
void copy(void* to, const void* from, int64_t bytes, const Execution& exec);
void synchronize(const Execution& exec);

// Host memory on its way to the device: upload() returns at once, and the caller may reuse `from`.
class Uploads {
 public:
  Uploads();
  ~Uploads();
  void upload(void* to, const void* from, int64_t bytes, const Execution& exec);

 private:
  struct Slots;
  std::unique_ptr<Slots> slots_;
};

// What body launched, to be launched again with one call.
class Graph {
 public:
  Graph();
  ~Graph();
  // Nothing runs while it is captured; body launches on the Execution that it gets.
  void capture(const Execution& exec, const std::function<void(const Execution&)>& body);
  void launch(const Execution& exec) const;

 private:
  struct Captured;
  std::unique_ptr<Captured> captured_;
};

}  // namespace flexdit::cuda
