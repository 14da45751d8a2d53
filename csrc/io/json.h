// A strict reader of JSON (RFC 8259, UTF-8): the caller asks for the value that must come next. Nothing but the keys of
// open objects is kept, and values nest only as deep as the caller's own calls.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace flexdit::io {

// The message has the byte, the way to the value ('blocks'[2]: ...) and what is wrong with it.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class JsonReader {
 public:
  enum class Kind { object, array, string, number, boolean, null };

  explicit JsonReader(std::string_view text) : text_(text) {}

  // The kind of the next value, by its first character.
  Kind peek();
  // Calls `member` for every key; it must read the value. A key that comes twice is an error.
  void object(const std::function<void(const std::string& key)>& member);
  // Calls `item` for every item; it must read it.
  void array(const std::function<void()>& item);
  std::string string();
  // A number without fraction and exponent, in [least, most].
  int64_t integer(int64_t least, int64_t most);
  double real();
  bool boolean();
  void null();
  // Any value, nested a few levels at most.
  void skip();
  // Only white space may be left.
  void end();

  // Throws JsonError about the value that is being read or was read last.
  [[noreturn]] void fail(const std::string& message) const;

 private:
  void expect(Kind kind);
  void skip_nested(int depth);
  void skip_space();
  bool take(char c);
  std::string quoted_text();
  void escape(std::string& out);
  uint32_t four_digits();
  void utf8(std::string& out);
  std::string_view number_text();
  size_t digits();
  void word(std::string_view literal);
  char at() const { return position_ < text_.size() ? text_[position_] : '\0'; }

  std::string_view text_;
  size_t position_ = 0;
  std::string path_;
};

}  // namespace flexdit::io
