#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <vector>

namespace flexdit::cuda {
namespace {

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw DeviceError(what + ": CUDA says \"" + cudaGetErrorString(status) + "\"");
}

// Makes a device current for a while.
class OnDevice {
 public:
  explicit OnDevice(const Execution& exec) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(exec.device_index), "device " + std::to_string(exec.device_index));
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

cudaStream_t stream_of(const Execution& exec) { return static_cast<cudaStream_t>(exec.stream); }

}  // namespace

void* allocate(int64_t bytes, const Execution& exec) {
  const OnDevice scope(exec);
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<size_t>(bytes)),
        "allocation of " + std::to_string(bytes) + " bytes on device " + std::to_string(exec.device_index));
  return memory;
}

void release(void* memory, const Execution& exec) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(exec.device_index);
  cudaFree(memory);  // waits for what still uses it
  cudaSetDevice(before);
}

void copy(void* to, const void* from, int64_t bytes, const Execution& exec) {
  const OnDevice scope(exec);
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_of(exec)),
        "copy of " + std::to_string(bytes) + " bytes");
}

void synchronize(const Execution& exec) {
  const OnDevice scope(exec);
  check(cudaStreamSynchronize(stream_of(exec)), "synchronisation");
}

// Pinned pieces in turn. One is filled again only when its copy is done; with so many of them nobody waits in practice.
struct Uploads::Slots {
  static constexpr size_t kCount = 64;
  struct Slot {
    void* memory = nullptr;
    int64_t bytes = 0;
    cudaEvent_t done = nullptr;
  };
  std::vector<Slot> all = std::vector<Slot>(kCount);
  size_t next = 0;

  ~Slots() {
    for (Slot& slot : all) {
      if (slot.done) cudaEventSynchronize(slot.done), cudaEventDestroy(slot.done);
      if (slot.memory) cudaFreeHost(slot.memory);
    }
  }
  Slot& take(int64_t bytes) {
    Slot& slot = all[next++ % kCount];
    if (slot.done)
      check(cudaEventSynchronize(slot.done), "upload");
    else
      check(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "cudaEventCreate");
    if (slot.bytes < bytes) {
      if (slot.memory) cudaFreeHost(slot.memory);
      slot.memory = nullptr, slot.bytes = 0;
      check(cudaMallocHost(&slot.memory, static_cast<size_t>(bytes)),
            "allocation of " + std::to_string(bytes) + " bytes of pinned memory");
      slot.bytes = bytes;
    }
    return slot;
  }
};

Uploads::Uploads() : slots_(std::make_unique<Slots>()) {}
Uploads::~Uploads() = default;

void Uploads::upload(void* to, const void* from, int64_t bytes, const Execution& exec) {
  if (bytes == 0) return;
  const OnDevice scope(exec);
  auto& slot = slots_->take(bytes);
  std::memcpy(slot.memory, from, static_cast<size_t>(bytes));
  copy(to, slot.memory, bytes, exec);
  check(cudaEventRecord(slot.done, stream_of(exec)), "upload");
}

struct Graph::Captured {
  cudaGraphExec_t executable = nullptr;
  ~Captured() {
    if (executable) cudaGraphExecDestroy(executable);
  }
};

Graph::Graph() = default;
Graph::~Graph() = default;

void Graph::capture(const Execution& exec, const std::function<void(const Execution&)>& body) {
  const OnDevice scope(exec);
  // On a stream of its own: the caller's may be the legacy default one, which cannot be captured.
  struct Capture {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    ~Capture() {
      if (graph) cudaGraphDestroy(graph);
      if (stream) cudaStreamDestroy(stream);
    }
  } capture;
  check(cudaStreamCreateWithFlags(&capture.stream, cudaStreamNonBlocking), "graph capture");
  check(cudaStreamBeginCapture(capture.stream, cudaStreamCaptureModeThreadLocal), "graph capture");
  Execution inside = exec;
  inside.stream = capture.stream;
  try {
    body(inside);
  } catch (...) {
    cudaStreamEndCapture(capture.stream, &capture.graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(capture.stream, &capture.graph), "graph capture");
  auto captured = std::make_unique<Captured>();
  check(cudaGraphInstantiate(&captured->executable, capture.graph, 0), "graph instantiation");
  captured_ = std::move(captured);
}

void Graph::launch(const Execution& exec) const {
  const OnDevice scope(exec);
  check(cudaGraphLaunch(captured_->executable, stream_of(exec)), "graph launch");
}

}  // namespace flexdit::cuda
