// Sampling: noise, one step of a sampler, the model's input, guidance, and rows by their addresses.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "ops/philox.h"

namespace flexdit::cuda {
namespace {

// Box and Muller. Words are taken so that float32 loses nothing: u = (r + 1) 2^-32 from its nearer end, the angle's
// half turns from -1 to 1.
__device__ __forceinline__ void normal_pair(uint32_t r, uint32_t angle, float* pair) {
  const float log_u = r < 0x80000000u ? logf((float(r) + 1.f) * 0x1p-32f) : log1pf(float(~r) * -0x1p-32f);
  const float radius = sqrtf(-2.f * log_u);
  sincospif(float(int32_t(angle)) * 0x1p-31f, pair + 1, pair);
  pair[0] *= radius;
  pair[1] *= radius;
}

__device__ __forceinline__ float normal_value(uint64_t seed, uint32_t draw, int64_t i) {
  const PhiloxWords words = noise_words(seed, draw, i / 4);
  float pair[2];
  if (i % 4 < 2)
    normal_pair(words.v[0], words.v[1], pair);
  else
    normal_pair(words.v[2], words.v[3], pair);
  return i % 2 ? pair[1] : pair[0];
}

// a + w (b - a), which is a at w = 0 and b at w = 1, exactly.
__device__ __forceinline__ float mix(float a, float b, float w) {
  return w < 0.5f ? a + w * (b - a) : b - (b - a) * (1 - w);
}

// A thread per four values, which come from the same words.
__global__ void __launch_bounds__(kElementThreads) noise_kernel(NormalNoise p) {
  await_predecessor();
  const int64_t blocks = ceil_divide(p.out.cols, 4), b = element_of_thread() / blocks;
  const int64_t block = element_of_thread() % blocks;
  if (b >= p.out.rows) return;
  const PhiloxWords words = noise_words(p.seeds[b], p.draw, block);
  float values[4];
  normal_pair(words.v[0], words.v[1], values);
  normal_pair(words.v[2], words.v[3], values + 2);
  float* out = row<float>(p.out, b);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * block + i < p.out.cols) out[4 * block + i] = values[i];
}

// Where a value of packed images lies.
struct Place {
  int64_t sample, inside;  // the sample, and the value's number in its image
  int64_t channel, pixel, pixels;
};
__device__ __forceinline__ Place place_of(const TokenLayout& layout, int64_t i, int64_t channels, int64_t area) {
  Place at;
  at.sample = layout.sample_of(i / (channels * area));
  at.inside = i - layout.offset(at.sample) * channels * area;
  at.pixels = layout.grid(at.sample).tokens() * area;
  at.channel = at.inside / at.pixels;
  at.pixel = at.inside % at.pixels;
  return at;
}

// Whether `sample` of one layout exists and has the grid of `other_sample` of another.
__device__ __forceinline__ bool matches(const TokenLayout& layout, int64_t sample, const TokenLayout& other,
                                        int64_t other_sample) {
  return sample >= 0 && sample < layout.batch && layout.grid(sample) == other.grid(other_sample);
}

// A value of the model's output; NaN where there is none.
template <class T>
__device__ __forceinline__ float output_value(const DenoiseStep& p, const Place& at, int64_t sample, int64_t channel) {
  if (channel >= p.out_channels || !matches(p.model_layout, sample, p.layout, at.sample)) return NAN;
  const T* output =
      static_cast<const T*>(p.output) + p.model_layout.offset(sample) * p.out_channels * p.patch * p.patch;
  return to_float(output[channel * at.pixels + at.pixel]);
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) denoise_kernel(DenoiseStep p) {
  await_predecessor();
  const int64_t i = element_of_thread(), area = p.patch * p.patch;
  if (i >= p.layout.total() * p.channels * area) return;
  const Place at = place_of(p.layout, i, p.channels, area);
  const StepNumbers& c = p.numbers[at.sample];
  float *state = static_cast<float*>(p.x) + i, *clean = static_cast<float*>(p.x0) + i;
  float prediction = output_value<T>(p, at, c.conditional, at.channel);
  if (c.unconditional >= 0 && at.channel < p.guided_channels)
    prediction = mix(output_value<T>(p, at, c.unconditional, at.channel), prediction, float(c.guidance));
  float x0 = float(c.x0_from_x) * *state + float(c.x0_from_output) * prediction;
  if (c.clip_x0) x0 = x0 < -1.f ? -1.f : x0 > 1.f ? 1.f : x0;
  float next = float(c.x_coef) * *state + float(c.x0_coef) * x0;
  if (c.x0_previous_coef != 0) next += float(c.x0_previous_coef) * *clean;  // the first step has none before it
  if (c.noise_coef > 0) {
    float factor = float(c.noise_coef);
    if (c.learned_variance) {
      const float low = float(c.log_variance_small), high = float(c.log_variance_large);
      const float v = output_value<T>(p, at, c.conditional, p.channels + at.channel);
      factor = expf((low + (v + 1) / 2 * (high - low)) / 2);
    }
    next += factor * normal_value(c.seed, c.draw, at.inside);
  }
  *clean = x0;
  *state = next;
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) model_input_kernel(ModelInput p) {
  await_predecessor();
  const int64_t i = element_of_thread(), area = p.patch * p.patch, values = p.channels * area;
  if (i >= p.rows * values) return;
  float value = 0;  // of spare rows
  if (i < p.model_layout.total() * values) {
    const Place at = place_of(p.model_layout, i, p.channels, area);
    const int64_t from = p.samples[at.sample];
    const bool known = matches(p.layout, from, p.model_layout, at.sample);
    value = known ? static_cast<const float*>(p.x)[p.layout.offset(from) * values + at.inside] : NAN;
  }
  static_cast<T*>(p.input)[i] = from_float<T>(value);
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) guidance_kernel(Matrix images, int64_t guided, float scale) {
  await_predecessor();
  const int64_t half = images.rows / 2, b = element_of_thread() / guided, i = element_of_thread() % guided;
  if (b >= half) return;
  T *cond = row<T>(images, b) + i, *uncond = row<T>(images, half + b) + i;
  *cond = *uncond = from_float<T>(mix(to_float(*uncond), to_float(*cond), scale));
}

template <class T, int V>
__global__ void __launch_bounds__(kElementThreads) gather_rows_kernel(GatherRows p) {
  await_predecessor();
  const int64_t per_row = p.out.cols / V, b = element_of_thread() / per_row;
  const int64_t column = element_of_thread() % per_row * V;
  if (b >= p.out.rows) return;
  const T* from = static_cast<const T*>(p.rows[b]);
  T* out = row<T>(p.out, b) + column;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector<T, V>) == 0) return store(out, load<V>(from + column));
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = from[column + i];
}

