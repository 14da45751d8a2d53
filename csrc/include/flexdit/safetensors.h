// A reader of .safetensors files. Nothing in the file is trusted: every length, offset and shape is checked.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "flexdit/tensor.h"

namespace flexdit {

namespace io {
class MappedFile;
}

// A file that is missing or not what it should be; the message names the file, the tensor or field, and what is wrong.
struct CheckpointError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct SafetensorsEntry {
  std::string name;
  std::string dtype;                // as the file names it: "F32", "BF16", "I64", ...
  std::vector<int64_t> shape;       // empty for a scalar
  std::span<const std::byte> data;  // row-major, little-endian, at any alignment
};

// The DType of a safetensors dtype, or nothing if it is not one of the four.
std::optional<DType> dtype_of(std::string_view safetensors_dtype);

class SafetensorsFile {
 public:
  // Maps the file. It may be replaced or deleted meanwhile, but must not be written in place. Throws CheckpointError.
  explicit SafetensorsFile(const std::string& path);
  // The same over bytes of the caller's, which must outlive this; `name` stands for the file in messages.
  SafetensorsFile(std::span<const std::byte> bytes, std::string name);

  std::span<const SafetensorsEntry> entries() const { return entries_; }  // in the order of their names
  const SafetensorsEntry* find(std::string_view name) const;              // null if there is none
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& name() const { return name_; }

 private:
  void read(std::span<const std::byte> bytes);

  std::string name_;
  std::shared_ptr<const io::MappedFile> file_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace flexdit
