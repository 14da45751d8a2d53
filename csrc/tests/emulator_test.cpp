// The emulator: what a correct kernel computes, and every mistake that it promises to catch.
#include <algorithm>

#include "check.h"
#include "cuda/device.h"
#include "message_of.h"

#ifdef __SANITIZE_ADDRESS__
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace flexdit;
using namespace flexdit::cuda;

namespace {

constexpr Op kOp{"test_kernel", 2, 3};

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, const Arguments&... arguments) {
  launch(kOp, kernel, grid, block, shared_bytes, Execution{.device = Device::cuda}, arguments...);
}

// What the emulator says, in both orders of the threads; the two must agree that something is wrong.
template <class... Parameters, class... Arguments>
std::string error_of(void (*kernel)(Parameters...), dim3 block, size_t shared_bytes, const Arguments&... arguments) {
  std::string messages[2];
  for (const auto order : {emulator::Order::backward, emulator::Order::forward}) {
    emulator::set_order(order);
    messages[order == emulator::Order::forward] =
        test::message_of<emulator::Error>([&] { start(kernel, 1, block, shared_bytes, arguments...); });
  }
  CHECK_EQ(messages[0].empty(), messages[1].empty());
  return messages[1];
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

__global__ void indices(unsigned* out) {
  await_predecessor();
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + thread + 1000 * block;
}

__global__ void reverse(const float* in, float* out) {
  await_predecessor();
  FLEXDIT_SHARED(float, one, [256]);
  FLEXDIT_DYNAMIC_SHARED(bytes);
  float* other = reinterpret_cast<float*>(bytes);
  one[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  other[threadIdx.x] = one[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = other[threadIdx.x] + other[blockDim.x - 1 - threadIdx.x] * 1000;
}

__global__ void shuffles(float* sums, int* out) {
  await_predecessor();
  const int lane = static_cast<int>(threadIdx.x % 32);
  sums[threadIdx.x] = warp_sum(static_cast<float>(threadIdx.x));
  int* mine = out + threadIdx.x * 6;
  mine[0] = __shfl_sync(kAllLanes, lane * 10, 7);
  mine[1] = __shfl_down_sync(kAllLanes, lane, 3u);
  mine[2] = __shfl_up_sync(kAllLanes, lane, 3u);
  mine[3] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  mine[4] = __any_sync(kAllLanes, lane == 5) + 2 * __all_sync(kAllLanes, lane < 31);
  // The halves of the warp each on their own, the lower one more often.
  mine[5] = lane;
  if (lane < 16)
    for (int lanes = 8; lanes > 0; lanes /= 2) mine[5] += __shfl_xor_sync(0xffffu, mine[5], lanes);
  else
    mine[5] = __shfl_xor_sync(0xffff0000u, mine[5], 1);
  __syncwarp();
}

__global__ void exchange_values(unsigned char* out) {
  await_predecessor();
  const unsigned char mine[3] = {static_cast<unsigned char>(threadIdx.x), 1, 2};
  const unsigned char* all = emulator::warp_exchange(mine, 3);
  for (int lane = 0; lane < 32; ++lane) out[threadIdx.x * 32 + lane] = all[lane * 3] + all[lane * 3 + 2];
}

__global__ void copies(const float* in, float* out, bool waits) {
  await_predecessor();
  FLEXDIT_SHARED(float, a, [2][128]);
  const int at = static_cast<int>(threadIdx.x) * 4;
  copy_async16(&a[0][at], in + at);
  commit_copies();
  copy_async16(&a[1][at], in + at, threadIdx.x % 2 == 0);
  commit_copies();
  if (waits) wait_copies<1>();
  for (int i = 0; i < 4; ++i) out[at + i] = a[0][at + i];
  if (waits) wait_copies<0>();
  for (int i = 0; i < 4; ++i) out[128 + at + i] = a[1][at + i];
}

__global__ void exits_early() {
  await_predecessor();
  if (threadIdx.x == 33) return;
  __syncthreads();
}
__global__ void two_barriers() {
  await_predecessor();
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void uneven_loop() {
  await_predecessor();
  for (unsigned i = 0; i < 1 + threadIdx.x / 32; ++i) __syncthreads();
}
__global__ void shuffle_or_barrier() {
  await_predecessor();
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __shfl_xor_sync(kAllLanes, 1, 1);
}
__global__ void shuffle_without_some() {
  await_predecessor();
  if (threadIdx.x != 9) __shfl_xor_sync(kAllLanes, 1, 1);
}
__global__ void shuffle_wrong_mask() {
  await_predecessor(); __shfl_xor_sync(0x0000fffeu, 1, 1); }
__global__ void shuffle_outside_mask() {
  await_predecessor();
  if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 20);
}
__global__ void different_masks() {
  await_predecessor(); __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1, 20); }
__global__ void overruns(int64_t at) {
  await_predecessor();
  FLEXDIT_DYNAMIC_SHARED(bytes);
  if (threadIdx.x == 1) bytes[at] = 1;
}
__global__ void overruns_static(int at) {
  await_predecessor();
  FLEXDIT_SHARED(float, values, [8]);
  if (threadIdx.x == 1) *(&values[0] + at) = 1;
}
#ifndef __SANITIZE_ADDRESS__  // which stops it
__global__ void reads_beyond(float* out) {
  await_predecessor();
  FLEXDIT_SHARED(float, values, [32]);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = *(&values[0] + threadIdx.x + 1);
}
#endif
__global__ void copies_beyond(const float* in, int at) {
  await_predecessor();
  FLEXDIT_DYNAMIC_SHARED(bytes);
  copy_async16(bytes + at, in);
}
__global__ void counts(int* counter, int* before) {
  await_predecessor(); before[threadIdx.x] = atomicAdd(counter, 2); }
__global__ void reads_uninitialised(float* out) {
  await_predecessor();
  FLEXDIT_SHARED(float, values, [64]);
  if (threadIdx.x < 63) values[threadIdx.x] = 1;
  __syncthreads();
  float sum = 0;
  for (float value : values) sum += value;
  out[threadIdx.x] = sum;
}
__global__ void misses_barrier(float* out) {
  await_predecessor();
  FLEXDIT_SHARED(float, values, [64]);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// A write outside shared memory: under AddressSanitizer it ends the process at once, so a child makes it.
template <class Kernel, class At>
bool catches_write(Kernel kernel, At at) {
#ifdef __SANITIZE_ADDRESS__
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) _exit(0);
    start(kernel, 1, 32, 100, at);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
#else
  return has(error_of(kernel, 32, 100, at), "wrote outside its shared memory");
#endif
}

}  // namespace

TEST_CASE(every_thread_of_every_block_runs_once) {
  std::vector<unsigned> out(2 * 3 * 2 * 4 * 3 * 5);
  start(indices, dim3(2, 3, 2), dim3(4, 3, 5), 0, out.data());
  for (size_t i = 0; i < out.size(); ++i) CHECK_EQ(out[i], 1 + i % 60 + 1000 * (i / 60));
}

TEST_CASE(shared_memory_and_barriers) {
  std::vector<float> in(256), out(256);
  for (int i = 0; i < 256; ++i) in[size_t(i)] = float(i);
  start(reverse, 3, 256, 1024, in.data(), out.data());
  for (int i = 0; i < 256; ++i) CHECK_EQ(out[size_t(i)], float(255 - i + 1000 * i));
}

TEST_CASE(warp_operations) {
  std::vector<float> sums(96);
  std::vector<int> out(96 * 6);
  start(shuffles, 1, 96, 0, sums.data(), out.data());
  for (int i = 0; i < 96; ++i) {
    const int lane = i % 32, *mine = &out[size_t(i) * 6];
    CHECK_EQ(sums[size_t(i)], float(32 * (i - lane) + 31 * 16));
    CHECK_EQ(mine[0], 70);
    CHECK_EQ(mine[1], lane < 29 ? lane + 3 : lane);
    CHECK_EQ(mine[2], lane >= 3 ? lane - 3 : lane);
    CHECK_EQ(mine[3], 0x49249249);
    CHECK_EQ(mine[4], 1);
    CHECK_EQ(mine[5], lane < 16 ? 120 : lane ^ 1);
  }
  std::vector<unsigned char> bytes(32 * 32);
  start(exchange_values, 1, 32, 0, bytes.data());
  for (size_t i = 0; i < bytes.size(); ++i) CHECK_EQ(int(bytes[i]), int(i % 32 + 2));
}

TEST_CASE(copies_arrive_when_waited_for) {
  std::vector<float> storage(132), out(256);
  float* in = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) % 16 / 4;
  for (int i = 0; i < 128; ++i) in[i] = float(i + 1);
  start(copies, 1, 32, 0, in, out.data(), true);
  for (int i = 0; i < 128; ++i) {
    CHECK_EQ(out[size_t(i)], float(i + 1));
    CHECK_EQ(out[size_t(128 + i)], i / 4 % 2 ? 0.f : float(i + 1));
  }
  start(copies, 1, 32, 0, in, out.data(), false);
  CHECK(std::isnan(out[0]) && std::isnan(out[255]));
  CHECK(has(error_of(copies, 32, 0, in + 1, out.data(), true), "not aligned"));
}

