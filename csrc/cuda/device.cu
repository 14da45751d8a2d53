#include "cuda/device.h"

namespace flexdit::cuda {

void launch_failed(const Op& op, dim3 grid, dim3 block, size_t shared_bytes, int device, const char* words) {
  const auto text = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  throw DeviceError(std::string(op.name) + " on [" + std::to_string(op.rows) + ", " + std::to_string(op.cols) +
                    "]: CUDA says \"" + words + "\" on device " + std::to_string(device) + " for a grid of " +
                    text(grid) + " blocks of " + text(block) + " threads with " + std::to_string(shared_bytes) +
                    " bytes of shared memory");
}

}  // namespace flexdit::cuda
