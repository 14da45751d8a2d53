// Checks of an operation's fields. They read layout tables, labels, timesteps and the like on the CPU only: on a GPU
// these lie in its memory.
#pragma once

#include "flexdit/ops.h"
#include "ops/device.h"
#include "ops/message.h"
#include "ops/trace.h"

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

  void matrix(const char* field, const Matrix& m, int64_t rows, int64_t cols, Access access = Access::read) {
    view(field, m, rows, cols, false, access);
  }
  // At least `rows` rows: buffers of packed tokens may have spare ones at the end.
  void tokens(const char* field, const Matrix& m, int64_t rows, int64_t cols, Access access = Access::read) {
    view(field, m, rows, cols, true, access);
  }
  void optional(const char* field, const Matrix& m, int64_t rows, int64_t cols, Access access = Access::read) {
    if (m) matrix(field, m, rows, cols, access);
  }
  template <class... Parts>
  void holds(bool condition, const Parts&... parts) const {
    if (!condition) refuse(op_, ": ", parts...);
  }
  void accumulation(const char* field, const Matrix& m, int64_t rows, int64_t cols, Access access) {
    holds(m.dtype == accumulation_type(dtype_), field, " is ", name_of(m.dtype), ", must be ",
          name_of(accumulation_type(dtype_)));
    holds(m.rows >= rows && m.cols == cols, field, " is ", Shape{m.rows, m.cols}, ", must be ", Shape{rows, cols});
    saw(field, m, rows, access);
  }
  void layout(const char* field, const TokenLayout& layout, int64_t batch) {
    array(field, layout.table, layout.batch + 1);
    holds(layout.batch == batch, field, " has ", layout.batch, " samples, must have ", batch);
    // On the emulator any table can be read.
    if (trace::recorder() && layout.row_map) array(field, layout.row_map, layout.total());
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
  void bytes(const char* field, const void* data, int64_t count, Access access) {
    holds(data || count == 0, field, " is missing");
    saw(field, data, 1, count, count, access);
  }
  template <class T>
  void array(const char* field, const T* data, int64_t count, Access access = Access::read) {
    bytes(field, data, count * int64_t{sizeof(T)}, access);
  }
  // Packed images with `values` values for every token of a layout.
  void images(const char* field, const void* data, const TokenLayout& layout, int64_t values, DType dtype,
              Access access) {
    nonzero(field, data);
    const int64_t row = values * size_of(dtype);
    if (trace::recorder()) saw(field, data, layout.total(), row, row, access);
  }
  // Addresses on the device, of rows that are read.
  void indirect(const char* field, const void* const* rows, int64_t count, int64_t row_bytes) {
    nonzero(field, rows);
    saw(field, rows, count, row_bytes, 0, Access::indirect);
  }
  // Tells the recorder; right before the launch.
  void launches() const {
    if (trace::recorder()) trace::recorder()->operation(op_, views_);
  }

 private:
  void saw(const char* field, const void* data, int64_t rows, int64_t row_bytes, int64_t stride_bytes, Access access) {
    if (trace::recorder() && access != Access::none)
      views_.push_back({field, data, rows, row_bytes, stride_bytes, access});
  }
  void saw(const char* field, const Matrix& m, int64_t rows, Access access) {
    saw(field, m.data, rows, m.cols * size_of(m.dtype), m.stride * size_of(m.dtype), access);
  }
  void view(const char* field, const Matrix& m, int64_t rows, int64_t cols, bool spare, Access access) {
    holds(m.data || rows == 0 || cols == 0, field, " is missing");
    holds((spare ? m.rows >= rows : m.rows == rows) && m.cols == cols, field, " is ", Shape{m.rows, m.cols},
          ", must be ", (spare ? "at least " : ""), Shape{rows, cols});
    holds(m.rows <= 1 || m.stride >= cols, field, " has rows that overlap: stride ", m.stride, " for ", cols,
          " columns");
    if (typed_) holds(m.dtype == dtype_, field, " is ", name_of(m.dtype), ", must be ", name_of(dtype_));
    typed_ = true;
    dtype_ = m.dtype;
    storage(field, dtype_);
    saw(field, m, rows, access);
  }

  const char* op_;
  bool on_cpu_;
  bool typed_ = false;
  DType dtype_ = DType::float32;
  std::vector<trace::View> views_;
};

}  // namespace flexdit
