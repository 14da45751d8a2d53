// Carves views out of one buffer. With a null base it only measures: the same code plans and computes sizes.
#pragma once

#include "flexdit/tensor.h"

namespace flexdit {

class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  void* bytes(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (count + 63) / 64 * 64;
    return piece;
  }
  Matrix matrix(int64_t rows, int64_t cols, DType dtype) {
    return {bytes(rows * cols * size_of(dtype)), rows, cols, cols, dtype};
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace flexdit
