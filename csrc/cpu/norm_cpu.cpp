// Layer norm with modulation, the gated residual fused with it, and the pooled mean; forward and backward.
// Sums over a sample's tokens run over blocks of columns, each in token order: the result depends neither on the
// number of threads nor on the other samples of the batch.
#include "cpu/kernels.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kColumnBlock = 64;

template <class A>
struct Statistics {
  A mean, rstd;
};

// Two passes over a row that sits in the first-level cache: no cancellation, unlike E[x^2] - E[x]^2.
template <class T, class A = Acc<T>>
Statistics<A> statistics(const T* x, int64_t c, double eps) {
  A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < c; ++i) sum += load(x, i);
  const A mean = sum / A(c);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < c; ++i) squares += (load(x, i) - mean) * (load(x, i) - mean);
  return {mean, 1 / std::sqrt(squares / A(c) + A(eps))};
}

template <class T>
void normalize_row(const T* x, const T* shift, const T* scale, T* y, int64_t c, double eps) {
  const auto [mean, rstd] = statistics(x, c, eps);
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) store(y, i, (load(x, i) - mean) * rstd * (1 + load(scale, i)) + load(shift, i));
}

// grad_x = rstd (g - mean(g) - xhat mean(g xhat)) + residual, with g = grad_y (1 + scale).
template <class T, class A = Acc<T>>
void normalize_row_backward(const T* x, const T* scale, const T* grad_y, const T* residual, T* grad_x, int64_t c,
                            A divisor, Statistics<A> s) {
  A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t i = 0; i < c; ++i) {
    const A g = load(grad_y, i) * (1 + load(scale, i)) * divisor;
    sum += g;
    dot += g * (load(x, i) - s.mean) * s.rstd;
  }
  sum /= A(c);
  dot /= A(c);
  if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      const A g = load(grad_y, i) * (1 + load(scale, i)) * divisor;
      store(grad_x, i, load(residual, i) + s.rstd * (g - sum - (load(x, i) - s.mean) * s.rstd * dot));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      const A g = load(grad_y, i) * (1 + load(scale, i)) * divisor;
      store(grad_x, i, s.rstd * (g - sum - (load(x, i) - s.mean) * s.rstd * dot));
    }
  }
}

template <class T, class A = Acc<T>>
Statistics<A>* row_statistics(const Matrix& x, int64_t rows, double eps, void* workspace, int threads) {
  auto* stats = static_cast<Statistics<A>*>(workspace);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) stats[r] = statistics(row<T>(x, r), x.cols, eps);
  return stats;
}

// sum[i] = sum over the rows of the normalised x in columns first + i.
template <class T, class A = Acc<T>>
void sum_normalized(const Matrix& x, const Statistics<A>* stats, int64_t begin, int64_t end, int64_t first,
                    int64_t count, A* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* values = row<T>(x, r) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sum[i] += (load(values, i) - stats[r].mean) * stats[r].rstd;
  }
}

int64_t column_blocks(int64_t c) { return (c + kColumnBlock - 1) / kColumnBlock; }

// Calls body(sample, first column, number of columns) for every block of columns of every sample.
template <class Body>
void for_column_blocks(const TokenLayout& layout, int64_t c, int threads, Body&& body) {
  const int64_t blocks = column_blocks(c);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < layout.batch * blocks; ++task) {
    const int64_t first = task % blocks * kColumnBlock;
    body(task / blocks, first, c - first < kColumnBlock ? c - first : kColumnBlock);
  }
}

template <class T, class A = Acc<T>>
void add_or_store(T* p, const A* values, int64_t count, bool accumulate) {
  for (int64_t i = 0; i < count; ++i) store(p, i, accumulate ? load(p, i) + values[i] : values[i]);
}

}  // namespace

void modulated_layer_norm(const ModulatedLayerNorm& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t rows = p.layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.layout.sample_of(r);
      normalize_row(row<T>(p.x, r), row<T>(p.shift, b), row<T>(p.scale, b), row<T>(p.y, r), p.x.cols, p.eps);
    }
  });
}

void modulated_layer_norm_backward(const ModulatedLayerNormBackward& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t rows = p.layout.total(), c = p.x.cols;
    const auto* stats = row_statistics<T>(p.x, rows, p.eps, p.workspace, threads);
    for_column_blocks(p.layout, c, threads, [&](int64_t b, int64_t first, int64_t count) {
      A shift[kColumnBlock] = {}, scale[kColumnBlock] = {};
      for (int64_t r = p.layout.offset(b); r < p.layout.offset(b + 1); ++r) {
        const T* g = row<T>(p.grad_y, r) + first;
        const T* x = row<T>(p.x, r) + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          shift[i] += load(g, i);
          scale[i] += load(g, i) * (load(x, i) - stats[r].mean) * stats[r].rstd;
        }
      }
      add_or_store(row<T>(p.grad_shift, b) + first, shift, count, p.accumulate_modulation);
      add_or_store(row<T>(p.grad_scale, b) + first, scale, count, p.accumulate_modulation);
    });
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      normalize_row_backward(row<T>(p.x, r), row<T>(p.scale, p.layout.sample_of(r)), row<T>(p.grad_y, r),
                             p.grad_residual ? row<T>(p.grad_residual, r) : nullptr, row<T>(p.grad_x, r), c, A(1),
                             stats[r]);
  });
}

