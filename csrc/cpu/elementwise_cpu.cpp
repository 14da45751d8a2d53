// GELU, SiLU, column sums and conversion between storage types.
#include "cpu/kernels.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

// Calls body(row index) in parallel.
template <class Body>
void for_rows(int64_t rows, int threads, Body&& body) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) body(r);
}

}  // namespace

void gelu(const Elementwise& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_rows(p.x.rows, threads, [&](int64_t r) {
      const T* x = row<T>(p.x, r);
      T* y = row<T>(p.y, r);
#pragma omp simd
      for (int64_t i = 0; i < p.x.cols; ++i) store(y, i, load(x, i) * gelu_gate(load(x, i)));
    });
  });
}

void gelu_backward(const GeluBackward& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_rows(p.x.rows, threads, [&](int64_t r) {
      const T *x = row<T>(p.x, r), *grad_y = row<T>(p.grad_y, r);
      T *y = row<T>(p.y, r), *grad_x = row<T>(p.grad_x, r);
      if (p.y) {
#pragma omp simd
        for (int64_t i = 0; i < p.x.cols; ++i) store(y, i, load(x, i) * gelu_gate(load(x, i)));
      }
#pragma omp simd
      for (int64_t i = 0; i < p.x.cols; ++i)
        store(grad_x, i, load(grad_y, i) * gelu_derivative(load(x, i), gelu_gate(load(x, i))));
    });
  });
}

void silu(const Elementwise& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_rows(p.x.rows, threads, [&](int64_t r) {
      const T* x = row<T>(p.x, r);
      T* y = row<T>(p.y, r);
#pragma omp simd
      for (int64_t i = 0; i < p.x.cols; ++i) store(y, i, load(x, i) * sigmoid(load(x, i)));
    });
  });
}

void silu_backward(const SiluBackward& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_rows(p.x.rows, threads, [&](int64_t r) {
      const T *x = row<T>(p.x, r), *grad_y = row<T>(p.grad_y, r);
      T* grad_x = row<T>(p.grad_x, r);
#pragma omp simd
      for (int64_t i = 0; i < p.x.cols; ++i) {
        const auto value = load(x, i), gate = sigmoid(value);
        const auto grad = load(grad_y, i) * gate * (1 + value * (1 - gate));
        store(grad_x, i, p.accumulate ? load(grad_x, i) + grad : grad);
      }
    });
  });
}

void column_sums(const ColumnSums& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    constexpr int64_t kBlock = 64;
    for_rows((p.x.cols + kBlock - 1) / kBlock, threads, [&](int64_t block) {
      const int64_t first = block * kBlock, count = p.x.cols - first < kBlock ? p.x.cols - first : kBlock;
      A sum[kBlock] = {};
      for (int64_t r = 0; r < p.x.rows; ++r) {
        const T* x = row<T>(p.x, r) + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sum[i] += load(x, i);
      }
      T* sums = row<T>(p.sums, 0) + first;
      for (int64_t i = 0; i < count; ++i) store(sums, i, sum[i]);
    });
  });
}

void convert(const Elementwise& p, int threads) {
  with_type(p.x.dtype, [&](auto from) {
    with_type(p.y.dtype, [&](auto to) {
      for_rows(p.x.rows, threads, [&](int64_t r) {
        const auto* x = row<decltype(from)>(p.x, r);
        auto* y = row<decltype(to)>(p.y, r);
#pragma omp simd
        for (int64_t i = 0; i < p.x.cols; ++i) store(y, i, static_cast<Acc<decltype(to)>>(load(x, i)));
      });
    });
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
