#include "cuda/device.h"

#include <atomic>
#include <cstdlib>

#ifndef FLEXDIT_CUDA_ARCHITECTURES  // the emulator's build
#define FLEXDIT_CUDA_ARCHITECTURES "none"
#endif

namespace flexdit::cuda {
namespace {

// What to do about a device that the build has no kernels for.
std::string how_to_build_for(int device) {
  std::string architecture = "XY (its compute capability X.Y)";
#ifndef FLEXDIT_EMULATED
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    architecture = std::to_string(major) + std::to_string(minor);
#else
  (void)device;
#endif
  return ". This build of flexdit has kernels for compute capabilities " FLEXDIT_CUDA_ARCHITECTURES
         "; build it for this device with CMake's -DCMAKE_CUDA_ARCHITECTURES=" +
         architecture + ", which pip takes in FLEXDIT_CMAKE_ARGS";
}

#ifndef FLEXDIT_EMULATED
// Compiled for the same architectures as all kernels: says which of them this device runs.
__global__ void probe_kernel() {}

bool waits_for_predecessors(int device) {
  cudaFuncAttributes attributes;
  int major = 0;
  // A device may be newer than the code that it runs: then the wait is not in it.
  return cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}
#endif

}  // namespace

#ifndef FLEXDIT_EMULATED
bool launches_early(int device) {
  constexpr int kDevices = 64;
  static const char* const wish = std::getenv("FLEXDIT_PDL");
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  if ((wish && std::string(wish) == "0") || device < 0 || device >= kDevices) return false;
  signed char answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) known[device] = answer = waits_for_predecessors(device) ? 1 : -1;
  return answer > 0;
}
#endif

void launch_failed(const Op& op, dim3 grid, dim3 block, size_t shared_bytes, int device, const char* words) {
  const auto text = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  const bool lacks_kernels = std::strstr(words, "no kernel image") || std::strstr(words, "PTX");
  throw DeviceError(std::string(op.name) + " on [" + std::to_string(op.rows) + ", " + std::to_string(op.cols) +
                    "]: CUDA says \"" + words + "\" on device " + std::to_string(device) + " for a grid of " +
                    text(grid) + " blocks of " + text(block) + " threads with " + std::to_string(shared_bytes) +
                    " bytes of shared memory" + (lacks_kernels ? how_to_build_for(device) : ""));
}

}  // namespace flexdit::cuda
