#include "io/json.h"

#include <charconv>
#include <unordered_set>

#include "io/text.h"

namespace flexdit::io {
namespace {

const char* name_of(JsonReader::Kind kind) {
  constexpr const char* kNames[] = {"an object", "an array", "a string", "a number", "true or false", "null"};
  return kNames[static_cast<int>(kind)];
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Adds a code point as UTF-8.
void append(std::string& out, uint32_t code) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | (code >> shift & 0x3f)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6), tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12), tail(6), tail(0);
  } else {
    out += static_cast<char>(0xf0 | code >> 18), tail(12), tail(6), tail(0);
  }
}

}  // namespace

void JsonReader::fail(const std::string& message) const {
  throw JsonError("byte " + std::to_string(position_) + (path_.empty() ? "" : ", " + path_) + ": " + message);
}

void JsonReader::skip_space() {
  while (at() == ' ' || at() == '\t' || at() == '\n' || at() == '\r') ++position_;
}

bool JsonReader::take(char c) {
  skip_space();
  if (position_ == text_.size() || text_[position_] != c) return false;
  ++position_;
  return true;
}

JsonReader::Kind JsonReader::peek() {
  skip_space();
  if (position_ == text_.size()) fail("the text ends where a value must be");
  switch (const char c = at()) {
    case '{':
      return Kind::object;
    case '[':
      return Kind::array;
    case '"':
      return Kind::string;
    case 't':
    case 'f':
      return Kind::boolean;
    case 'n':
      return Kind::null;
    default:
      if (c == '-' || is_digit(c)) return Kind::number;
      fail("no JSON value begins with " + quoted({&c, 1}));
  }
}

void JsonReader::expect(Kind kind) {
  if (const Kind found = peek(); found != kind)
    fail(std::string("is ") + name_of(found) + ", must be " + name_of(kind));
}

void JsonReader::object(const std::function<void(const std::string& key)>& member) {
  expect(Kind::object);
  ++position_;
  if (take('}')) return;
  const size_t outer = path_.size();
  std::unordered_set<std::string> keys;
  do {
    skip_space();
    if (at() != '"') fail("a key in quotes must be here");
    const std::string key = quoted_text();
    if (!keys.insert(key).second) fail("the key " + quoted(key) + " comes twice");
    if (!take(':')) fail("':' must follow the key " + quoted(key));
    path_ += (outer ? "." : "") + quoted(key);
    member(key);
    path_.resize(outer);
  } while (take(','));
  if (!take('}')) fail("',' or '}' must be here");
}

void JsonReader::array(const std::function<void()>& item) {
  expect(Kind::array);
  ++position_;
  if (take(']')) return;
  const size_t outer = path_.size();
  int64_t index = 0;
  do {
    path_ += "[" + std::to_string(index++) + "]";
    item();
    path_.resize(outer);
  } while (take(','));
  if (!take(']')) fail("',' or ']' must be here");
}

std::string JsonReader::string() {
  expect(Kind::string);
  return quoted_text();
}

std::string JsonReader::quoted_text() {
  std::string out;
  ++position_;
  while (true) {
    if (position_ == text_.size()) fail("the text ends within a string");
    const auto c = static_cast<unsigned char>(text_[position_]);
    if (c == '"') break;
    if (c < 0x20) fail("a control character must be escaped in a string");
    if (c == '\\') {
      escape(out);
    } else if (c < 0x80) {
      out += text_[position_++];
    } else {
      utf8(out);
    }
  }
  ++position_;
  return out;
}

void JsonReader::escape(std::string& out) {
  constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
  ++position_;
  const char name = at();
  if (name != 'u') {
    const size_t which = name ? kNames.find(name) : kNames.npos;
    if (which == kNames.npos) fail("no such escape in a string");
    out += kValues[which];
    ++position_;
    return;
  }
  uint32_t code = four_digits();
  if (code >= 0xd800 && code < 0xe000) {  // half of a pair
    if (code >= 0xdc00 || text_.substr(position_, 2) != "\\u") fail("\\u escape is half of a surrogate pair");
    ++position_;
    const uint32_t low = four_digits();
    if (low < 0xdc00 || low >= 0xe000) fail("\\u escape is half of a surrogate pair");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  append(out, code);
}

// Of \uXXXX, from the u on.
uint32_t JsonReader::four_digits() {
  const std::string_view digits = text_.substr(position_ + 1, 4);
  uint32_t code = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
  if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) fail("\\u must have four hex digits");
  position_ += 5;
  return code;
}

// One character of more than one byte: no overlong form, no surrogate, nothing above U+10FFFF.
void JsonReader::utf8(std::string& out) {
  const auto first = static_cast<unsigned char>(text_[position_]);
  const size_t length = first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
  uint32_t code = first & (0xff >> (length + 1));
  bool good = length > 0 && position_ + length <= text_.size();
  for (size_t i = 1; good && i < length; ++i) {
    const auto c = static_cast<unsigned char>(text_[position_ + i]);
    good = (c & 0xc0) == 0x80;
    code = code << 6 | (c & 0x3f);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  if (!good || code < kLeast[length] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) fail("is not UTF-8");
  out += text_.substr(position_, length);
  position_ += length;
}

size_t JsonReader::digits() {
  const size_t begin = position_;
  while (is_digit(at())) ++position_;
  return position_ - begin;
}

// A number as it is written.
std::string_view JsonReader::number_text() {
  expect(Kind::number);
  const size_t begin = position_;
  if (at() == '-') ++position_;
  const bool zero = at() == '0';
  const size_t whole = digits();
  bool good = whole > 0 && !(zero && whole > 1);
  if (good && at() == '.') ++position_, good = digits() > 0;
  if (good && (at() == 'e' || at() == 'E')) {
    ++position_;
    if (at() == '+' || at() == '-') ++position_;
    good = digits() > 0;
  }
  const std::string_view text = text_.substr(begin, position_ - begin);
  if (!good) fail(quoted(text) + " is no JSON number");
  return text;
}

int64_t JsonReader::integer(int64_t least, int64_t most) {
  const std::string_view text = number_text();
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end != text.data() + text.size()) fail("is " + quoted(text) + ", must be an integer");
  if (error != std::errc() || value < least || value > most)
    fail("is " + quoted(text) + ", must be from " + std::to_string(least) + " to " + std::to_string(most));
  return value;
}

double JsonReader::real() {
  const std::string_view text = number_text();
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) fail("is " + quoted(text) + ", no 64-bit float");
  return value;
}

void JsonReader::word(std::string_view literal) {
  if (text_.substr(position_, literal.size()) != literal) fail("must be " + std::string(literal));
  position_ += literal.size();
}

bool JsonReader::boolean() {
  expect(Kind::boolean);
  const bool value = at() == 't';
  word(value ? "true" : "false");
  return value;
}

void JsonReader::null() {
  expect(Kind::null);
  word("null");
}

void JsonReader::skip() { skip_nested(0); }

void JsonReader::skip_nested(int depth) {
  constexpr int kMostDepth = 8;
  if (depth > kMostDepth) fail("nests too deep");
  switch (peek()) {
    case Kind::object:
      return object([&](const std::string&) { skip_nested(depth + 1); });
    case Kind::array:
      return array([&] { skip_nested(depth + 1); });
    case Kind::string:
      return void(string());
    case Kind::number:
      return void(real());
    case Kind::boolean:
      return void(boolean());
    case Kind::null:
      return null();
  }
}

void JsonReader::end() {
  skip_space();
  if (position_ != text_.size()) fail("nothing may follow the value");
}

}  // namespace flexdit::io
