#pragma once

#include <string>

namespace flexdit::test {

// The message of the E that `body` throws, or an empty text.
template <class E, class Body>
std::string message_of(Body&& body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

}  // namespace flexdit::test
