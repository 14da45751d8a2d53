// Layer norm with modulation, the gated residual fused with it, and the pooled mean; forward and backward.
// Backward of a norm is two kernels: rows (gradient of x, and each row's statistics), then columns (gradients of the
// modulation, which sum over a sample's rows).
#include "cuda/columns.h"
#include "cuda/rows.h"

namespace flexdit::cuda {
namespace {

struct PlainRows {
  Matrix x;
  template <class T, int V>
  __device__ __forceinline__ Row<T, V> row_at(const TokenLayout&, int64_t, int64_t r, int cols) const {
    Row<T, V> out;
    out.read(row<T>(x, r), cols);
    return out;
  }
};

struct GatedRows {
  Matrix x, y, gate;
  bool y_per_sample;
  template <class T, int V>
  __device__ __forceinline__ Row<T, V> row_at(const TokenLayout&, int64_t sample, int64_t r, int cols) const {
    Row<T, V> out;
    out.read(row<T>(x, r), cols);
    const T *branch = row<T>(y, y_per_sample ? sample : r), *gates = gate.data ? row<T>(gate, sample) : nullptr;
    for_vectors<V>(cols, [&](int k, int column) {
      const auto b = load<V>(branch + column);
      Vector<T, V> g;
      if (gates) g = load<V>(gates + column);
#pragma unroll
      for (int i = 0; i < V; ++i) out.part[k].set(i, out.part[k][i] + (gates ? g[i] * b[i] : b[i]));
    });
    return out;
  }
};

// The gradient that arrives at a normalised row: a row of its own, or its sample's divided by the number of rows.
struct NormGradient {
  Matrix grad;
  bool per_sample;
  __device__ __forceinline__ int64_t row_of(int64_t sample, int64_t r) const { return per_sample ? sample : r; }
  __device__ __forceinline__ float weight(const TokenLayout& layout, int64_t sample) const {
    return per_sample ? 1.f / float(layout.offset(sample + 1) - layout.offset(sample)) : 1.f;
  }
};

struct NormBackwardRows {
  TokenLayout layout;
  Matrix x, scale, residual, grad_x;
  NormGradient incoming;
  Statistics* statistics;  // [R], written
  float eps;
};

// grad_x = rstd (g - mean(g) - xhat mean(g xhat)) + residual, with g = incoming (1 + scale).
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads) norm_backward_kernel(NormBackwardRows p) {
  await_predecessor();
  const int64_t r = row_of_thread<V>();
  const int cols = int(p.x.cols);
  if (r >= p.grad_x.rows) return;
  if (r >= p.layout.total()) return write_zeros<T, V>(row<T>(p.grad_x, r), cols);
  const int64_t sample = p.layout.sample_of(r);
  const T* scale = row<T>(p.scale, sample);
  const float weight = p.incoming.weight(p.layout, sample);
  Row<T, V> x, g;
  x.read(row<T>(p.x, r), cols);
  g.read(row<T>(p.incoming.grad, p.incoming.row_of(sample, r)), cols);
  const Statistics s = statistics(x, cols, p.eps);
  if (row_lane<V>() == 0) p.statistics[r] = s;
  float sum = 0, dot = 0;
  for_vectors<V>(cols, [&](int k, int column) {
    const auto multiply = load<V>(scale + column);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = g.part[k][i] * (1 + multiply[i]) * weight;
      sum += value;
      dot += value * (x.part[k][i] - s.mean) * s.rstd;
    }
  });
  sum = row_sum<V>(sum) / float(cols);
  dot = row_sum<V>(dot) / float(cols);
  for_vectors<V>(cols, [&](int k, int column) {
    const auto multiply = load<V>(scale + column);
    Vector<T, V> out;
    if (p.residual.data) out = load<V>(row<T>(p.residual, r) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = g.part[k][i] * (1 + multiply[i]) * weight;
      const float grad = s.rstd * (value - sum - (x.part[k][i] - s.mean) * s.rstd * dot);
      out.set(i, p.residual.data ? out[i] + grad : grad);
    }
    store(row<T>(p.grad_x, r) + column, out);
  });
}

void launch_norm_backward(const char* name, const NormBackwardRows& p, const Execution& exec) {
  with_vector(
      p.x.dtype, p.x.cols,
      [&](auto tag, auto vector) {
        launch({name, p.grad_x.rows, p.x.cols}, norm_backward_kernel<decltype(tag), vector()>,
               row_blocks<vector()>(p.grad_x.rows), kRowThreads, 0, exec, p);
      },
      p.x, p.scale, p.incoming.grad, p.residual, p.grad_x);
}

