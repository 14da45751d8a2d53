// Carves views out of one buffer. With a null base it only measures: the same code plans and computes sizes.
#pragma once

#include "flexdit/tensor.h"
#include "ops/trace.h"

namespace flexdit {

class Arena {
 public:
  // Fresh pieces hold nothing yet; others hold what was written when they were carved the same way before.
  explicit Arena(void* base = nullptr, bool fresh = true) : base_(static_cast<char*>(base)), fresh_(fresh) {}

  void* bytes(int64_t count) {
    const int64_t used = used_;
    used_ += (count + 63) / 64 * 64;
    if (base_ && trace::recorder()) return trace::recorder()->piece(base_, used, count, fresh_);
    return base_ ? base_ + used : nullptr;
  }
  Matrix matrix(int64_t rows, int64_t cols, DType dtype) {
    return {bytes(rows * cols * size_of(dtype)), rows, cols, cols, dtype};
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  bool fresh_;
  int64_t used_ = 0;
};

// What a contiguous matrix holds is not to be read any more, since something else comes there: only the arena checker
// listens.
inline void discard(const Matrix& m) { trace::discard(m.data, m.rows * m.cols * size_of(m.dtype)); }

}  // namespace flexdit
