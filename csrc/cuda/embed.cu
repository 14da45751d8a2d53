// Patches, timesteps and labels.
#include "cuda/rows.h"

namespace flexdit::cuda {
namespace {

// One thread per value, neighbours along an image's row: reads or writes of the image are contiguous.
template <class T>
__global__ void __launch_bounds__(kElementThreads) move_patches_kernel(Patches p, bool to_rows) {
  await_predecessor();
  const int64_t i = element_of_thread(), values = p.channels * p.patch * p.patch;
  if (i >= p.rows.rows * values) return;
  if (i >= p.layout.total() * values) {  // spare rows; the image has none
    if (to_rows) row<T>(p.rows, i / values)[i % values] = from_float<T>(0.f);
    return;
  }
  const int64_t b = p.layout.sample_of(i / values), inside = i - p.layout.offset(b) * values;
  const Grid grid = p.layout.grid(b);
  const int64_t width = grid.width * p.patch, height = int64_t{grid.frames} * grid.height * p.patch;
  const int64_t x = inside % width, y = inside / width % height, c = inside / (width * height);
  const int64_t r = p.layout.offset(b) + y / p.patch * grid.width + x / p.patch;
  const int64_t in_patch = y % p.patch * p.patch + x % p.patch;
  T* value = row<T>(p.rows, r) + (p.channels_last ? in_patch * p.channels + c : c * p.patch * p.patch + in_patch);
  T* pixel = static_cast<T*>(p.image) + i;
  if (to_rows)
    *value = *pixel;
  else
    *pixel = *value;
}

void move_patches(const char* name, const Patches& p, bool to_rows, const Execution& exec) {
  with_type(p.rows.dtype, [&](auto tag) {
    launch({name, p.rows.rows, p.rows.cols}, move_patches_kernel<decltype(tag)>,
           element_blocks(p.rows.rows * p.rows.cols), kElementThreads, 0, exec, p, to_rows);
  });
}

// The few values are computed in double and rounded once, as on the CPU: t w reaches 1000.
template <class T>
__global__ void __launch_bounds__(kElementThreads) timestep_kernel(TimestepEmbedding p) {
  await_predecessor();
  const int64_t half = p.out.cols / 2, i = element_of_thread() % half, b = element_of_thread() / half;
  if (b >= p.out.rows) return;
  const float exponent = -9.2103404f * float(i) / float(half - p.shift);  // -ln 10000
  const float angle = float(p.t[b]) * float(exp(double(exponent)));
  T* out = row<T>(p.out, b) + i;
  out[0] = from_float<T>(float(cos(double(angle))));
  out[half] = from_float<T>(float(sin(double(angle))));
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) add_labels_kernel(LabelEmbedding p) {
  await_predecessor();
  const int64_t i = element_of_thread();
  if (i >= p.x.rows * p.x.cols) return;
  const int64_t b = i / p.x.cols, column = i % p.x.cols, label = p.labels[b];
  T* x = row<T>(p.x, b) + column;
  const bool known = label >= 0 && label < p.table.rows;
  *x = from_float<T>(known ? to_float(*x) + to_float(row<T>(p.table, label)[column]) : NAN);
}

// One row of threads per label, which looks for its samples: no atomics, and rows without samples become zero.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads) label_gradients_kernel(LabelEmbeddingBackward p) {
  await_predecessor();
  const int64_t label = row_of_thread<V>();
  const int cols = int(p.grad_table.cols);
  if (label >= p.grad_table.rows) return;
  float sums[kLaneValues<V>] = {};
  for (int64_t b = 0; b < p.grad_out.rows; ++b) {
    if (p.labels[b] != label) continue;
    for_vectors<V>(cols, [&](int k, int column) {
      const auto grad = load<V>(row<T>(p.grad_out, b) + column);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[k * V + i] += grad[i];
    });
  }
  for_vectors<V>(cols, [&](int k, int column) {
    Vector<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.set(i, sums[k * V + i]);
    store(row<T>(p.grad_table, label) + column, out);
  });
}

}  // namespace

void patchify(const Patches& p, const Execution& exec) { move_patches("patchify", p, true, exec); }
void unpatchify(const Patches& p, const Execution& exec) { move_patches("unpatchify", p, false, exec); }

void timestep_embedding(const TimestepEmbedding& p, const Execution& exec) {
  with_type(p.out.dtype, [&](auto tag) {
    launch({"timestep_embedding", p.out.rows, p.out.cols}, timestep_kernel<decltype(tag)>,
           element_blocks(p.out.rows * (p.out.cols / 2)), kElementThreads, 0, exec, p);
  });
}

void label_embedding(const LabelEmbedding& p, const Execution& exec) {
  with_type(p.x.dtype, [&](auto tag) {
    launch({"label_embedding", p.x.rows, p.x.cols}, add_labels_kernel<decltype(tag)>,
           element_blocks(p.x.rows * p.x.cols), kElementThreads, 0, exec, p);
  });
}

void label_embedding_backward(const LabelEmbeddingBackward& p, const Execution& exec) {
  with_vector(
      p.grad_table.dtype, p.grad_table.cols,
      [&](auto tag, auto vector) {
        launch({"label_embedding_backward", p.grad_table.rows, p.grad_table.cols},
               label_gradients_kernel<decltype(tag), vector()>, row_blocks<vector()>(p.grad_table.rows), kRowThreads, 0,
               exec, p);
      },
      p.grad_out, p.grad_table);
}

}  // namespace flexdit::cuda
