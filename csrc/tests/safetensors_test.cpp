// SafetensorsFile: good files, and every kind of bad one.
#include "flexdit/safetensors.h"

#include <sys/stat.h>

#include "check.h"
#include "files.h"
#include "message_of.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

bool has(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

// The message about a file of these bytes.
std::string refusal(const std::string& bytes) {
  const ExactBytes exact(bytes);
  const auto message = message_of<CheckpointError>([&] { SafetensorsFile(exact.view(), "x.safetensors"); });
  if (!message.empty()) CHECK_NOTE(has(message, "x.safetensors"), message);
  return message;
}
std::string refusal(const std::string& header, size_t data_bytes) {
  return refusal(safetensors_bytes(header, std::string(data_bytes, '\0')));
}

std::string tensor(const char* dtype, const char* shape, int64_t begin, int64_t end) {
  return check::text("{\"dtype\":\"", dtype, "\",\"shape\":", shape, ",\"data_offsets\":[", begin, ",", end, "]}");
}

const std::string kTwo = "{\"b\":" + tensor("F32", "[2]", 0, 8) + ",\"a\":" + tensor("I64", "[]", 8, 16) + "}";

}  // namespace

TEST_CASE(a_good_file) {
  const std::string data("\0\0\x80\x3f\0\0\0\xc0\x05\0\0\0\0\0\0\0", 16);
  const ExactBytes bytes(
      safetensors_bytes("{\"__metadata__\":{\"format\":\"pt\",\"k\\u00e9y\":\"\"}," + kTwo.substr(1) + "   ", data));
  const SafetensorsFile file(bytes.view(), "good");
  CHECK_EQ(file.entries().size(), 2u);
  CHECK_EQ(file.entries()[0].name, "a");
  CHECK_EQ(file.name(), "good");
  const SafetensorsEntry* b = file.find("b");
  CHECK(b && b->dtype == "F32" && b->shape == std::vector<int64_t>{2} && b->data.size() == 8);
  float values[2];
  std::memcpy(values, b->data.data(), 8);
  CHECK_EQ(values[0], 1.f);
  CHECK_EQ(values[1], -2.f);
  CHECK(file.find("a")->shape.empty() && file.find("a")->data[0] == std::byte{5});
  CHECK(!file.find("") && !file.find("aa") && !file.find("c") && !file.find("__metadata__"));
  CHECK(file.metadata().size() == 2 && file.metadata().at("format") == "pt" && file.metadata().at("k\u00e9y").empty());
  const SafetensorsFile copy = file;
  CHECK_EQ(copy.find("b")->data.data(), b->data.data());
}

TEST_CASE(files_without_values) {
  CHECK_EQ(refusal("{}", 0), "");
  CHECK_EQ(refusal("{\"__metadata__\":{}}", 0), "");
  CHECK_EQ(refusal("{\"a\":" + tensor("F32", "[0, 4611686018427387904, 7]", 0, 0) + "}", 0), "");
  CHECK_EQ(refusal("{\"a\":" + tensor("F32", "[0]", 2, 2) + ",\"b\":" + tensor("I8", "[2]", 0, 2) +
                       ",\"c\":" + tensor("F32", "[0]", 0, 0) + ",\"d\":" + tensor("F32", "[3,0]", 2, 2) + "}",
                   2),
           "");
}

