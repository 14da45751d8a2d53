// Numbers of a command line.
#pragma once

#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>

namespace options {

template <class Number>
void read(const std::string& name, std::string_view text, Number& value) {
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, value);
  if (error != std::errc() || end != last)
    throw std::invalid_argument(name + " is \"" + std::string(text) + "\", must be a number in range");
}

}  // namespace options