template <class T, int V>
__global__ void __launch_bounds__(kElementThreads) add_tables_kernel(AddTables p) {
  await_predecessor();
  const int64_t width = p.x.cols / V, count = p.out.cols / p.x.cols;
  const int64_t i = element_of_thread() / width, column = element_of_thread() % width * V, b = i / count, k = i % count;
  if (b >= p.x.rows) return;
  const auto x = load<V>(row<T>(p.x, b) + column), table = load<V>(row<T>(p.table, p.own_tables ? i : k) + column);
  Vector<T, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out.set(j, x[j] + table[j]);
  store(row<T>(p.out, b) + k * p.x.cols + column, out);
}

}  // namespace

void normal_noise(const NormalNoise& p, const Execution& exec) {
  launch({"normal_noise", p.out.rows, p.out.cols}, noise_kernel,
         element_blocks(p.out.rows * ceil_divide(p.out.cols, 4)), kElementThreads, 0, exec, p);
}

void denoise_step(const DenoiseStep& p, const Execution& exec) {
  const int64_t values = p.channels * p.patch * p.patch;
  with_type(p.dtype, [&](auto tag) {
    launch({"denoise_step", p.rows, values}, denoise_kernel<decltype(tag)>, element_blocks(p.rows * values),
           kElementThreads, 0, exec, p);
  });
}

void model_input(const ModelInput& p, const Execution& exec) {
  const int64_t values = p.channels * p.patch * p.patch;
  with_type(p.dtype, [&](auto tag) {
    launch({"model_input", p.rows, values}, model_input_kernel<decltype(tag)>, element_blocks(p.rows * values),
           kElementThreads, 0, exec, p);
  });
}

void guidance_combine(const GuidanceCombine& p, const Execution& exec) {
  const int64_t guided = p.channels ? p.images.cols / p.channels * p.guided_channels : 0;
  with_type(p.images.dtype, [&](auto tag) {
    launch({"guidance_combine", p.images.rows, p.images.cols}, guidance_kernel<decltype(tag)>,
           element_blocks(p.images.rows / 2 * guided), kElementThreads, 0, exec, p.images, guided, float(p.scale));
  });
}

void gather_rows(const GatherRows& p, const Execution& exec) {
  with_vector(
      p.out.dtype, p.out.cols,
      [&](auto tag, auto vector) {
        launch({"gather_rows", p.out.rows, p.out.cols}, gather_rows_kernel<decltype(tag), vector()>,
               element_blocks(p.out.rows * (p.out.cols / vector())), kElementThreads, 0, exec, p);
      },
      p.out);
}

void add_tables(const AddTables& p, const Execution& exec) {
  with_vector(
      p.out.dtype, p.x.cols,
      [&](auto tag, auto vector) {
        launch({"add_tables", p.out.rows, p.out.cols}, add_tables_kernel<decltype(tag), vector()>,
               element_blocks(p.out.rows * (p.out.cols / vector())), kElementThreads, 0, exec, p);
      },
      p.x, p.table, p.out);
}

}  // namespace flexdit::cuda
