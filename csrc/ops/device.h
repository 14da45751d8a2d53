// The switch between devices. This build has one: the CPU.
#pragma once

#include <string>

#include "flexdit/tensor.h"

namespace flexdit {

inline void on_cpu(const Execution& exec, const char* op) {
  if (exec.device != Device::cpu) throw ArgumentError(std::string(op) + ": this build of flexdit has no CUDA backend");
}

}  // namespace flexdit
