// libFuzzer target: any bytes are a safetensors file that is read to its last byte, or a CheckpointError.
#include <cstdlib>
#include <numeric>

#include "files.h"
#include "io/cast.h"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

volatile unsigned checksum = 0;  // keeps the reading of every byte

void read(const std::string& text) {
  using namespace flexdit;
  const test::ExactBytes bytes(text);
  try {
    const SafetensorsFile file(bytes.view(), "fuzz");
    size_t total = 0;
    for (const SafetensorsEntry& entry : file.entries()) {
      require(file.find(entry.name) == &entry);
      total += entry.data.size();
      for (const std::byte byte : entry.data) checksum = checksum + static_cast<unsigned>(byte);
      const auto dtype = dtype_of(entry.dtype);
      if (!dtype) continue;
      const int64_t count = std::accumulate(entry.shape.begin(), entry.shape.end(), int64_t{1}, std::multiplies());
      require(count * size_of(*dtype) == static_cast<int64_t>(entry.data.size()));
      std::vector<double> values(static_cast<size_t>(count));
      io::cast(entry.data.data(), *dtype, values.data(), DType::float64, count);
    }
    uint64_t header;
    std::memcpy(&header, text.data(), sizeof header);
    require(sizeof header + header + total == text.size());
  } catch (const CheckpointError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  read(text);
  // The same as a header of the right length, which mutations hardly ever keep.
  read(flexdit::test::safetensors_bytes(text, std::string(16, '\1')));
  return 0;
}
