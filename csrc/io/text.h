// Text from a file, made fit for an error message.
#pragma once

#include <string>
#include <string_view>

namespace flexdit::io {

// In quotes, without control characters, cut when long.
inline std::string quoted(std::string_view text) {
  constexpr size_t kMost = 100;
  std::string out = "'";
  for (const char c : text.substr(0, kMost)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return out + (text.size() > kMost ? "...'" : "'");
}

}  // namespace flexdit::io