// Rows of a sample; operations that leave nothing to clear have no spare rows.
struct SampleRows {
  TokenLayout layout;
  __device__ __forceinline__ RowRange range(int64_t sample) const {
    return {layout.offset(sample), layout.offset(sample + 1)};
  }
  __device__ __forceinline__ RowRange spare() const { return {0, 0}; }
  template <class T, int V>
  __device__ __forceinline__ void clear(int64_t, int) const {}
};

struct ModulationGradients : SampleRows {
  static constexpr int kSums = 2;  // shift, scale
  Matrix x, grad_y, grad_shift, grad_scale;
  const Statistics* statistics;
  bool accumulate;

  template <class T, int V>
  __device__ __forceinline__ void add(Sums<V>* sums, int64_t, int64_t r, int column) const {
    const auto value = load<V>(row<T>(x, r) + column), g = load<V>(row<T>(grad_y, r) + column);
    const Statistics s = statistics[r];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0].v[i] += g[i];
      sums[1].v[i] += g[i] * (value[i] - s.mean) * s.rstd;
    }
  }
  template <class T, int V>
  __device__ __forceinline__ void finish(const Sums<V>* sums, int64_t sample, int column) const {
    add_or_store(row<T>(grad_shift, sample) + column, sums[0], accumulate);
    add_or_store(row<T>(grad_scale, sample) + column, sums[1], accumulate);
  }
};

struct MeanModulationGradients : SampleRows {
  static constexpr int kSums = 1;  // of the normalised x
  Matrix x, grad_mean, grad_shift, grad_scale;
  const Statistics* statistics;

  template <class T, int V>
  __device__ __forceinline__ void add(Sums<V>* sums, int64_t, int64_t r, int column) const {
    const auto value = load<V>(row<T>(x, r) + column);
    const Statistics s = statistics[r];
#pragma unroll
    for (int i = 0; i < V; ++i) sums[0].v[i] += (value[i] - s.mean) * s.rstd;
  }
  template <class T, int V>
  __device__ __forceinline__ void finish(const Sums<V>* sums, int64_t sample, int column) const {
    const RowRange rows = range(sample);
    const auto g = load<V>(row<T>(grad_mean, sample) + column);
    Vector<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.set(i, g[i] * sums[0].v[i] / float(rows.end - rows.begin));
    store(row<T>(grad_shift, sample) + column, g);
    store(row<T>(grad_scale, sample) + column, out);
  }
};

// grad_y is written row by row on the way, or summed with y_per_sample.
struct ResidualGradients : SampleRows {
  static constexpr int kSums = 2;  // gate, y
  Matrix y, gate, grad_out, grad_y, grad_gate;
  bool y_per_sample;

  __device__ __forceinline__ RowRange spare() const {
    return {layout.total(), y_per_sample ? layout.total() : grad_y.rows};
  }
  template <class T, int V>
  __device__ __forceinline__ void add(Sums<V>* sums, int64_t sample, int64_t r, int column) const {
    const auto g = load<V>(row<T>(grad_out, r) + column);
    const auto branch = load<V>(row<T>(y, y_per_sample ? sample : r) + column);
    const auto gates = load<V>(row<T>(gate, sample) + column);
    Vector<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0].v[i] += g[i] * branch[i];
      sums[1].v[i] += g[i] * gates[i];
      out.set(i, g[i] * gates[i]);
    }
    if (!y_per_sample) store(row<T>(grad_y, r) + column, out);
  }
  template <class T, int V>
  __device__ __forceinline__ void finish(const Sums<V>* sums, int64_t sample, int column) const {
    add_or_store(row<T>(grad_gate, sample) + column, sums[0], false);
    if (y_per_sample) add_or_store(row<T>(grad_y, sample) + column, sums[1], false);
  }
  template <class T, int V>
  __device__ __forceinline__ void clear(int64_t r, int column) const {
    add_or_store(row<T>(grad_y, r) + column, Sums<V>{}, false);
  }
};

template <int V>
constexpr int kMeanThreads = V == 1 ? kRowThreads : 512;
template <int V>
constexpr int kMeanRows = kMeanThreads<V> / kRowLanes<V>;  // rows under way at a time