TEST_CASE(dtypes) {
  const std::pair<const char*, int64_t> sizes[] = {{"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2},    {"I64", 8},
                                                   {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
                                                   {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  for (const auto& [name, size] : sizes) {
    const auto with = [&](int64_t bytes) {
      return refusal("{\"a\":" + tensor(name, "[3, 5]", 0, bytes) + "}", static_cast<size_t>(bytes));
    };
    CHECK_EQ(with(15 * size), "");
    for (const int64_t wrong : {15 * size - 1, 15 * size + 1, int64_t{0}})
      CHECK_NOTE(has(with(wrong), "its shape and dtype make " + std::to_string(15 * size)), name, " ", with(wrong));
  }
  for (const char* name : {"F33", "f32", "", "F4", "float32", "\\u0000"})
    CHECK_NOTE(has(refusal("{\"a\":" + tensor(name, "[1]", 0, 4) + "}", 4), "no dtype that this reader knows"), name);
  CHECK(dtype_of("F32") == DType::float32 && dtype_of("BF16") == DType::bfloat16);
  CHECK(dtype_of("F16") == DType::float16 && dtype_of("F64") == DType::float64);
  CHECK(!dtype_of("I64") && !dtype_of("F8_E4M3") && !dtype_of("other"));
}

TEST_CASE(cut_anywhere) {
  const std::string whole = safetensors_bytes(kTwo, std::string(16, '\1'));
  CHECK_EQ(refusal(whole), "");
  for (size_t size = 0; size < whole.size(); ++size) CHECK_NOTE(refusal(whole.substr(0, size)) != "", size);
  CHECK(has(refusal(""), "has 0 bytes, too few"));
  CHECK(has(refusal(whole + '\0'), "the last tensor ends at byte 16 of 17"));
}

TEST_CASE(header_lengths) {
  const std::string whole = safetensors_bytes(kTwo, std::string(16, '\0'));
  for (const uint64_t length :
       {uint64_t{0}, uint64_t{1}, kTwo.size() - 1, kTwo.size() + 1, kTwo.size() + 16, kTwo.size() + 17,
        uint64_t{1} << 31, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    std::string bytes = whole;
    std::memcpy(bytes.data(), &length, 8);
    CHECK_NOTE(refusal(bytes) != "", length);
    if (length > kTwo.size() + 16) CHECK_NOTE(has(refusal(bytes), std::to_string(length)), length);
  }
}

TEST_CASE(bad_headers) {
  CHECK(has(refusal("", 0), "no JSON object"));
  CHECK(has(refusal("[]", 0), "no JSON object"));
  CHECK(has(refusal(" {}", 0), "no JSON object"));
  CHECK(has(refusal("{", 0), "header, byte 1"));
  CHECK(has(refusal("{} x", 0), "nothing may follow"));
  CHECK(has(refusal("{\"a\":1}", 0), "'a': is a number, must be an object"));
  CHECK(has(refusal("{\"a\":{}}", 0), "'a': has no dtype"));
  CHECK(has(refusal("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,0]}}", 0), "'a': has no shape"));
  CHECK(has(refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[0]}}", 0), "'a': has no data_offsets"));
  CHECK(has(refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[]}}", 0), "has 0 offsets"));
  CHECK(has(refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0]}}", 0), "has 1 offsets"));
  CHECK(has(refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0,0]}}", 0), "has 3 offsets"));
  CHECK(has(refusal("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0), "the key 'dtype' comes twice"));
  CHECK(has(refusal("{\"a\":{\"dtype\":4}}", 0), "'a'.'dtype': is a number, must be a string"));
  CHECK(has(refusal("{\"a\":{\"stride\":4}}", 0), "'a'.'stride': no such key"));
  CHECK(has(refusal("{\"a\":{\"shape\":[1,-1]}}", 0), "'a'.'shape'[1]: is '-1'"));
  CHECK(has(refusal("{\"a\":{\"shape\":[1.0]}}", 0), "must be an integer"));
  CHECK(has(refusal("{\"a\":{\"shape\":[18446744073709551616]}}", 0), "must be from 0"));
  CHECK(has(refusal("{\"a\":{\"shape\":[[[[[[[", 0), "is an array, must be a number"));
  CHECK(has(refusal("{\"__metadata__\":{\"a\":1}}", 0), "'__metadata__'.'a': is a number, must be a string"));
  CHECK(has(refusal("{\"__metadata__\":[]}", 0), "must be an object"));
  CHECK(has(refusal("{\"__metadata__\":{},\"__metadata__\":{}}", 0), "comes twice"));
  const std::string a = "\"a\":" + tensor("F32", "[1]", 0, 4);
  CHECK(has(refusal("{" + a + "," + a + "}", 4), "the key 'a' comes twice"));
}

TEST_CASE(offsets) {
  const auto two = [](int64_t begin_a, int64_t end_a, int64_t begin_b, int64_t end_b, size_t bytes) {
    return refusal("{\"a\":" + tensor("I8", check::text('[', end_a - begin_a, ']').c_str(), begin_a, end_a) +
                       ",\"b\":" + tensor("I8", check::text('[', end_b - begin_b, ']').c_str(), begin_b, end_b) + "}",
                   bytes);
  };
  CHECK_EQ(two(0, 4, 4, 8, 8), "");
  CHECK_EQ(two(4, 8, 0, 4, 8), "");
  CHECK(has(two(0, 4, 3, 8, 8), "tensor 'b' begins at byte 3"));  // overlap
  CHECK(has(two(0, 4, 0, 4, 4), "begins at byte 0, must begin where the one before ends, at 4"));
  CHECK(has(two(0, 8, 2, 4, 8), "tensor 'b' begins at byte 2"));  // one within the other
  CHECK(has(two(0, 4, 5, 8, 8), "tensor 'b' begins at byte 5"));  // a hole
  CHECK(has(two(1, 4, 4, 8, 8), "tensor 'a' begins at byte 1"));
  CHECK(has(two(0, 4, 4, 7, 8), "ends at byte 7 of 8"));
  CHECK(has(two(0, 4, 4, 9, 8), "'b': has the bytes 4 to 9 of 8"));
  CHECK(has(refusal("{\"a\":" + tensor("I8", "[4]", 4, 0) + "}", 4), "'a': has the bytes 4 to 0"));
  CHECK(has(refusal("{\"a\":" + tensor("I8", "[0]", 9, 9) + "}", 4), "'a': has the bytes 9 to 9"));
  CHECK(has(refusal("{\"a\":" + tensor("I8", "[0]", 2, 2) + ",\"b\":" + tensor("I8", "[4]", 0, 4) + "}", 4),
            "begins at"));
  CHECK(has(refusal("{\"a\":{\"data_offsets\":[0,9223372036854775808]}}", 4), "'a'.'data_offsets'[1]"));
  CHECK(has(refusal("{\"a\":" + tensor("I8", "[1]", 0, INT64_MAX) + "}", 4), "'a': has the bytes 0 to"));
}

TEST_CASE(shapes_that_overflow) {
  for (const char* shape :
       {"[9223372036854775807, 2]", "[2305843009213693952, 4]", "[4294967296, 4294967296]", "[2, 9223372036854775807]",
        "[4611686018427387904, 4]", "[3037000500, 3037000500, 3037000500]"})
    CHECK_NOTE(has(refusal("{\"a\":" + tensor("F32", shape, 0, 0) + "}", 0), "more than 2^63 - 1"), shape);
}

TEST_CASE(names_from_the_file_are_tamed) {
  const auto message = refusal("{\"" + std::string(1000, 'n') + "\\n\":" + tensor("I8", "[1]", 1, 2) + "}", 2);
  CHECK_NOTE(has(message, "nnn...' begins") && message.size() < 300, message);
  CHECK(!has(refusal("{\"a\\nb\":" + tensor("I8", "[1]", 1, 2) + "}", 2), "\n"));
}

TEST_CASE(paths) {
  const TemporaryFolder folder;
  const auto path = folder / "x.safetensors";
  const auto message = [&] { return message_of<CheckpointError>([&] { SafetensorsFile{path.string()}; }); };
  CHECK(has(message(), path.string() + " does not exist"));
  write_file(path, "");
  CHECK(has(message(), "has 0 bytes"));
  write_file(path, safetensors_bytes(kTwo, std::string(16, '\2')));
  CHECK_EQ(message(), "");
  SafetensorsFile file(path.string());
  const SafetensorsFile copy = file;
  file = SafetensorsFile(path.string());
  std::filesystem::remove(path);
  CHECK(copy.find("a")->data[7] == std::byte{2});  // still mapped
  std::filesystem::create_directory(path);
  CHECK(has(message(), "is a directory"));
  std::filesystem::remove(path);
  if (mkfifo(path.c_str(), 0600) == 0) CHECK(has(message(), "no regular file"));
}
