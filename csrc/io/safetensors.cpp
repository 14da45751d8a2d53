// The format: a 64-bit length, so many bytes of JSON, then the tensors' bytes without holes. Source: the format's
// description in the README of huggingface/safetensors.
#include "flexdit/safetensors.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "io/json.h"
#include "io/mapped_file.h"
#include "io/text.h"

namespace flexdit {
namespace {

static_assert(std::endian::native == std::endian::little, "the file's numbers are used as they are");

constexpr uint64_t kLengthBytes = 8, kMostHeaderBytes = 100'000'000;  // the format's own limit
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

struct Format {
  std::string_view name;
  int64_t bytes;
  std::optional<DType> dtype;
};
constexpr Format kFormats[] = {
    {"F32", 4, DType::float32},
    {"BF16", 2, DType::bfloat16},
    {"F16", 2, DType::float16},
    {"F64", 8, DType::float64},
    {"I64", 8, {}},
    {"I32", 4, {}},
    {"I16", 2, {}},
    {"I8", 1, {}},
    {"U64", 8, {}},
    {"U32", 4, {}},
    {"U16", 2, {}},
    {"U8", 1, {}},
    {"BOOL", 1, {}},
    {"F8_E4M3", 1, {}},
    {"F8_E5M2", 1, {}},
    {"F8_E8M0", 1, {}},
    {"C64", 8, {}},
};

const Format* find_format(std::string_view name) {
  const auto* found = std::find_if(std::begin(kFormats), std::end(kFormats), [&](auto& f) { return f.name == name; });
  return found == std::end(kFormats) ? nullptr : found;
}

// Reads what a header says about one tensor. Its bytes are checked against shape and dtype, and to lie in `data`.
SafetensorsEntry read_entry(io::JsonReader& json, const std::string& name, std::span<const std::byte> data) {
  SafetensorsEntry entry{.name = name};
  std::vector<int64_t> offsets;
  const Format* format = nullptr;
  bool has_shape = false;
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      entry.dtype = json.string();
      format = find_format(entry.dtype);
      if (!format) json.fail("is " + io::quoted(entry.dtype) + ", no dtype that this reader knows");
    } else if (key == "shape") {
      has_shape = true;
      json.array([&] { entry.shape.push_back(json.integer(0, kMost)); });
    } else if (key == "data_offsets") {
      json.array([&] { offsets.push_back(json.integer(0, kMost)); });
      if (offsets.size() != 2) json.fail("has " + std::to_string(offsets.size()) + " offsets, must have begin and end");
    } else {
      json.fail("no such key; a tensor has dtype, shape and data_offsets");
    }
  });
  if (!format || !has_shape || offsets.empty())
    json.fail(std::string("has no ") + (!format ? "dtype" : !has_shape ? "shape" : "data_offsets"));
  int64_t bytes = format->bytes;
  for (const int64_t side : entry.shape)
    if (__builtin_mul_overflow(bytes, side, &bytes)) json.fail("has a shape of more than 2^63 - 1 bytes");
  const int64_t begin = offsets[0], end = offsets[1];
  if (begin > end || static_cast<uint64_t>(end) > data.size())
    json.fail("has the bytes " + std::to_string(begin) + " to " + std::to_string(end) + " of " +
              std::to_string(data.size()));
  if (end - begin != bytes)
    json.fail("has " + std::to_string(end - begin) + " bytes, its shape and dtype make " + std::to_string(bytes));
  entry.data = data.subspan(static_cast<size_t>(begin), static_cast<size_t>(bytes));
  return entry;
}

// One tensor after the other, from the first byte to the last.
void check_order(const std::vector<SafetensorsEntry>& entries, std::span<const std::byte> data,
                 const std::string& file) {
  std::vector<size_t> order(entries.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto begin = [&](size_t i) { return entries[i].data.data() - data.data(); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(begin(a), entries[a].data.size()) < std::pair(begin(b), entries[b].data.size());
  });
  std::ptrdiff_t next = 0;
  for (const size_t i : order) {
    if (begin(i) != next)
      throw CheckpointError(file + ": tensor " + io::quoted(entries[i].name) + " begins at byte " +
                            std::to_string(begin(i)) + ", must begin where the one before ends, at " +
                            std::to_string(next));
    next += static_cast<std::ptrdiff_t>(entries[i].data.size());
  }
  if (static_cast<size_t>(next) != data.size())
    throw CheckpointError(file + ": the last tensor ends at byte " + std::to_string(next) + " of " +
                          std::to_string(data.size()));
}

}  // namespace

std::optional<DType> dtype_of(std::string_view safetensors_dtype) {
  const Format* format = find_format(safetensors_dtype);
  return format ? format->dtype : std::nullopt;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : name_(path), file_(std::make_shared<const io::MappedFile>(path)) {
  read(file_->bytes());
}

SafetensorsFile::SafetensorsFile(std::span<const std::byte> bytes, std::string name) : name_(std::move(name)) {
  read(bytes);
}

void SafetensorsFile::read(std::span<const std::byte> bytes) {
  if (bytes.size() < kLengthBytes)
    throw CheckpointError(name_ + " has " + std::to_string(bytes.size()) + " bytes, too few for a safetensors file");
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= static_cast<uint64_t>(bytes[i]) << 8 * i;
  if (length > bytes.size() - kLengthBytes || length > kMostHeaderBytes)
    throw CheckpointError(name_ + ": the header is said to have " + std::to_string(length) +
                          " bytes, must be at most " +
                          std::to_string(std::min<uint64_t>(bytes.size() - kLengthBytes, kMostHeaderBytes)));
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  if (!header.starts_with('{')) throw CheckpointError(name_ + " is no safetensors file: its header is no JSON object");
  const auto data = bytes.subspan(kLengthBytes + length);
  io::JsonReader json(header);
  try {
    json.object([&](const std::string& name) {
      if (name == "__metadata__")
        json.object([&](const std::string& key) { metadata_[key] = json.string(); });
      else
        entries_.push_back(read_entry(json, name, data));
    });
    json.end();
  } catch (const io::JsonError& error) {
    throw CheckpointError(name_ + ": header, " + error.what());
  }
  check_order(entries_, data, name_);
  std::sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::lower_bound(entries_.begin(), entries_.end(), name,
                                      [](const auto& entry, std::string_view wanted) { return entry.name < wanted; });
  return found != entries_.end() && found->name == name ? &*found : nullptr;
}

}  // namespace flexdit
