// CUDA on the CPU, for tests: compiles csrc/cuda/*.cu with g++ and runs a block's threads as fibers, block after
// block. What it catches, as emulator::Error with the kernel and the thread:
//  - divergence: a thread that exits, or waits elsewhere, while others wait at a __syncthreads or in a warp operation;
//  - warp operations whose mask lacks the caller, or that read a lane outside the mask;
//  - writes beyond a shared array (canaries, which read as NaN; at once under AddressSanitizer, which sees the gaps as
//    poisoned), and copies or ldmatrix rows outside of one, at once;
//  - launches that a GPU would refuse.
// Shared memory starts as 0xFF bytes at every block, so that reading what nobody wrote gives NaN. Asynchronous copies
// arrive when they are waited for, not before. Each warp runs as far as it can before the next one starts, and
// set_order() turns their order round: a missing barrier shows in one of the two orders.
//
// Collective primitive for warp-wide instructions (mma, ldmatrix): warp_exchange(value, bytes) is called by all lanes
// of the mask and returns the address of all 32 lanes' values, lane l's at [l * bytes]; lanes outside the mask read
// as 0xFF bytes. The memory stays valid until the calling lane's next warp operation.
//
// Under the emulator device memory is host memory and a stream is nothing: launches run at once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { forward, backward };
void set_order(Order order);  // of the threads of a block, for launches of the calling host thread

struct Configuration {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
};
// What a GPU would say against a launch, or null.
const char* launch_error(const Configuration& configuration);
// Runs body once per thread.
void run(const Configuration& configuration, const std::function<void()>& body);

// Work on the stream: done at once, or, while the calling host thread records, kept in the list for later.
void submit(std::function<void()> work);
void record(std::vector<std::function<void()>>* list);  // null: no longer

// A thread waits for the kernel before its own; expect_awaited fails for one that has not.
void await_predecessor();
void expect_awaited();

constexpr size_t kMaxLaneBytes = 128;
constexpr uint32_t kFullMask = 0xffffffffu;
const unsigned char* warp_exchange(const void* value, size_t bytes, uint32_t mask = kFullMask,
                                   const char* operation = "warp_exchange");
unsigned lane_id();
[[noreturn]] void fail(const std::string& message);  // with the kernel's name and the thread in front

void barrier(const char* file, int line);
unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes);  // the same memory for the same key within a block
void check_shared(const void* address, size_t bytes, const char* operation);  // that they lie in one shared array

void copy_async(void* shared, const void* global, size_t bytes, bool valid);  // zeros when not valid
void commit_copies();
void wait_copies(size_t groups_left);

template <class T>
T read_lane(const unsigned char* values, uint32_t mask, unsigned lane) {
  if (!(mask >> lane & 1)) fail("shuffle reads lane " + std::to_string(lane) + ", which is not in its mask");
  T value;
  std::memcpy(&value, values + lane * sizeof(T), sizeof(T));
  return value;
}

}  // namespace emulator

constinit inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::barrier(file, line);
}
inline void __syncwarp(uint32_t mask = emulator::kFullMask) { emulator::warp_exchange(nullptr, 0, mask, "__syncwarp"); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  const auto* values = emulator::warp_exchange(&value, sizeof(T), mask, "__shfl_sync");
  return emulator::read_lane<T>(values, mask, static_cast<unsigned>(lane) % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  const auto* values = emulator::warp_exchange(&value, sizeof(T), mask, "__shfl_xor_sync");
  return emulator::read_lane<T>(values, mask, (emulator::lane_id() ^ static_cast<unsigned>(lanes)) % 32);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes) {
  const auto* values = emulator::warp_exchange(&value, sizeof(T), mask, "__shfl_down_sync");
  const unsigned source = emulator::lane_id() + lanes;
  return source < 32 ? emulator::read_lane<T>(values, mask, source) : value;
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes) {
  const auto* values = emulator::warp_exchange(&value, sizeof(T), mask, "__shfl_up_sync");
  const unsigned lane = emulator::lane_id();
  return lane >= lanes ? emulator::read_lane<T>(values, mask, lane - lanes) : value;
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const unsigned char bit = predicate != 0;
  const auto* values = emulator::warp_exchange(&bit, 1, mask, "__ballot_sync");
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= (mask >> lane & 1 & values[lane]) << lane;
  return ballot;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Only one thread runs at a time.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
inline void __threadfence() {}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(3.14159265358979323846 * x));
  *cosine = static_cast<float>(std::cos(3.14159265358979323846 * x));
}
template <class To, class From>
To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline uint32_t __float_as_uint(float x) { return emulated_bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulated_bit_cast<float>(x); }
