// GELU, SiLU and column sums.
#include "cuda/columns.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {
namespace {

constexpr int kThreads = 256;

// The fast exponential and division are right to about 2e-7 here: exp overflows to infinity, whose inverse is 0.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
// GELU(x) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), because (1 + tanh u) / 2 = sigmoid(2 u).
__device__ __forceinline__ float gelu_gate(float x) {
  return sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

struct Gelu {
  Matrix x, y;
  template <class T, int V>
  __device__ __forceinline__ void apply(int64_t r, int64_t column) const {
    auto value = load<V>(row<T>(x, r) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) value.set(i, value[i] * gelu_gate(value[i]));
    store(row<T>(y, r) + column, value);
  }
};

struct GeluGradient {
  Matrix x, grad_y, y, grad_x;
  template <class T, int V>
  __device__ __forceinline__ void apply(int64_t r, int64_t column) const {
    auto value = load<V>(row<T>(x, r) + column), grad = load<V>(row<T>(grad_y, r) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float v = value[i], gate = gelu_gate(v);
      const float slope = gate + v * gate * (1 - gate) * 1.5957691216057308f * (1 + 3 * 0.044715f * v * v);
      value.set(i, v * gate);
      grad.set(i, grad[i] * slope);
    }
    if (y.data) store(row<T>(y, r) + column, value);
    store(row<T>(grad_x, r) + column, grad);
  }
};

struct Silu {
  Matrix x, y;
  template <class T, int V>
  __device__ __forceinline__ void apply(int64_t r, int64_t column) const {
    auto value = load<V>(row<T>(x, r) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) value.set(i, value[i] * sigmoid(value[i]));
    store(row<T>(y, r) + column, value);
  }
};

struct SiluGradient {
  Matrix x, grad_y, grad_x;
  bool accumulate;
  template <class T, int V>
  __device__ __forceinline__ void apply(int64_t r, int64_t column) const {
    const auto value = load<V>(row<T>(x, r) + column), grad = load<V>(row<T>(grad_y, r) + column);
    Vector<T, V> out;
    if (accumulate) out = load<V>(row<T>(grad_x, r) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float gate = sigmoid(value[i]), g = grad[i] * gate * (1 + value[i] * (1 - gate));
      out.set(i, accumulate ? out[i] + g : g);
    }
    store(row<T>(grad_x, r) + column, out);
  }
};

template <class T, int V, class Function>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(Function f, int64_t rows, int64_t vectors_per_row) {
  await_predecessor();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows * vectors_per_row) f.template apply<T, V>(i / vectors_per_row, i % vectors_per_row * V);
}

template <class Function, class... Views>
void launch_elementwise(const Op& op, DType dtype, const Function& f, const Execution& exec, const Views&... views) {
  with_vector(
      dtype, op.cols,
      [&](auto tag, auto vector) {
        const int64_t per_row = op.cols / vector();
        launch(op, elementwise_kernel<decltype(tag), vector(), Function>,
               static_cast<unsigned>(ceil_divide(op.rows * per_row, kThreads)), kThreads, 0, exec, f, op.rows, per_row);
      },
      views...);
}

// Chunks of rows stand for the samples of columns.h.
struct ChunkSums {
  static constexpr int kSums = 1;
  Matrix x, sums;
  float* partial;
  int64_t rows_per_chunk;

  __device__ __forceinline__ RowRange range(int64_t chunk) const {
    const int64_t begin = chunk * rows_per_chunk, end = begin + rows_per_chunk;
    return {begin, end < x.rows ? end : x.rows};
  }
  __device__ __forceinline__ RowRange spare() const { return {0, 0}; }
  template <class T, int V>
  __device__ __forceinline__ void clear(int64_t, int) const {}
  template <class T, int V>
  __device__ __forceinline__ void add(Sums<V>* s, int64_t, int64_t r, int column) const {
    const auto value = load<V>(row<T>(x, r) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) s[0].v[i] += value[i];
  }
  template <class T, int V>
  __device__ __forceinline__ void finish(const Sums<V>* s, int64_t chunk, int column) const {
    if (!partial) return add_or_store(row<T>(sums, 0) + column, s[0], false);
#pragma unroll
    for (int i = 0; i < V; ++i) partial[chunk * x.cols + column + i] = s[0].v[i];
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const float* partial, int64_t chunks, Matrix sums) {
  await_predecessor();
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= sums.cols) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * sums.cols + column];
  *(row<T>(sums, 0) + column) = from_float<T>(sum);
}

}  // namespace

void gelu(const Elementwise& p, const Execution& exec) {
  launch_elementwise({"gelu", p.x.rows, p.x.cols}, p.x.dtype, Gelu{p.x, p.y}, exec, p.x, p.y);
}

void gelu_backward(const GeluBackward& p, const Execution& exec) {
  launch_elementwise({"gelu_backward", p.x.rows, p.x.cols}, p.x.dtype, GeluGradient{p.x, p.grad_y, p.y, p.grad_x}, exec,
                     p.x, p.grad_y, p.y, p.grad_x);
}

void silu(const Elementwise& p, const Execution& exec) {
  launch_elementwise({"silu", p.x.rows, p.x.cols}, p.x.dtype, Silu{p.x, p.y}, exec, p.x, p.y);
}

void silu_backward(const SiluBackward& p, const Execution& exec) {
  launch_elementwise({"silu_backward", p.x.rows, p.x.cols}, p.x.dtype,
                     SiluGradient{p.x, p.grad_y, p.grad_x, p.accumulate}, exec, p.x, p.grad_y, p.grad_x);
}

void column_sums(const ColumnSums& p, const Execution& exec) {
  const Op op{"column_sums", p.x.rows, p.x.cols};
  const bool split = p.chunks > 1;
  const ChunkSums job{p.x, p.sums, split ? p.partial : nullptr, ceil_divide(p.x.rows, p.chunks)};
  launch_columns(op, p.x.dtype, p.chunks, job, exec, p.x, p.sums);
  if (!split) return;
  with_type(p.sums.dtype, [&](auto tag) {
    launch(op, add_chunks_kernel<decltype(tag)>, static_cast<unsigned>(ceil_divide(p.x.cols, kThreads)), kThreads, 0,
           exec, p.partial, p.chunks, p.sums);
  });
}

}  // namespace flexdit::cuda
