// Images as a portable graymap or pixmap, which most viewers open.
#pragma once

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>

namespace picture {

// Equal images [count, channels, height, width] of values from -1 (black) to 1.
struct Images {
  std::span<const float> values;
  int64_t channels = 1, height = 0, width = 0;  // the first three channels are red, green and blue; one or two: gray
};

// All images side by side, `columns` in a row, each pixel `zoom` pixels wide and high.
inline std::string netpbm(const Images& images, int64_t columns, int64_t zoom) {
  if (std::min({images.channels, images.height, images.width, columns, zoom}) < 1)
    throw std::invalid_argument("netpbm: channels, height, width, columns and zoom must be positive");
  const int64_t size = images.channels * images.height * images.width;
  const auto total = static_cast<int64_t>(images.values.size());
  if (total == 0 || total % size != 0)
    throw std::invalid_argument("netpbm: values must hold whole images, at least one");
  const int64_t count = total / size, colors = images.channels >= 3 ? 3 : 1;
  columns = std::min(columns, count);
  const int64_t rows = (count + columns - 1) / columns;
  const int64_t height = rows * images.height * zoom, width = columns * images.width * zoom;
  std::string out = (colors == 3 ? "P6 " : "P5 ") + std::to_string(width) + " " + std::to_string(height) + " 255\n";
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      const int64_t i = y / zoom % images.height, j = x / zoom % images.width;
      const int64_t image = y / zoom / images.height * columns + x / zoom / images.width;
      for (int64_t color = 0; color < colors; ++color) {
        const int64_t at = image * size + (color * images.height + i) * images.width + j;
        const float value = image < count ? images.values[static_cast<size_t>(at)] : -1;
        // NaN is black, too.
        const float clamped = value > -1 ? std::min(value, 1.f) : -1;
        out += static_cast<char>(static_cast<unsigned char>(std::lround((clamped + 1) * 127.5f)));
      }
    }
  return out;
}

// The file appears whole or not at all.
inline void write_whole(const std::string& path, const std::string& bytes) {
  const auto failed = [&](const char* what) {
    throw std::system_error(errno, std::generic_category(), std::string(what) + " " + path);
  };
  std::string temporary = path + ".writing-XXXXXX";
  const int descriptor = mkstemp(temporary.data());
  if (descriptor < 0) failed("cannot create");
  std::FILE* file = fdopen(descriptor, "wb");
  bool good = file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && fchmod(descriptor, 0644) == 0;
  good = file && std::fclose(file) == 0 && good;
  if (good && std::rename(temporary.c_str(), path.c_str()) == 0) return;
  const int error = errno;
  unlink(temporary.c_str());
  errno = error;
  failed("cannot write");
}

}  // namespace picture
