// c (+)= a b + bias on the CPU: what gemm_cpu.cpp hands to oneDNN or to the tiles of gemm_amx.cpp.
#pragma once

#include "flexdit/ops.h"

namespace flexdit::cpu {

// A matrix, perhaps read transposed.
struct Operand {
  Matrix matrix;
  bool transposed = false;

  int64_t rows() const { return transposed ? matrix.cols : matrix.rows; }
  int64_t cols() const { return transposed ? matrix.rows : matrix.cols; }
};

struct Product {
  Operand a, b, c;  // c is not read transposed
  Matrix bias = {};
  bool gelu = false, accumulate = false;
  const PackedWeight* packed = nullptr;  // b once more
};

namespace amx {
// Bytes of b packed for multiply(), which is pack()'s work.
int64_t packed_bytes(const Operand& b);
void pack(const Operand& b, char* tiles, int threads);
// a and b in float32 or bfloat16, c in either. `tiles`: b packed, or null.
void multiply(const Product& p, const char* tiles, int threads);
}  // namespace amx

}  // namespace flexdit::cpu
