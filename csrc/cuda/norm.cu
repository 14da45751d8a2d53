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
  Statistics* statistics;  // [R], written, or null
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
  if (p.statistics && row_lane<V>() == 0) p.statistics[r] = s;
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

// ---- The mean of a sample's normalised tokens. A block adds up 16 of them, so that a single sample keeps many
// multiprocessors busy; a second kernel adds the parts. Both orders depend on the sample's own tokens alone: a mean does
// not depend on the sample's company. As in attention_tiles.h parts get slots by a bound that needs no prefix sum.

__device__ __forceinline__ int64_t first_part(const TokenLayout& layout, int64_t sample) {
  return layout.offset(sample) / kMeanRows + sample;
}

template <int V>
constexpr int kMeanThreads = V == 1 ? kRowThreads : int(kMeanRows) * kWarp;
template <int V>
constexpr int kMeanTurns = kMeanThreads<V> / kRowLanes<V>;  // rows under way at a time: all, but on the scalar path

template <class T, int V>
__global__ void __launch_bounds__(kMeanThreads<V>)
    normalized_sums_kernel(TokenLayout layout, Matrix x, float eps, float* parts) {
  await_predecessor();
  FLEXDIT_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);  // [kMeanTurns][C]
  const int64_t part = blockIdx.x;
  int64_t sample = 0;
  for (int64_t end = layout.batch; end - sample > 1;) {
    const int64_t middle = (sample + end) / 2;
    (first_part(layout, middle) <= part ? sample : end) = middle;
  }
  const int64_t begin = layout.offset(sample) + (part - first_part(layout, sample)) * kMeanRows;
  const int64_t sample_end = layout.offset(sample + 1);
  const int64_t end = begin + kMeanRows < sample_end ? begin + kMeanRows : sample_end;
  if (begin >= end) return;
  const int cols = int(x.cols), turn = int(threadIdx.x) / kRowLanes<V>;
  float sums[kLaneValues<V>] = {};
  for (int64_t r = begin + turn; r < end; r += kMeanTurns<V>) {
    Row<T, V> token;
    token.read(row<T>(x, r), cols);
    const Statistics s = statistics(token, cols, eps);
    for_vectors<V>(cols, [&](int k, int) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[k * V + i] += (token.part[k][i] - s.mean) * s.rstd;
    });
  }
  for_vectors<V>(cols, [&](int k, int column) {
#pragma unroll
    for (int i = 0; i < V; ++i) shared[turn * cols + column + i] = sums[k * V + i];
  });
  __syncthreads();
  for (int column = int(threadIdx.x); column < cols; column += kMeanThreads<V>) {
    float sum = 0;
    for (int i = 0; i < kMeanTurns<V>; ++i) sum += shared[i * cols + column];
    parts[part * cols + column] = sum;
  }
}

// A warp's lanes are neighbouring columns; the warps take turns with the parts. `finish` gets the mean of each column.
constexpr int kPartTurns = 8;
template <class T, class Finish>
__global__ void __launch_bounds__(kPartTurns * kWarp)
    add_parts_kernel(TokenLayout layout, const float* parts, int cols, Finish finish) {
  await_predecessor();
  FLEXDIT_SHARED(float, sums, [kPartTurns][kWarp]);
  const int64_t sample = blockIdx.x, first = first_part(layout, sample);
  const int64_t tokens = layout.offset(sample + 1) - layout.offset(sample), end = first + ceil_divide(tokens, kMeanRows);
  const int lane = int(threadIdx.x) % kWarp, turn = int(threadIdx.x) / kWarp, column = int(blockIdx.y) * kWarp + lane;
  float sum = 0;
  if (column < cols)
    for (int64_t part = first + turn; part < end; part += kPartTurns) sum += parts[part * cols + column];
  sums[turn][lane] = sum;
  __syncthreads();
  if (turn > 0 || column >= cols) return;
  for (int i = 1; i < kPartTurns; ++i) sum += sums[i][lane];
  finish.template apply<T>(sample, column, sum / float(tokens));
}

struct ModulatedMeans {
  Matrix shift, scale, mean;
  template <class T>
  __device__ __forceinline__ void apply(int64_t sample, int column, float average) const {
    const float multiply = to_float(row<T>(scale, sample)[column]), add = to_float(row<T>(shift, sample)[column]);
    row<T>(mean, sample)[column] = from_float<T>(average * (1 + multiply) + add);
  }
};

struct MeanModulationGradients {
  Matrix grad_mean, grad_shift, grad_scale;
  template <class T>
  __device__ __forceinline__ void apply(int64_t sample, int column, float average) const {
    const T grad = row<T>(grad_mean, sample)[column];
    row<T>(grad_shift, sample)[column] = grad;
    row<T>(grad_scale, sample)[column] = from_float<T>(to_float(grad) * average);
  }
};

template <class Finish>
void launch_mean(const char* name, const TokenLayout& layout, const Matrix& x, double eps, void* workspace,
                 const Finish& finish, const Execution& exec) {
  if (layout.batch == 0) return;
  const Op op{name, x.rows, x.cols};
  auto* parts = static_cast<float*>(workspace);
  with_vector(
      x.dtype, x.cols,
      [&](auto tag, auto vector) {
        constexpr int V = vector();
        launch(op, normalized_sums_kernel<decltype(tag), V>,
               static_cast<unsigned>(mean_parts(layout.batch, x.rows)), kMeanThreads<V>,
               kMeanTurns<V> * size_t(x.cols) * sizeof(float), exec, layout, x, float(eps), parts);
      },
      x);
  with_type(x.dtype, [&](auto tag) {
    const dim3 grid(static_cast<unsigned>(layout.batch), static_cast<unsigned>(ceil_divide(x.cols, kWarp)));
    launch(op, add_parts_kernel<decltype(tag), Finish>, grid, kPartTurns * kWarp, 0, exec, layout, parts, int(x.cols),
           finish);
  });
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
  if (p.layout.batch == 0 && !p.y_per_sample)  // no block clears the rows, which are all spare
    return launch_rows("gated_residual_backward", p.layout, PlainRows{p.grad_out}, p.grad_y, Norm{}, exec, p.grad_out);
  const ResidualGradients job{{p.layout}, p.y, p.gate, p.grad_out, p.grad_y, p.grad_gate, p.y_per_sample};
  launch_columns({"gated_residual_backward", p.grad_out.rows, p.grad_out.cols}, p.y.dtype, p.layout.batch, job, exec,
                 p.y, p.gate, p.grad_out, p.grad_y, p.grad_gate);
}

void modulated_mean(const ModulatedMean& p, const Execution& exec) {
  launch_mean("modulated_mean", p.layout, p.x, p.eps, p.workspace, ModulatedMeans{p.shift, p.scale, p.mean}, exec);
}

void modulated_mean_backward(const ModulatedMeanBackward& p, const Execution& exec) {
  constexpr const char* name = "modulated_mean_backward";
  launch_norm_backward(
      name, {p.layout, p.x, p.scale, p.grad_residual, p.grad_x, {p.grad_mean, true}, nullptr, float(p.eps)}, exec);
  launch_mean(name, p.layout, p.x, p.eps, p.workspace,
              MeanModulationGradients{p.grad_mean, p.grad_shift, p.grad_scale}, exec);
}

}  // namespace flexdit::cuda
