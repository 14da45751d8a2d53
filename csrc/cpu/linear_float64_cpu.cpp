// Linear layers in float64, which oneDNN does not have: blocks of the output, one per task, each summed in order.
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/tile_gemm.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kBlockRows = 96, kBlockColumns = 64, kBlockDepth = 256;

// An operand read along any strides: element (i, j) is data[i * row + j * column].
struct Operand {
  const double* data;
  int64_t row, column;
};
Operand plain(const Matrix& m) { return {row<double>(m, 0), m.stride, 1}; }
Operand transposed(const Matrix& m) { return {row<double>(m, 0), 1, m.stride}; }

// c (+)= a b, a [m, k], b [k, n].
void multiply_blocks(const Operand& a, const Operand& b, const Matrix& c, int64_t k, bool accumulate, int threads) {
  const int64_t down = (c.rows + kBlockRows - 1) / kBlockRows, across = (c.cols + kBlockColumns - 1) / kBlockColumns;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < down * across; ++block) {
    const int64_t i0 = block / across * kBlockRows, j0 = block % across * kBlockColumns;
    const int64_t rows = c.rows - i0 < kBlockRows ? c.rows - i0 : kBlockRows;
    const int64_t columns = c.cols - j0 < kBlockColumns ? c.cols - j0 : kBlockColumns;
    Scratch& scratch = thread_scratch();
    scratch.reset<double>((kBlockRows + kBlockDepth) * kBlockColumns, 2);
    double *sum = scratch.take<double>(kBlockRows * kBlockColumns),
           *bb = scratch.take<double>(kBlockDepth * kBlockColumns);
    for (int64_t i = 0; i < rows * kBlockColumns; ++i) sum[i] = 0;
    for (int64_t l0 = 0; l0 < k; l0 += kBlockDepth) {
      const int64_t depth = k - l0 < kBlockDepth ? k - l0 : kBlockDepth;
      for (int64_t l = 0; l < depth; ++l)
        for (int64_t j = 0; j < kBlockColumns; ++j)
          bb[l * kBlockColumns + j] = j < columns ? b.data[(l0 + l) * b.row + (j0 + j) * b.column] : 0;
      multiply<double>({.m = rows,
                        .n = columns,
                        .k = depth,
                        .a = a.data + i0 * a.row + l0 * a.column,
                        .a_row = a.row,
                        .a_k = a.column,
                        .b = bb,
                        .ldb = kBlockColumns,
                        .c = sum,
                        .ldc = kBlockColumns,
                        .accumulate = true});
    }
    for (int64_t i = 0; i < rows; ++i) {
      double* out = row<double>(c, i0 + i) + j0;
      for (int64_t j = 0; j < columns; ++j) out[j] = (accumulate ? out[j] : 0) + sum[i * kBlockColumns + j];
    }
  }
}

}  // namespace

void linear_float64(const Linear& p, int threads) {
  multiply_blocks(plain(p.x), transposed(p.weight), p.y, p.x.cols, false, threads);
  for (int64_t i = 0; p.bias && i < p.y.rows; ++i)
    for (int64_t j = 0; j < p.y.cols; ++j) row<double>(p.y, i)[j] += row<double>(p.bias, 0)[j];
  if (p.activation == Activation::gelu_tanh) gelu({.x = p.y, .y = p.y}, threads);
}

void linear_float64_backward(const LinearBackward& p, int threads) {
  if (p.grad_x)
    multiply_blocks(plain(p.grad_y), plain(p.weight), p.grad_x, p.weight.rows, p.accumulate_grad_x, threads);
  if (p.grad_weight) multiply_blocks(transposed(p.grad_y), plain(p.x), p.grad_weight, p.x.rows, false, threads);
  if (p.grad_bias) column_sums({.x = p.grad_y, .sums = p.grad_bias}, threads);
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