TEST_CASE(divergence_is_an_error) {
  const std::string early = error_of(exits_early, 64, 0);
  CHECK_NOTE(has(early, "test_kernel") && has(early, "thread (33, 0, 0)") && has(early, "barrier"), early);
  const std::string two = error_of(two_barriers, 64, 0);
  CHECK_NOTE(has(two, "emulator_test.cpp") && has(two, "but thread"), two);
  CHECK(has(error_of(uneven_loop, 64, 0), "has exited") || has(error_of(uneven_loop, 64, 0), "exits"));
  CHECK(has(error_of(shuffle_or_barrier, 32, 0), "__shfl_xor_sync"));
  const std::string missing = error_of(shuffle_without_some, 32, 0);
  CHECK_NOTE(has(missing, "thread (9, 0, 0) has exited"), missing);
  CHECK(has(error_of(shuffle_without_some, 8, 0), "lane 8, which the block does not have"));
  CHECK(error_of(exits_early, 32, 0).empty());  // and the emulator still works
}

TEST_CASE(wrong_masks_are_errors) {
  CHECK(has(error_of(shuffle_wrong_mask, 32, 0), "mask lacks the calling lane"));
  CHECK(has(error_of(shuffle_outside_mask, 32, 0), "reads lane 20"));
  CHECK(has(error_of(different_masks, 32, 0), "with mask"));
}

