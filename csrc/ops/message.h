// The words of an exception, put together only when it is thrown: checks run before every launch.
#pragma once

#include <string>
#include <string_view>

#include "flexdit/tensor.h"

namespace flexdit {

struct Shape {
  int64_t rows, cols;
};

inline void append(std::string& out, std::string_view part) { out += part; }
inline void append(std::string& out, int64_t number) { out += std::to_string(number); }
inline void append(std::string& out, Shape shape) {
  out += "[" + std::to_string(shape.rows) + ", " + std::to_string(shape.cols) + "]";
}

template <class... Parts>
[[noreturn, gnu::cold]] void refuse(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw ArgumentError(message);
}

}  // namespace flexdit