// A block per sample. Each warp normalises every 16th row in its registers and adds it up there: x is read once.
template <class T, int V>
__global__ void __launch_bounds__(kMeanThreads<V>) modulated_mean_kernel(ModulatedMean p, float eps) {
  await_predecessor();
  FLEXDIT_DYNAMIC_SHARED(bytes);
  float* part = reinterpret_cast<float*>(bytes);  // [kMeanRows][C]
  const int64_t sample = blockIdx.x, begin = p.layout.offset(sample), end = p.layout.offset(sample + 1);
  const int cols = int(p.x.cols), turn = int(threadIdx.x) / kRowLanes<V>;
  float sums[kLaneValues<V>] = {};
  for (int64_t r = begin + turn; r < end; r += kMeanRows<V>) {
    Row<T, V> x;
    x.read(row<T>(p.x, r), cols);
    const Statistics s = statistics(x, cols, eps);
    for_vectors<V>(cols, [&](int k, int) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[k * V + i] += (x.part[k][i] - s.mean) * s.rstd;
    });
  }
  for_vectors<V>(cols, [&](int k, int column) {
#pragma unroll
    for (int i = 0; i < V; ++i) part[turn * cols + column + i] = sums[k * V + i];
  });
  __syncthreads();
  const T *shift = row<T>(p.shift, sample), *scale = row<T>(p.scale, sample);
  T* mean = row<T>(p.mean, sample);
  for (int column = int(threadIdx.x); column < cols; column += kMeanThreads<V>) {
    float sum = 0;
    for (int i = 0; i < kMeanRows<V>; ++i) sum += part[i * cols + column];
    const float average = sum / float(end - begin);
    mean[column] = from_float<T>(average * (1 + to_float(scale[column])) + to_float(shift[column]));
  }
}

}  // namespace

void modulated_layer_norm(const ModulatedLayerNorm& p, const Execution& exec) {
  launch_rows("modulated_layer_norm", p.layout, PlainRows{p.x}, {}, Norm{p.shift, p.scale, p.y, float(p.eps)}, exec,
              p.x);
}

void modulated_layer_norm_backward(const ModulatedLayerNormBackward& p, const Execution& exec) {
  constexpr const char* name = "modulated_layer_norm_backward";
  auto* statistics = static_cast<Statistics*>(p.workspace);
  launch_norm_backward(
      name, {p.layout, p.x, p.scale, p.grad_residual, p.grad_x, {p.grad_y, false}, statistics, float(p.eps)}, exec);
  const ModulationGradients job{
      {p.layout}, p.x, p.grad_y, p.grad_shift, p.grad_scale, statistics, p.accumulate_modulation};
  launch_columns({name, p.x.rows, p.x.cols}, p.x.dtype, p.layout.batch, job, exec, p.x, p.grad_y, p.grad_shift,
                 p.grad_scale);
}

void gated_residual(const GatedResidual& p, const Execution& exec) {
  launch_rows("gated_residual", p.layout, GatedRows{p.x, p.y, p.gate, p.y_per_sample}, p.out,
              Norm{p.shift, p.scale, p.normed, float(p.eps)}, exec, p.x, p.y, p.gate);
}

void gated_residual_backward(const GatedResidualBackward& p, const Execution& exec) {
  const ResidualGradients job{{p.layout}, p.y, p.gate, p.grad_out, p.grad_y, p.grad_gate, p.y_per_sample};
  launch_columns({"gated_residual_backward", p.grad_out.rows, p.grad_out.cols}, p.y.dtype, p.layout.batch, job, exec,
                 p.y, p.gate, p.grad_out, p.grad_y, p.grad_gate);
}

void modulated_mean(const ModulatedMean& p, const Execution& exec) {
  with_vector(
      p.x.dtype, p.x.cols,
      [&](auto tag, auto vector) {
        constexpr int V = vector();
        launch({"modulated_mean", p.x.rows, p.x.cols}, modulated_mean_kernel<decltype(tag), V>,
               static_cast<unsigned>(p.layout.batch), kMeanThreads<V>, kMeanRows<V> * size_t(p.x.cols) * sizeof(float),
               exec, p, float(p.eps));
      },
      p.x);
}

void modulated_mean_backward(const ModulatedMeanBackward& p, const Execution& exec) {
  constexpr const char* name = "modulated_mean_backward";
  auto* statistics = static_cast<Statistics*>(p.workspace);
  launch_norm_backward(
      name, {p.layout, p.x, p.scale, p.grad_residual, p.grad_x, {p.grad_mean, true}, statistics, float(p.eps)}, exec);
  const MeanModulationGradients job{{p.layout}, p.x, p.grad_mean, p.grad_shift, p.grad_scale, statistics};
  launch_columns({name, p.x.rows, p.x.cols}, p.x.dtype, p.layout.batch, job, exec, p.x, p.grad_mean, p.grad_shift,
                 p.grad_scale);
}

}  // namespace flexdit::cuda
