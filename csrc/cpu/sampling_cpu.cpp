// Sampling: noise, one step of a sampler, the model's input, guidance, and rows by their addresses.
// A step is computed in double and rounded once, so that flexdit_ext/diffusion/samplers.py gives the same float32.
#include "cpu/kernels.h"
#include "ops/philox.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kBlock = 256;  // values under way at a time

// Box and Muller in double, so that a value is rounded once.
void normal_pair(uint32_t r, uint32_t angle, double* pair) {
  const double radius = std::sqrt(-2 * std::log((double(r) + 1) * 0x1p-32));
  const double radians = 6.283185307179586477 * 0x1p-32 * double(angle);
  pair[0] = radius * std::cos(radians);
  pair[1] = radius * std::sin(radians);
}

// Values first, ..., first + count - 1 of a draw.
template <class A>
void fill_normals(uint64_t seed, uint32_t draw, int64_t first, int64_t count, A* out) {
  double values[4];
  for (int64_t i = first; i < first + count; ++i) {
    if (i % 4 == 0 || i == first) {
      const PhiloxWords words = noise_words(seed, draw, i / 4);
      normal_pair(words.v[0], words.v[1], values);
      normal_pair(words.v[2], words.v[3], values + 2);
    }
    out[i - first] = static_cast<A>(values[i % 4]);
  }
}

// a + w (b - a), which is a at w = 0 and b at w = 1, exactly.
template <class A>
A mix(A a, A b, A w) {
  return w < A(0.5) ? a + w * (b - a) : b - (b - a) * (1 - w);
}

// out[i] = the noise's factor at a learned variance.
template <class T>
void learned_deviation(const T* v, const StepNumbers& c, int64_t count, double* out) {
  const double low = c.log_variance_small, high = c.log_variance_large;
  for (int64_t i = 0; i < count; ++i) out[i] = exponential((low + (double(load(v, i)) + 1) / 2 * (high - low)) / 2);
}

// A channel of a sample: from the model's output (T) to the state (A).
template <class T, class A>
struct Channel {
  StepNumbers c;
  const T *cond, *uncond, *variance;  // uncond and variance may be null
  A *x, *x0;
  int64_t noise_index;  // of the first value

  void step(int64_t first, int64_t count) const {
    double next[kBlock], factor[kBlock];
    A noise[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      double prediction = load(cond, first + i);
      if (uncond) prediction = mix<double>(load(uncond, first + i), prediction, c.guidance);
      double clean = c.x0_from_x * x[first + i] + c.x0_from_output * prediction;
      if (c.clip_x0) clean = clean < -1 ? -1. : clean > 1 ? 1. : clean;
      next[i] = c.x_coef * x[first + i] + c.x0_coef * clean;
      // The first step has no step before it.
      if (c.x0_previous_coef != 0) next[i] += c.x0_previous_coef * x0[first + i];
      x0[first + i] = static_cast<A>(clean);
    }
    if (c.noise_coef > 0) {
      fill_normals(c.seed, c.draw, noise_index + first, count, noise);
      for (int64_t i = 0; i < count; ++i) factor[i] = c.noise_coef;
      if (variance) learned_deviation(variance + first, c, count, factor);
      for (int64_t i = 0; i < count; ++i) next[i] += factor[i] * noise[i];
    }
    for (int64_t i = 0; i < count; ++i) x[first + i] = static_cast<A>(next[i]);
  }
};

template <class T, class A>
void denoise(const DenoiseStep& p, int threads) {
  const int64_t area = p.patch * p.patch;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < p.layout.batch * p.channels; ++task) {
    const int64_t b = task / p.channels, channel = task % p.channels, pixels = p.layout.grid(b).tokens() * area;
    const int64_t begin = p.layout.offset(b) * p.channels * area + channel * pixels;
    const StepNumbers& c = p.numbers[b];
    const auto output = [&](int64_t sample, int64_t of) {
      return static_cast<const T*>(p.output) + p.model_layout.offset(sample) * p.out_channels * area + of * pixels;
    };
    const bool guided = c.unconditional >= 0 && channel < p.guided_channels;
    const Channel<T, A> values{c,
                               output(c.conditional, channel),
                               guided ? output(c.unconditional, channel) : nullptr,
                               c.learned_variance ? output(c.conditional, p.channels + channel) : nullptr,
                               static_cast<A*>(p.x) + begin,
                               static_cast<A*>(p.x0) + begin,
                               channel * pixels};
    for (int64_t first = 0; first < pixels; first += kBlock)
      values.step(first, pixels - first < kBlock ? pixels - first : kBlock);
  }
}

// Calls body(A{}) with the type of a sampler's state.
template <class Body>
void with_state(DType dtype, Body&& body) {
  if (dtype == DType::float32) body(float{});
  if (dtype == DType::float64) body(double{});
}

}  // namespace

void normal_noise(const NormalNoise& p, int threads) {
  with_state(p.out.dtype, [&](auto tag) {
    using A = decltype(tag);
    const int64_t blocks = (p.out.cols + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < p.out.rows * blocks; ++task) {
      const int64_t b = task / blocks, first = task % blocks * kBlock;
      fill_normals(p.seeds[b], p.draw, first, p.out.cols - first < kBlock ? p.out.cols - first : kBlock,
                   row<A>(p.out, b) + first);
    }
  });
}

void denoise_step(const DenoiseStep& p, int threads) {
  with_type(p.dtype, [&](auto output) {
    with_state(p.state, [&](auto state) { denoise<decltype(output), decltype(state)>(p, threads); });
  });
}

void model_input(const ModelInput& p, int threads) {
  with_type(p.dtype, [&](auto to) {
    with_state(p.state, [&](auto from) {
      const int64_t values = p.channels * p.patch * p.patch;
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t m = 0; m < p.model_layout.batch; ++m) {
        const auto* x = static_cast<const decltype(from)*>(p.x) + p.layout.offset(p.samples[m]) * values;
        auto* input = static_cast<decltype(to)*>(p.input) + p.model_layout.offset(m) * values;
        for (int64_t i = 0; i < p.model_layout.grid(m).tokens() * values; ++i)
          store(input, i, static_cast<Acc<decltype(to)>>(x[i]));
      }
    });
  });
}

void guidance_combine(const GuidanceCombine& p, int threads) {
  with_type(p.images.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t half = p.images.rows / 2, guided = p.channels ? p.images.cols / p.channels * p.guided_channels : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < half; ++b) {
      T *cond = row<T>(p.images, b), *uncond = row<T>(p.images, half + b);
      for (int64_t i = 0; i < guided; ++i) {
        const Acc<T> value = mix<Acc<T>>(load(uncond, i), load(cond, i), Acc<T>(p.scale));
        store(cond, i, value);
        store(uncond, i, value);
      }
    }
  });
}

void gather_rows(const GatherRows& p, int threads) {
  const auto bytes = static_cast<size_t>(p.out.cols * size_of(p.out.dtype));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < p.out.rows; ++b) std::memcpy(p.out.row_range(b, 1).data, p.rows[b], bytes);
}

void add_tables(const AddTables& p, int threads) {
  with_type(p.out.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t width = p.x.cols, count = p.out.cols / width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < p.x.rows * count; ++i) {
      const int64_t b = i / count, k = i % count;
      const T *x = row<T>(p.x, b), *table = row<T>(p.table, p.own_tables ? i : k);
      T* out = row<T>(p.out, b) + k * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) store(out, j, load(x, j) + load(table, j));
    }
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
