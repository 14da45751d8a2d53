// The switch between devices. FLEXDIT_CUDA says whether this build has the CUDA kernels.
#pragma once

#include <omp.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace flexdit {

// At most what OMP_THREAD_LIMIT grants: oneDNN shares its work among the threads that it asks for, and of fewer the rest
// is not done.
inline int threads_of(const Execution& exec) {
  return std::min(exec.threads > 0 ? exec.threads : omp_get_max_threads(), omp_get_thread_limit());
}

// Calls one of two functions with `p` on `exec`, after `check`; without CUDA kernels the second does not exist, and the
// checks have refused the device.
#ifdef FLEXDIT_CUDA
constexpr bool kHasCuda = true;
#define FLEXDIT_RUN(on_cpu, on_cuda) \
  (check.launches(), exec.device == Device::cpu ? on_cpu(p, threads_of(exec)) : on_cuda(p, exec))
#else
constexpr bool kHasCuda = false;
#define FLEXDIT_RUN(on_cpu, on_cuda) (check.launches(), on_cpu(p, threads_of(exec)))
#endif

}  // namespace flexdit
