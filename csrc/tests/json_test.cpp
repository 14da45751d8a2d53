// The JSON reader: what RFC 8259 allows and what it does not.
#include "io/json.h"

#include <limits>

#include "check.h"
#include "files.h"
#include "message_of.h"

using flexdit::io::JsonError;
using flexdit::io::JsonReader;
using flexdit::test::ExactBytes;
using flexdit::test::message_of;

namespace {

constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(), kMost = std::numeric_limits<int64_t>::max();

template <class Read>
auto value_of(const std::string& text, Read&& read) {
  const ExactBytes bytes(text);
  JsonReader json(bytes.text());
  auto value = read(json);
  json.end();
  return value;
}

std::string string_of(const std::string& text) {
  return value_of(text, [](JsonReader& json) { return json.string(); });
}
int64_t integer_of(const std::string& text, int64_t least = kLeast, int64_t most = kMost) {
  return value_of(text, [&](JsonReader& json) { return json.integer(least, most); });
}
double real_of(const std::string& text) {
  return value_of(text, [](JsonReader& json) { return json.real(); });
}

// Reads whatever comes, at most 50 levels deep.
void read_any(JsonReader& json, int depth = 0) {
  if (depth == 50) json.fail("too deep");
  switch (json.peek()) {
    case JsonReader::Kind::object:
      return json.object([&](const std::string&) { read_any(json, depth + 1); });
    case JsonReader::Kind::array:
      return json.array([&] { read_any(json, depth + 1); });
    case JsonReader::Kind::string:
      return void(json.string());
    case JsonReader::Kind::number:
      return void(json.real());
    case JsonReader::Kind::boolean:
      return void(json.boolean());
    case JsonReader::Kind::null:
      return json.null();
  }
}

std::string error_of(const std::string& text) {
  const ExactBytes bytes(text);
  return message_of<JsonError>([&] {
    JsonReader json(bytes.text());
    read_any(json);
    json.end();
  });
}

bool has(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

}  // namespace

TEST_CASE(strings) {
  CHECK_EQ(string_of("\"\""), "");
  CHECK_EQ(string_of(" \t\r\n\"a b\" "), "a b");
  CHECK_EQ(string_of(R"("\"\\\/\b\f\n\r\t")"), "\"\\/\b\f\n\r\t");
  CHECK_EQ(string_of(R"("\u0041\u00e9\u20ac\ud83d\ude00")"), "A\u00e9\u20ac\U0001f600");
  CHECK_EQ(string_of(R"("\u0000x")"), std::string("\0x", 2));
  CHECK_EQ(string_of("\"\u00e9\u20ac\U0001f600\U0010ffff\""), "\u00e9\u20ac\U0001f600\U0010ffff");
  CHECK_EQ(string_of("\"\x7f\""), "\x7f");
}

TEST_CASE(bad_strings) {
  for (const char* text : {"\"", "\"abc", "\"abc\\", "\"abc\\\"", "\"\\u12", "\"\\ud83d\\u12"})
    CHECK(error_of(text) != "");
  for (const char* text : {R"("\x")", R"("\U0041")", R"("\")", R"("\u12g4")", R"("\u+123")", R"("\u 123")"})
    CHECK_NOTE(has(error_of(text), "escape") || has(error_of(text), "hex") || has(error_of(text), "ends"), text);
  for (const char* text : {R"("\ud83d")", R"("\ude00")", R"("\ud83dx")", R"("\ud83d\n")", R"("\ud83d\u0041")",
                           R"("\ud83d\ud83d")", R"("\ude00\ud83d")"})
    CHECK_NOTE(has(error_of(text), "surrogate"), text);
  for (const char* text : {"\"a\nb\"", "\"\x01\"", "\"\x1f\""}) CHECK_NOTE(has(error_of(text), "control"), text);
  CHECK(has(error_of(std::string("\"a\0b\"", 5)), "control"));
  const char* broken[] = {"\"\x80\"",
                          "\"\xc0\x80\"",
                          "\"\xc1\xbf\"",
                          "\"\xe0\x80\x80\"",
                          "\"\xed\xa0\x80\"",
                          "\"\xf0\x80\x80\x80\"",
                          "\"\xf4\x90\x80\x80\"",
                          "\"\xf5\x80\x80\x80\"",
                          "\"\xff\"",
                          "\"\xc3\"",
                          "\"\xe2\x82\"",
                          "\"\xe2\x82",
                          "\"\xf0\x9f\x98"};
  for (const char* text : broken) CHECK_NOTE(has(error_of(text), "UTF-8"), text);
}

TEST_CASE(numbers) {
  CHECK_EQ(integer_of("0"), 0);
  CHECK_EQ(integer_of("-0"), 0);
  CHECK_EQ(integer_of("-17 "), -17);
  CHECK_EQ(integer_of("9223372036854775807"), kMost);
  CHECK_EQ(integer_of("-9223372036854775808"), kLeast);
  CHECK_EQ(real_of("4"), 4.0);
  CHECK_EQ(real_of("-0.1"), -0.1);
  CHECK_EQ(real_of("1.5e2"), 150.0);
  CHECK_EQ(real_of("1E+2"), 100.0);
  CHECK_EQ(real_of("25e-2"), 0.25);
  CHECK_EQ(real_of("1.7976931348623157e308"), std::numeric_limits<double>::max());
}

TEST_CASE(bad_numbers) {
  for (const char* text :
       {"-",  "-a",    "01",   "-01", "00",  "1.",       "1.e5",      "1e",  "1e+", "1e-",   "+1",
        ".5", "1.5.2", "0x10", "1_0", "NaN", "Infinity", "-Infinity", "nan", "inf", "1e400", "-1e400"})
    CHECK_NOTE(error_of(text) != "", text);
  const auto refused = [](const char* text, int64_t least = kLeast, int64_t most = kMost) {
    return message_of<JsonError>([&] { integer_of(text, least, most); });
  };
  for (const char* text : {"1.0", "1e2", "-0.0"}) CHECK_NOTE(has(refused(text), "must be an integer"), text);
  for (const char* text : {"9223372036854775808", "-9223372036854775809", "1000000000000000000000000000"})
    CHECK_NOTE(has(refused(text), "must be from"), text);
  CHECK(has(refused("4", 5, 7), "is '4', must be from 5 to 7"));
  CHECK(has(refused("8", 5, 7), "must be from 5 to 7"));
}

TEST_CASE(structure) {
  for (const char* text : {"{}", "[]", " { } ", "[ ]", "[1,2 , 3]", R"({"a":{"b":[{},[],"x",null,true,false,-1]}})",
                           "null", "true", "\t[\r\n]\n"})
    CHECK_EQ(error_of(text), "");
  for (const char* text : {"",          " ",          "{",         "[",     "{]",     "[}",      "[1",
                           "[1,",       "[1,]",       "[,1]",      "[1 2]", "{\"a\"", "{\"a\":", "{\"a\":1",
                           "{\"a\":1,", "{\"a\":1,}", "{\"a\" 1}", "{a:1}", "{1:1}",  "{,}",     "{\"a\":1 \"b\":2}",
                           "[1]]",      "{}{}",       "1 2",       "nul",   "nulL",   "tru",     "fals",
                           "True",      "t",          "n",         "/",     "'a'",    "// x\n1", "\xef\xbb\xbf{}"})
    CHECK_NOTE(error_of(text) != "", text);
  CHECK(error_of(std::string("[1]\0", 4)) != "");
  CHECK(has(error_of(R"({"a":1,"b":2,"a":3})"), "the key 'a' comes twice"));
  CHECK(has(error_of(R"({"a":1,"\u0061":3})"), "the key 'a' comes twice"));
  CHECK_EQ(error_of(R"([{"a":1},{"a":1}])"), "");
  CHECK(has(error_of(std::string(1000000, '[')), "too deep"));
}

TEST_CASE(kinds) {
  const char* texts[] = {"{}", "[]", "\"x\"", "1", "true", "null"};
  for (const char* text : texts) {
    const ExactBytes bytes(text);
    JsonReader json(bytes.text());
    const auto wrong = [&](auto&& read) { return has(message_of<JsonError>(read), "must be"); };
    int refused = wrong([&] { JsonReader(bytes.text()).object([](const std::string&) {}); });
    refused += wrong([&] { JsonReader(bytes.text()).array([] {}); });
    refused += wrong([&] { JsonReader(bytes.text()).string(); });
    refused += wrong([&] { JsonReader(bytes.text()).real(); });
    refused += wrong([&] { JsonReader(bytes.text()).boolean(); });
    refused += wrong([&] { JsonReader(bytes.text()).null(); });
    CHECK_EQ(refused, 5);
  }
}

TEST_CASE(messages_show_the_way) {
  const auto message = message_of<JsonError>([] {
    JsonReader json(R"({"a": {"b": [1, 2, "3"]}})");
    json.object(
        [&](const std::string&) { json.object([&](const std::string&) { json.array([&] { json.integer(0, 9); }); }); });
  });
  CHECK_EQ(message, "byte 19, 'a'.'b'[2]: is a string, must be a number");
}
