// A file's bytes, mapped read-only into memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "flexdit/safetensors.h"

namespace flexdit::io {

struct MissingFile : CheckpointError {
  using CheckpointError::CheckpointError;
};

class MappedFile {
 public:
  // Throws CheckpointError naming the file, MissingFile if there is none.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace flexdit::io