TEST_CASE(writes_outside_shared_memory_are_errors) {
  CHECK(error_of(overruns, 32, 100, int64_t{99}).empty());
  CHECK(catches_write(overruns, int64_t{100}));
  CHECK(catches_write(overruns, int64_t{-1}));
  CHECK(error_of(overruns_static, 32, 100, 7).empty());
  CHECK(catches_write(overruns_static, 8));
}

TEST_CASE(copies_outside_shared_memory_are_errors) {
  alignas(16) const float in[4] = {};
  CHECK(error_of(copies_beyond, 32, 128, in, 112).empty());
  CHECK(has(error_of(copies_beyond, 32, 128, in, 128), "asynchronous copy outside of shared memory"));
  CHECK(has(error_of(copies_beyond, 32, 120, in, 112), "asynchronous copy outside of shared memory"));
  CHECK(has(error_of(copies_beyond, 32, 128, in, -16), "asynchronous copy outside of shared memory"));
}

#ifndef __SANITIZE_ADDRESS__
TEST_CASE(what_lies_beyond_shared_memory_is_nan) {
  std::vector<float> out(32);
  start(reads_beyond, 1, 32, 0, out.data());
  CHECK(out[30] == 1 && std::isnan(out[31]));
}
#endif

TEST_CASE(atomics) {
  int counter = 5;
  std::vector<int> before(64);
  start(counts, 1, 64, 0, &counter, before.data());
  CHECK_EQ(counter, 5 + 2 * 64);
  std::sort(before.begin(), before.end());
  for (int i = 0; i < 64; ++i) CHECK_EQ(before[size_t(i)], 5 + 2 * i);
}

TEST_CASE(uninitialised_shared_memory_is_nan) {
  std::vector<float> out(64);
  start(reads_uninitialised, 1, 64, 0, out.data());
  CHECK(std::isnan(out[0]) && std::isnan(out[63]));
  for (const auto order : {emulator::Order::backward, emulator::Order::forward}) {
    emulator::set_order(order);
    start(misses_barrier, 1, 64, 0, out.data());
    CHECK(std::isnan(out[order == emulator::Order::forward ? 0 : 63]));
  }
}

TEST_CASE(launches_that_a_gpu_refuses) {
  const auto words = [](dim3 grid, dim3 block, size_t bytes) {
    return test::message_of<DeviceError>([&] { start(exits_early, grid, block, bytes); });
  };
  const std::string large = words(1, 1056, 0);
  CHECK_NOTE(has(large, "test_kernel on [2, 3]") && has(large, "invalid configuration argument"), large);
  CHECK(has(words(dim3(1, 70000), 32, 0), "(1, 70000, 1)"));
  CHECK(has(words(1, 32, 300 << 10), "307200 bytes"));
  CHECK(words(0, 32, 0).empty());
  const std::string missing = test::message_of<DeviceError>(
      [] { launch_failed(kOp, 1, 32, 0, 0, "no kernel image is available for execution on the device"); });
  CHECK_NOTE(has(missing, "has kernels for compute capabilities ") && has(missing, "-DCMAKE_CUDA_ARCHITECTURES="),
             missing);
  CHECK(!has(large, "CMAKE_CUDA_ARCHITECTURES"));
}

// Every bit pattern of the 16-bit types goes to float32 and back; halves between neighbours round to even.
TEST_CASE(storage_types) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const float b = to_float(bfloat16{pattern}), h = to_float(float16{pattern});
    if (b == b) CHECK_EQ(bfloat16_bits(b), pattern);
    if (h == h) CHECK_EQ(float16_bits(h), pattern);
    if ((bits & 0x7fff) >= 0x7bff) continue;
    const float next = to_float(float16{static_cast<uint16_t>(bits + 1)}), middle = (h + next) / 2;
    CHECK_EQ(float16_bits(middle), pattern + (bits & 1));
    CHECK_EQ(float16_bits(std::nextafterf(middle, h)), pattern);
    CHECK_EQ(float16_bits(std::nextafterf(middle, next)), pattern + 1);
  }
  CHECK_EQ(to_float(float16{1}), 0x1p-24f);
  CHECK_EQ(float16_bits(65519.f), 0x7bff);
  CHECK_EQ(float16_bits(65520.f), 0x7c00);
  CHECK(std::isnan(to_float(float16{float16_bits(NAN)})) && std::isnan(to_float(bfloat16{bfloat16_bits(NAN)})));
}
