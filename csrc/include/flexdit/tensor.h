// Views of memory that somebody else owns, and where to compute on them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flexdit {

enum class DType : uint8_t { float32, bfloat16, float16, float64 };
enum class Device : uint8_t { cpu, cuda };

constexpr int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
// Statistics, softmax and sums are kept in float32, for float64 storage in float64.
constexpr DType accumulation_type(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
const char* name_of(DType dtype);

// A bad argument; the message names it, says what it was and what is allowed.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A device or one of its libraries refused; the message has the operation, its sizes and the device's words.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A row-major matrix whose rows may lie apart: element (i, j) is data[i * stride + j].
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements
  DType dtype = DType::float32;

  explicit operator bool() const { return data != nullptr; }
  Matrix columns(int64_t first, int64_t count) const {
    return {static_cast<char*>(data) + first * size_of(dtype), rows, count, stride, dtype};
  }
  Matrix row_range(int64_t first, int64_t count) const {
    return {static_cast<char*>(data) + first * stride * size_of(dtype), count, cols, stride, dtype};
  }
};

// Where an operation runs. On the CPU `threads` = 0 means OpenMP's default.
struct Execution {
  Device device = Device::cpu;
  int threads = 0;
  int device_index = 0;
  void* stream = nullptr;
};

}  // namespace flexdit
