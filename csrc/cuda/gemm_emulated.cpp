// Linear layers of the emulated build: what cuBLASLt computes on a GPU, as plain loops with float32 sums.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {
namespace {

// Element (i, j) of a matrix, or of its transpose.
struct Operand {
  Matrix matrix;
  bool transposed = false;
};

template <class T>
std::vector<float> values_of(const Operand& o) {
  const int64_t rows = o.transposed ? o.matrix.cols : o.matrix.rows,
                cols = o.transposed ? o.matrix.rows : o.matrix.cols;
  std::vector<float> out(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      out[static_cast<size_t>(i * cols + j)] = to_float(o.transposed ? row<T>(o.matrix, j)[i] : row<T>(o.matrix, i)[j]);
  return out;
}

// c (+)= a b + bias
template <class T>
void multiply(const Operand& a, const Operand& b, const Matrix& bias, const Matrix& c, bool accumulate) {
  const std::vector<float> left = values_of<T>(a), right = values_of<T>(b);
  const int64_t depth = a.transposed ? a.matrix.rows : a.matrix.cols;
  std::vector<float> sums(static_cast<size_t>(c.cols));
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j)
      sums[static_cast<size_t>(j)] =
          (accumulate ? to_float(row<T>(c, i)[j]) : 0) + (bias ? to_float(row<T>(bias, 0)[j]) : 0);
    for (int64_t k = 0; k < depth; ++k) {
      const float factor = left[static_cast<size_t>(i * depth + k)];
      const float* from = right.data() + k * c.cols;
      for (int64_t j = 0; j < c.cols; ++j) sums[static_cast<size_t>(j)] += factor * from[j];
    }
    for (int64_t j = 0; j < c.cols; ++j) row<T>(c, i)[j] = from_float<T>(sums[static_cast<size_t>(j)]);
  }
}

}  // namespace

void linear(const Linear& p, const Execution& exec) {
  const Matrix product = p.pre_activation ? p.pre_activation : p.y;
  with_type(p.x.dtype, [&](auto tag) {
    emulator::submit([=] { multiply<decltype(tag)>({p.x}, {p.weight, true}, p.bias, product, false); });
  });
  if (p.activation == Activation::gelu_tanh) cuda::gelu({.x = product, .y = p.y}, exec);
}

void linear_backward(const LinearBackward& p, const Execution& exec) {
  with_type(p.x.dtype, [&](auto tag) {
    emulator::submit([=] {
      using T = decltype(tag);
      if (p.grad_x) multiply<T>({p.grad_y}, {p.weight}, {}, p.grad_x, p.accumulate_grad_x);
      if (p.grad_weight) multiply<T>({p.grad_y, true}, {p.x}, {}, p.grad_weight, false);
    });
  });
  if (p.gelu_input) cuda::gelu_backward({.x = p.gelu_input, .grad_y = p.grad_x, .y = {}, .grad_x = p.grad_x}, exec);
  if (p.grad_bias) column_sums(bias_gradient(p), exec);
}

}  // namespace flexdit::cuda
