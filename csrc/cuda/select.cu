// Timesteps to a layout of sparse tokens, on the device and without synchronisation: segment of t, grid of the
// segment, offsets by a prefix sum over the samples, and the sample of each row by a prefix maximum over the rows.
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

struct Sum {
  __device__ __forceinline__ int operator()(int a, int b) const { return a + b; }
};
struct Maximum {
  __device__ __forceinline__ int operator()(int a, int b) const { return a > b ? a : b; }
};

// The combination of the block's threads up to and with the calling one; *all is that of all threads.
template <class Combine>
__device__ __forceinline__ int prefix(int x, int* all) {
  FLEXDIT_SHARED(int, warps, [kWarps]);
  const Combine combine;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, unsigned(lanes));
    if (lane >= lanes) x = combine(x, before);
  }
  __syncthreads();  // what was there before has been read
  if (lane == kWarp - 1) warps[warp] = x;
  __syncthreads();
  *all = warps[0];
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) x = combine(x, warps[w]);
    if (w > 0) *all = combine(*all, warps[w]);
  }
  return x;
}

// Every block goes through the whole batch, which is quicker than to wait for one that does. The first one writes the
// table, and each of them the map of kThreads rows.
__global__ void __launch_bounds__(kThreads)
    select_kernel(const double* t, int64_t batch, const __grid_constant__ Segments segments, LayoutRow* table,
                  int32_t* row_map, int64_t rows) {
  await_predecessor();
  FLEXDIT_SHARED(int, beginning, [kThreads]);  // the sample that begins at each of the block's rows, or -1
  const int64_t first_row = int64_t{blockIdx.x} * kThreads;
  beginning[threadIdx.x] = -1;  // a barrier of prefix() comes before what the others write
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
    const int end = offset + prefix<Sum>(tokens, &total), begin = end - tokens;
    if (b < batch) {
      if (blockIdx.x == 0) table[b] = {begin, grid};
      if (end > first_row && begin < first_row + kThreads)  // one that began before holds the block's first row
        beginning[begin > first_row ? begin - first_row : 0] = int(b);
    }
    offset += total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) table[batch] = {offset, {0, 0, 0}};
  if (!row_map) return;
  __syncthreads();
  int last;
  const int sample = prefix<Maximum>(beginning[threadIdx.x], &last);
  const int64_t row = first_row + threadIdx.x;
  const int64_t last_sample = batch > 0 ? batch - 1 : 0;  // which spare rows count to
  if (row < rows) row_map[row] = row < offset ? sample : int(last_sample);
}

}  // namespace

void select_tokens(const SelectTokens& p, const Execution& exec) {
  const auto& grids = p.schedule->grids();
  if (grids.size() > kMaxSegments)
    throw ArgumentError("select_tokens: schedule has " + std::to_string(grids.size()) +
                        " segments, the CUDA backend takes at most " + std::to_string(kMaxSegments));
  Segments segments{static_cast<int>(grids.size()), {}, {}};
  int64_t largest = 1;
  for (size_t i = 0; i < grids.size(); ++i) {
    segments.begins[i] = p.schedule->begins()[i];
    segments.grids[i] = grids[i];
    largest = grids[i].tokens() > largest ? grids[i].tokens() : largest;
  }
  if (p.batch > std::numeric_limits<int32_t>::max() / largest)
    throw ArgumentError("select_tokens: grids of " + std::to_string(p.batch) +
                        " samples may hold more than 2^31 - 1 tokens in all");
  const int64_t map_blocks = p.row_map ? ceil_divide(p.rows, kThreads) : 0;
  launch({"select_tokens", p.batch, static_cast<int64_t>(grids.size())}, select_kernel,
         static_cast<unsigned>(map_blocks > 1 ? map_blocks : 1), kThreads, 0, exec, p.t, p.batch, segments, p.table,
         p.row_map, p.rows);
}

}  // namespace flexdit::cuda
