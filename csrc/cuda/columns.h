// Sums down the rows of a sample: a block owns some columns of one sample, its threads take turns with the rows, and
// the threads' sums are added in a fixed order. No atomics, so results repeat to the bit.
#pragma once

#include "cuda/device.h"

namespace flexdit::cuda {

constexpr int kColumnThreads = 256;
template <int V>
constexpr int kColumnLanes = V == 1 ? 32 : 8;  // threads side by side: 128 bytes of a row

template <int V>
struct Sums {
  float v[V] = {};
};

// Adds the sums of the threads that share columns; the first row of threads gets them. All threads must call.
template <int V>
__device__ __forceinline__ void add_over_rows(Sums<V>& sums) {
  constexpr int kLanes = kColumnLanes<V>, kRows = kColumnThreads / kLanes;
  FLEXDIT_SHARED(float, part, [kRows][kLanes * V]);
  const int lane = int(threadIdx.x) % kLanes, turn = int(threadIdx.x) / kLanes;
  __syncthreads();  // the sums before have been read
#pragma unroll
  for (int i = 0; i < V; ++i) part[turn][lane * V + i] = sums.v[i];
  __syncthreads();
  if (turn > 0) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float sum = 0;
    for (int r = 0; r < kRows; ++r) sum += part[r][lane * V + i];
    sums.v[i] = sum;
  }
}

// A job has
//   kSums; range(sample): {first row, end};
//   add<T, V>(Sums<V>*, sample, r, column) once per row, and finish<T, V>(const Sums<V>*, sample, column);
//   spare(): {first row, end} of rows to clear with clear<T, V>(r, column).
struct RowRange {
  int64_t begin, end;
};

template <class T, int V, class Job>
__global__ void __launch_bounds__(kColumnThreads) columns_kernel(Job job, int cols) {
  await_predecessor();
  constexpr int kLanes = kColumnLanes<V>, kRows = kColumnThreads / kLanes;
  const int64_t sample = blockIdx.y;
  const int column = (int(blockIdx.x) * kLanes + int(threadIdx.x) % kLanes) * V, turn = int(threadIdx.x) / kLanes;
  const bool inside = column < cols;
  Sums<V> sums[Job::kSums];
  if (inside) {
    const RowRange rows = job.range(sample), spare = job.spare();
    for (int64_t r = rows.begin + turn; r < rows.end; r += kRows) job.template add<T, V>(sums, sample, r, column);
    for (int64_t r = spare.begin + sample * kRows + turn; r < spare.end; r += int64_t{gridDim.y} * kRows)
      job.template clear<T, V>(r, column);
  }
#pragma unroll
  for (int i = 0; i < Job::kSums; ++i) add_over_rows(sums[i]);
  if (inside && turn == 0) job.template finish<T, V>(sums, sample, column);
}

// `views`: all views that the job reads or writes.
template <class Job, class... Views>
void launch_columns(const Op& op, DType dtype, int64_t samples, const Job& job, const Execution& exec,
                    const Views&... views) {
  with_vector(
      dtype, op.cols,
      [&](auto tag, auto vector) {
        constexpr int V = vector();
        const auto tiles = static_cast<unsigned>(ceil_divide(op.cols, kColumnLanes<V> * V));
        launch(op, columns_kernel<decltype(tag), V, Job>, dim3(tiles, static_cast<unsigned>(samples)), kColumnThreads,
               0, exec, job, int(op.cols));
      },
      views...);
}

template <class T, int V>
__device__ __forceinline__ void add_or_store(T* p, const Sums<V>& sums, bool accumulate) {
  Vector<T, V> out;
  if (accumulate) out = load<V>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) out.set(i, accumulate ? out[i] + sums.v[i] : sums.v[i]);
  store(p, out);
}

}  // namespace flexdit::cuda
