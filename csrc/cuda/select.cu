// Timesteps to a layout of sparse tokens, on the device and without synchronisation: segment of t, grid of the
// segment, and offsets by a prefix sum over the samples.
#include <limits>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// A density schedule as a kernel parameter.
struct Segments {
  int count;
  int64_t begins[kMaxSegments];
  Grid grids[kMaxSegments];
};

// The sum over the block's threads up to and with the calling one; *total is that over all.
__device__ __forceinline__ int prefix_sum(int x, int* total) {
  FLEXDIT_SHARED(int, warp_sums, [kWarps]);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, unsigned(lanes));
    if (lane >= lanes) x += before;
  }
  __syncthreads();  // the sums before have been read
  if (lane == kWarp - 1) warp_sums[warp] = x;
  __syncthreads();
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) x += warp_sums[w];
    *total += warp_sums[w];
  }
  return x;
}

__global__ void __launch_bounds__(kThreads)
    select_kernel(const double* t, int64_t batch, const __grid_constant__ Segments segments, LayoutRow* table) {
  await_predecessor();
  int offset = 0;
  for (int64_t first = 0; first < batch; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    Grid grid{0, 0, 0};
    if (b < batch) {
      int segment = 0;
      while (segment + 1 < segments.count && t[b] >= double(segments.begins[segment + 1])) ++segment;
      grid = segments.grids[segment];
    }
    const int tokens = int(grid.tokens());
    int total;
    const int end = offset + prefix_sum(tokens, &total);
    if (b < batch) table[b] = {end - tokens, grid};
    offset += total;
  }
  if (threadIdx.x == 0) table[batch] = {offset, {0, 0, 0}};
}

}  // namespace

void select_tokens(const SelectTokens& p, const Execution& exec) {
  const auto& grids = p.schedule->grids();
  const auto require = [](bool holds, const std::string& message) {
    if (!holds) throw ArgumentError("select_tokens: " + message);
  };
  require(grids.size() <= kMaxSegments, "schedule has " + std::to_string(grids.size()) +
                                            " segments, the CUDA backend takes at most " +
                                            std::to_string(kMaxSegments));
  Segments segments{static_cast<int>(grids.size()), {}, {}};
  int64_t largest = 1;
  for (size_t i = 0; i < grids.size(); ++i) {
    segments.begins[i] = p.schedule->begins()[i];
    segments.grids[i] = grids[i];
    largest = grids[i].tokens() > largest ? grids[i].tokens() : largest;
  }
  require(p.batch <= std::numeric_limits<int32_t>::max() / largest,
          "grids of " + std::to_string(p.batch) + " samples may hold more than 2^31 - 1 tokens in all");
  launch({"select_tokens", p.batch, static_cast<int64_t>(grids.size())}, select_kernel, 1, kThreads, 0, exec, p.t,
         p.batch, segments, p.table);
}

}  // namespace flexdit::cuda
