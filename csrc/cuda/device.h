// The only header that kernels include: CUDA under nvcc, the emulator under g++ (FLEXDIT_EMULATED), and what all
// kernels share: storage types, 16-byte accesses, reductions, asynchronous copies, and the one way to launch.
#pragma once

#ifdef FLEXDIT_EMULATED
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "flexdit/tensor.h"

// Shared memory: FLEXDIT_SHARED(float, sums, [32][33]) declares an array, FLEXDIT_DYNAMIC_SHARED(bytes) a pointer
// to the launch's bytes, aligned to 128.
#ifdef FLEXDIT_EMULATED
#define FLEXDIT_SHARED(type, name, extents) \
  using name##_array = type extents;        \
  static const char name##_key = 0;         \
  name##_array& name = *static_cast<name##_array*>(emulator::static_shared(&name##_key, sizeof(name##_array)))
#define FLEXDIT_DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared()
#else
#define FLEXDIT_SHARED(type, name, extents) \
  using name##_array = type extents;        \
  __shared__ name##_array name
#define FLEXDIT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace flexdit::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- Storage types. Arithmetic is float32 everywhere.

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

#ifdef FLEXDIT_EMULATED
inline float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  const float magnitude =
      exponent ? __uint_as_float((exponent + 112) << 23 | mantissa << 13) : float(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
inline uint16_t bfloat16_bits(float x) {  // round to nearest even, NaN stays NaN
  const uint32_t bits = __float_as_uint(x);
  return x == x ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;
}
inline uint16_t float16_bits(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (!(x == x)) return 0x7fff;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t bits = __float_as_uint(magnitude);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}
#else
__device__ __forceinline__ float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ uint16_t bfloat16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint16_t float16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return {bfloat16_bits(x)};
  else
    return {float16_bits(x)};
}

// Calls body(T{}) with the storage type of `dtype`; ops/ has refused float64 before.
template <class Body>
void with_type(DType dtype, Body&& body) {
  if (dtype == DType::float32) body(float{});
  if (dtype == DType::bfloat16) body(bfloat16{});
  if (dtype == DType::float16) body(float16{});
}

template <class T>
__host__ __device__ T* row(const Matrix& m, int64_t i) {
  return static_cast<T*>(m.data) + i * m.stride;
}

// ---- V values that are loaded and stored at once: 16 bytes, or one value on the scalar path.

template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];

  __device__ __forceinline__ float operator[](int i) const { return to_float(v[i]); }
  __device__ __forceinline__ void set(int i, float x) { v[i] = from_float<T>(x); }
};

#ifndef FLEXDIT_EMULATED
template <size_t kBytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<16> {
  using type = uint4;
};
#endif

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* p) {
#ifdef FLEXDIT_EMULATED
  return *reinterpret_cast<const Vector<T, V>*>(p);  // UBSan looks at the alignment
#else
  using W = typename Word<sizeof(T) * V>::type;
  const W word = *reinterpret_cast<const W*>(p);
  Vector<T, V> x;
  memcpy(&x, &word, sizeof x);
  return x;
#endif
}
template <class T, int V>
__device__ __forceinline__ void store(T* p, const Vector<T, V>& x) {
#ifdef FLEXDIT_EMULATED
  *reinterpret_cast<Vector<T, V>*>(p) = x;
#else
  using W = typename Word<sizeof(T) * V>::type;
  W word;
  memcpy(&word, &x, sizeof x);
  *reinterpret_cast<W*>(p) = word;
#endif
}

// Whether every row of every view given can be read and written 16 bytes at a time. Empty views do not count.
template <class T, class... Views>
bool vectorizable(int64_t cols, const Views&... views) {
  const auto aligned = [](const Matrix& m) {
    return !m || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && (m.rows <= 1 || m.stride % kVector<T> == 0));
  };
  return cols % kVector<T> == 0 && (aligned(views) && ...);
}
// Calls body(T{}, std::integral_constant<int, V>{}) with V values per access.
template <class Body, class... Views>
void with_vector(DType dtype, int64_t cols, Body&& body, const Views&... views) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (vectorizable<T>(cols, views...))
      body(tag, std::integral_constant<int, kVector<T>>{});
    else
      body(tag, std::integral_constant<int, 1>{});
  });
}

// ---- Reductions. Every lane gets the sum; the order is fixed, so results repeat.

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// ---- Asynchronous copies of 16 bytes from global to shared memory; zeros arrive when `valid` is false.

__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid = true) {
#ifdef FLEXDIT_EMULATED
  emulator::copy_async(shared, global, 16, valid);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef FLEXDIT_EMULATED
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kGroupsLeft` committed groups of this thread are under way. Others see them after a barrier.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_copies() {
#ifdef FLEXDIT_EMULATED
  emulator::wait_copies(kGroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// ---- Launches.

// Every kernel begins with this. On sm_90 and newer a kernel is launched while the one before it still runs, and waits
// here until that has ended and its writes can be seen (programmatic dependent launch); then the next one may come.
__device__ __forceinline__ void await_predecessor() {
#ifdef FLEXDIT_EMULATED
  emulator::await_predecessor();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What the caller computes, for error messages.
struct Op {
  const char* name;
  int64_t rows, cols;
};

#ifdef FLEXDIT_EMULATED
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif
inline Stream stream_of(const Execution& exec) { return static_cast<Stream>(exec.stream); }

#ifndef FLEXDIT_EMULATED
// Whether the kernels that run on the current device were compiled to wait for the one before them, and FLEXDIT_PDL is
// not 0.
bool launches_early(int device);
#endif

// Throws DeviceError with the op, its sizes, the launch and `words`.
[[noreturn]] void launch_failed(const Op& op, dim3 grid, dim3 block, size_t shared_bytes, int device,
                                const char* words);

// kernel<<<grid, block, shared_bytes, exec.stream>>>(arguments...) on exec.device_index; an empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(const Op& op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const Execution& exec, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef FLEXDIT_EMULATED
  const emulator::Configuration configuration{op.name, grid, block, shared_bytes};
  if (const char* words = emulator::launch_error(configuration))
    launch_failed(op, grid, block, shared_bytes, exec.device_index, words);
  emulator::submit([=] {
    emulator::run(configuration, [&] {
      kernel(arguments...);
      emulator::expect_awaited();
    });
  });
#else
  constexpr size_t kDefaultSharedBytes = 48 << 10;
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && before != exec.device_index) status = cudaSetDevice(exec.device_index);
  if (status == cudaSuccess && shared_bytes > kDefaultSharedBytes)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_of(exec);
    config.attrs = &early, config.numAttrs = launches_early(exec.device_index) ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    if (status != cudaSuccess) cudaGetLastError();  // so that the next call does not report it again
  }
  if (before != exec.device_index) cudaSetDevice(before);
  if (status != cudaSuccess)
    launch_failed(op, grid, block, shared_bytes, exec.device_index, cudaGetErrorString(status));
#endif
}

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels with a thread per element.
constexpr int kElementThreads = 256;
inline unsigned element_blocks(int64_t elements) {
  return static_cast<unsigned>(ceil_divide(elements, kElementThreads));
}
__device__ __forceinline__ int64_t element_of_thread() { return int64_t{blockIdx.x} * kElementThreads + threadIdx.x; }

}  // namespace flexdit::cuda
