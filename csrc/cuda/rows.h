// A warp per packed row (on the scalar path a block, so that a thread's share stays small): the row lives in the
// threads' registers and is read once, whatever is done to it.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {

constexpr int kRowThreads = 128;
template <int V>
constexpr int kRowLanes = V == 1 ? kRowThreads : kWarp;  // threads of a row
template <int V>
constexpr int kLaneValues = int(kMaxColumns) / kRowLanes<V>;

template <int V>
__device__ __forceinline__ int row_lane() {
  return int(threadIdx.x) % kRowLanes<V>;
}
template <int V>
__device__ __forceinline__ int64_t row_of_thread() {
  return int64_t{blockIdx.x} * (kRowThreads / kRowLanes<V>)+threadIdx.x / kRowLanes<V>;
}

// The sum over a row's threads; each gets it.
template <int V>
__device__ __forceinline__ float row_sum(float x) {
  x = warp_sum(x);
  if constexpr (V == 1) {
    FLEXDIT_SHARED(float, part, [kRowThreads / kWarp]);
    __syncthreads();  // the sum before has been read
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = 0;
    for (float value : part) x += value;
  }
  return x;
}

// Calls body(k, column) for the calling thread's vectors, k = 0, 1, ..., that begin at `column`.
template <int V, class Body>
__device__ __forceinline__ void for_vectors(int cols, Body&& body) {
#pragma unroll
  for (int k = 0; k < kLaneValues<V> / V; ++k) {
    const int column = (k * kRowLanes<V> + row_lane<V>()) * V;
    if (column < cols) body(k, column);
  }
}

// A thread's share of a row as it is stored.
template <class T, int V>
struct Row {
  Vector<T, V> part[kLaneValues<V> / V];

  __device__ __forceinline__ void read(const T* p, int cols) {
    for_vectors<V>(cols, [&](int k, int column) { part[k] = load<V>(p + column); });
  }
  __device__ __forceinline__ void write(T* p, int cols) const {
    for_vectors<V>(cols, [&](int k, int column) { store(p + column, part[k]); });
  }
};

template <class T, int V>
__device__ __forceinline__ void write_zeros(T* p, int cols) {
  Vector<T, V> zeros;
#pragma unroll
  for (int i = 0; i < V; ++i) zeros.set(i, 0.f);
  for (int column = row_lane<V>() * V; column < cols; column += kRowLanes<V> * V) store(p + column, zeros);
}

struct Statistics {
  float mean, rstd;
};

// Two passes over the registers: no cancellation, unlike E[x^2] - E[x]^2.
template <class T, int V>
__device__ __forceinline__ Statistics statistics(const Row<T, V>& x, int cols, float eps) {
  float sum = 0, squares = 0;
  for_vectors<V>(cols, [&](int k, int) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum += x.part[k][i];
  });
  const float mean = row_sum<V>(sum) / float(cols);
  for_vectors<V>(cols, [&](int k, int) {
#pragma unroll
    for (int i = 0; i < V; ++i) squares += (x.part[k][i] - mean) * (x.part[k][i] - mean);
  });
  return {mean, rsqrtf(row_sum<V>(squares) / float(cols) + eps)};
}

// The modulated layer norm that a row gets, unless y is empty.
struct Norm {
  Matrix shift, scale;  // [B, C]
  Matrix y;             // [R, C]
  float eps;
};

template <class T, int V>
__device__ __forceinline__ void normalize(const Row<T, V>& x, const Norm& norm, int64_t sample, int64_t r, int cols) {
  const Statistics s = statistics(x, cols, norm.eps);
  const T *shift = row<T>(norm.shift, sample), *scale = row<T>(norm.scale, sample);
  T* y = row<T>(norm.y, r);
  for_vectors<V>(cols, [&](int k, int column) {
    const auto add = load<V>(shift + column), multiply = load<V>(scale + column);
    Vector<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.set(i, (x.part[k][i] - s.mean) * s.rstd * (1 + multiply[i]) + add[i]);
    store(y + column, out);
  });
}

// Where rows come from is what the operations differ in. A source has
//   template <class T, int V> Row<T, V> row_at(const TokenLayout&, int64_t sample, int64_t r, int cols) const
// and what it returns goes to `out` (unless empty) and to the norm (unless empty). It may say how many blocks a
// multiprocessor must have room for: left to itself the compiler spares registers, and then spills in some.
template <class Source>
constexpr int least_blocks() {
  if constexpr (requires { Source::kLeastBlocks; })
    return Source::kLeastBlocks;
  else
    return 0;
}

template <class T, int V, class Source>
__global__ void __launch_bounds__(kRowThreads, least_blocks<Source>())
    rows_kernel(TokenLayout layout, Source source, Matrix out, Norm norm, int64_t rows, int cols) {
  await_predecessor();
  const int64_t r = row_of_thread<V>();
  if (r >= rows) return;
  if (r >= layout.total()) {
    if (out.data && r < out.rows) write_zeros<T, V>(row<T>(out, r), cols);
    if (norm.y.data && r < norm.y.rows) write_zeros<T, V>(row<T>(norm.y, r), cols);
    return;
  }
  const int64_t sample = layout.sample_of(r);
  const Row<T, V> x = source.template row_at<T, V>(layout, sample, r, cols);
  if (out.data) x.write(row<T>(out, r), cols);
  if (norm.y.data) normalize(x, norm, sample, r, cols);
}

template <int V>
unsigned row_blocks(int64_t rows) {
  return static_cast<unsigned>(ceil_divide(rows, kRowThreads / kRowLanes<V>));
}

// `views`: all views that the source reads.
template <class Source, class... Views>
void launch_rows(const char* name, const TokenLayout& layout, const Source& source, const Matrix& out, const Norm& norm,
                 const Execution& exec, const Views&... views) {
  const Matrix& written = norm.y && norm.y.rows > out.rows ? norm.y : out;
  const int64_t rows = written.rows, cols = written.cols;
  with_vector(
      written.dtype, cols,
      [&](auto tag, auto vector) {
        launch({name, rows, cols}, rows_kernel<decltype(tag), vector(), Source>, row_blocks<vector()>(rows),
               kRowThreads, 0, exec, layout, source, out, norm, rows, int(cols));
      },
      out, norm.shift, norm.scale, norm.y, views...);
}

}  // namespace flexdit::cuda