void gated_residual(const GatedResidual& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t rows = p.layout.total(), c = p.x.cols;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.layout.sample_of(r);
      const T *x = row<T>(p.x, r), *y = row<T>(p.y, p.y_per_sample ? b : r), *gate = p.gate ? row<T>(p.gate, b) : nullptr;
      T* out = row<T>(p.out, r);
      if (gate) {
#pragma omp simd
        for (int64_t i = 0; i < c; ++i) store(out, i, load(x, i) + load(gate, i) * load(y, i));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < c; ++i) store(out, i, load(x, i) + load(y, i));
      }
      if (p.normed) normalize_row(out, row<T>(p.shift, b), row<T>(p.scale, b), row<T>(p.normed, r), c, p.eps);
    }
  });
}

void gated_residual_backward(const GatedResidualBackward& p, int threads) {
  with_type(p.y.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    for_column_blocks(p.layout, p.grad_out.cols, threads, [&](int64_t b, int64_t first, int64_t count) {
      A gate_sum[kColumnBlock] = {}, y_sum[kColumnBlock] = {};
      const T* gate = row<T>(p.gate, b) + first;
      for (int64_t r = p.layout.offset(b); r < p.layout.offset(b + 1); ++r) {
        const T* g = row<T>(p.grad_out, r) + first;
        const T* y = row<T>(p.y, p.y_per_sample ? b : r) + first;
        T* grad_y = row<T>(p.grad_y, p.y_per_sample ? b : r) + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) gate_sum[i] += load(g, i) * load(y, i);
        if (p.y_per_sample) {
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) y_sum[i] += load(g, i) * load(gate, i);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) store(grad_y, i, load(g, i) * load(gate, i));
        }
      }
      add_or_store(row<T>(p.grad_gate, b) + first, gate_sum, count, false);
      if (p.y_per_sample) add_or_store(row<T>(p.grad_y, b) + first, y_sum, count, false);
    });
  });
}

void modulated_mean(const ModulatedMean& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t c = p.x.cols;
    const auto* stats = row_statistics<T>(p.x, p.layout.total(), p.eps, p.workspace, threads);
    for_column_blocks(p.layout, c, threads, [&](int64_t b, int64_t first, int64_t count) {
      A sum[kColumnBlock];
      const int64_t begin = p.layout.offset(b), end = p.layout.offset(b + 1);
      sum_normalized<T>(p.x, stats, begin, end, first, count, sum);
      const T *shift = row<T>(p.shift, b) + first, *scale = row<T>(p.scale, b) + first;
      T* out = row<T>(p.mean, b) + first;
      for (int64_t i = 0; i < count; ++i)
        store(out, i, sum[i] / A(end - begin) * (1 + load(scale, i)) + load(shift, i));
    });
  });
}

void modulated_mean_backward(const ModulatedMeanBackward& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t rows = p.layout.total(), c = p.x.cols;
    const auto* stats = row_statistics<T>(p.x, rows, p.eps, p.workspace, threads);
    for_column_blocks(p.layout, c, threads, [&](int64_t b, int64_t first, int64_t count) {
      A sum[kColumnBlock];
      const int64_t begin = p.layout.offset(b), end = p.layout.offset(b + 1);
      sum_normalized<T>(p.x, stats, begin, end, first, count, sum);
      const T* g = row<T>(p.grad_mean, b) + first;
      T *shift = row<T>(p.grad_shift, b) + first, *scale = row<T>(p.grad_scale, b) + first;
      for (int64_t i = 0; i < count; ++i) {
        store(shift, i, load(g, i));
        store(scale, i, load(g, i) * sum[i] / A(end - begin));
      }
    });
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.layout.sample_of(r);
      const A divisor = A(1) / A(p.layout.offset(b + 1) - p.layout.offset(b));
      normalize_row_backward(row<T>(p.x, r), row<T>(p.scale, b), row<T>(p.grad_mean, b),
                             p.grad_residual ? row<T>(p.grad_residual, r) : nullptr, row<T>(p.grad_x, r), c, divisor,
                             stats[r]);
    }
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
