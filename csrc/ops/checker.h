// Checks of an operation's fields. They read layout tables, labels, timesteps and the like on the CPU only: on a GPU
// these lie in its memory.
#pragma once

#include "flexdit/ops.h"
#include "ops/device.h"
#include "ops/message.h"

namespace flexdit {

// Checks the fields of one operation; the first one fixes the dtype that all must have.
class Checker {
 public:
  Checker(const char* op, const Execution& exec) : op_(op), on_cpu_(exec.device == Device::cpu) {
    holds(
        on_cpu_ || kHasCuda,
        "this build of flexdit has no CUDA backend: build it where nvcc is found, or with FLEXDIT_CUDA=ON to see why");
  }
  bool on_cpu() const { return on_cpu_; }

  // The rows that a layout packs. Only the device may read a table that lies there: then `first`, one of the views
  // with these rows, says how many there can be.
  int64_t rows(const TokenLayout& layout, const Matrix& first) const { return on_cpu_ ? layout.total() : first.rows; }

  void matrix(const char* field, const Matrix& m, int64_t rows, int64_t cols) { view(field, m, rows, cols, false); }
  // At least `rows` rows: buffers of packed tokens may have spare ones at the end.
  void tokens(const char* field, const Matrix& m, int64_t rows, int64_t cols) { view(field, m, rows, cols, true); }
  void optional(const char* field, const Matrix& m, int64_t rows, int64_t cols) {
    if (m) matrix(field, m, rows, cols);
  }
  template <class... Parts>
  void holds(bool condition, const Parts&... parts) const {
    if (!condition) refuse(op_, ": ", parts...);
  }
  void accumulation(const char* field, const Matrix& m, int64_t rows, int64_t cols) {
    holds(m.dtype == accumulation_type(dtype_), field, " is ", name_of(m.dtype), ", must be ",
          name_of(accumulation_type(dtype_)));
    holds(m.rows >= rows && m.cols == cols, field, " is ", Shape{m.rows, m.cols}, ", must be ", Shape{rows, cols});
  }
  void layout(const char* field, const TokenLayout& layout, int64_t batch) const {
    holds(layout.table != nullptr, field, " is missing");
    holds(layout.batch == batch, field, " has ", layout.batch, " samples, must have ", batch);
  }
  // A token is kept in a warp's registers there.
  void columns(int64_t cols) const {
    holds(on_cpu_ || cols <= cuda::kMaxColumns, "rows have ", cols, " columns, the CUDA backend takes at most ",
          cuda::kMaxColumns);
  }
  void storage(const char* field, DType dtype) const {
    const DType refused = on_cpu_ ? DType::float16 : DType::float64;
    holds(dtype != refused, field, " is ", name_of(refused), ", which the ", (on_cpu_ ? "CPU" : "CUDA"),
          " backend does not compute with");
  }
  void nonzero(const char* field, const void* pointer) const { holds(pointer != nullptr, field, " is missing"); }

 private:
  void view(const char* field, const Matrix& m, int64_t rows, int64_t cols, bool spare) {
    holds(m.data || rows == 0 || cols == 0, field, " is missing");
    holds((spare ? m.rows >= rows : m.rows == rows) && m.cols == cols, field, " is ", Shape{m.rows, m.cols},
          ", must be ", (spare ? "at least " : ""), Shape{rows, cols});
    holds(m.rows <= 1 || m.stride >= cols, field, " has rows that overlap: stride ", m.stride, " for ", cols,
          " columns");
    if (typed_) holds(m.dtype == dtype_, field, " is ", name_of(m.dtype), ", must be ", name_of(dtype_));
    typed_ = true;
    dtype_ = m.dtype;
    storage(field, dtype_);
  }

  const char* op_;
  bool on_cpu_;
  bool typed_ = false;
  DType dtype_ = DType::float32;
};

}  // namespace flexdit
