// What the tests share: a small random generator, matrices of doubles, and buffers that are poisoned and guarded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flexdit/ops.h"

namespace flexdit::test {

// SplitMix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // In (-1, 1), with the 8 significant bits that every storage type holds: all compute with the same inputs.
  double value() { return std::ldexp(static_cast<double>(128 + below(128)), -8 - static_cast<int>(below(6))) * sign(); }
  double sign() { return below(2) ? 1 : -1; }

 private:
  uint64_t state_;
};

// The message of the ArgumentError that `body` throws, or an empty text.
template <class Body>
std::string argument_error(Body&& body) {
  try {
    body();
  } catch (const ArgumentError& error) {
    return error.what();
  }
  return "";
}

struct Values {
  int64_t rows = 0, cols = 0;
  std::vector<double> v;

  Values() = default;
  Values(int64_t r, int64_t c) : rows(r), cols(c), v(static_cast<size_t>(r * c)) {}
  double& operator()(int64_t i, int64_t j) { return v[static_cast<size_t>(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const { return v[static_cast<size_t>(i * cols + j)]; }
};

inline Values random_values(int64_t rows, int64_t cols, Random& random, double scale = 1) {
  Values out(rows, cols);
  for (double& x : out.v) x = scale * random.value();
  return out;
}

inline double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
// To nearest even; what is too large becomes infinity.
inline uint16_t float16_of(double x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::abs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (units + 1024 * (exponent + 14)));
}

inline double read(const void* p, DType dtype) {
  const auto as = [p](auto value) { return std::memcpy(&value, p, sizeof value), value; };
  if (dtype == DType::float64) return as(double{});
  if (dtype == DType::float32) return as(float{});
  if (dtype == DType::float16) return float16_value(as(uint16_t{}));
  const uint32_t bits = uint32_t{as(uint16_t{})} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void write(void* p, DType dtype, double x) {
  const auto single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  const auto half = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // bfloat16, to nearest even
  if (dtype == DType::float64) std::memcpy(p, &x, 8);
  if (dtype == DType::float32) std::memcpy(p, &single, 4);
  if (dtype == DType::bfloat16) std::memcpy(p, &half, 2);
  if (dtype == DType::float16) {
    const uint16_t other = float16_of(x);
    std::memcpy(p, &other, 2);
  }
}

constexpr unsigned char kPoison = 0xff;  // as bytes of any floating point type: NaN

// A matrix with a guard row before and behind it and, when `strided`, guard columns at both sides. Everything
// starts as NaN; guards_intact() says whether the guards still are.
class Tensor {
 public:
  Tensor(int64_t rows, int64_t cols, DType dtype, bool strided = false)
      : rows_(rows),
        cols_(cols),
        left_(strided ? 3 : 0),
        stride_(strided ? cols + 8 : cols),
        dtype_(dtype),
        bytes_(static_cast<size_t>((rows + 2) * stride_ * size_of(dtype)), kPoison) {}
  Tensor(const Values& values, DType dtype, bool strided = false) : Tensor(values.rows, values.cols, dtype, strided) {
    fill(values);
  }

  // Writes the first rows.
  void fill(const Values& values) {
    for (int64_t i = 0; i < values.rows; ++i)
      for (int64_t j = 0; j < cols_; ++j) write(at(i, j), dtype_, values(i, j));
  }
  Matrix view() { return {at(0, 0), rows_, cols_, stride_, dtype_}; }
  void* data() { return at(0, 0); }
  Values values() {
    Values out(rows_, cols_);
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < cols_; ++j) out(i, j) = read(at(i, j), dtype_);
    return out;
  }
  bool guards_intact() const {
    const int64_t row = stride_ * size_of(dtype_), begin = left_ * size_of(dtype_);
    for (int64_t k = 0; k < static_cast<int64_t>(bytes_.size()); ++k) {
      const bool inside =
          k >= row && k < (rows_ + 1) * row && k % row >= begin && k % row < begin + cols_ * size_of(dtype_);
      if (!inside && bytes_[static_cast<size_t>(k)] != kPoison) return false;
    }
    return true;
  }

 private:
  void* at(int64_t i, int64_t j) { return bytes_.data() + ((i + 1) * stride_ + left_ + j) * size_of(dtype_); }

  int64_t rows_, cols_, left_, stride_;
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// A poisoned buffer of a stated size with canary bytes behind it.
class GuardedBytes {
 public:
  explicit GuardedBytes(int64_t size) : size_(static_cast<size_t>(size)), bytes_(size_ + kCanaries, kPoison) {
    std::memset(bytes_.data() + size_, kCanary, kCanaries);
  }
  void* data() { return bytes_.data(); }
  bool intact() const {
    return std::all_of(bytes_.begin() + static_cast<int64_t>(size_), bytes_.end(),
                       [](unsigned char b) { return b == kCanary; });
  }

 private:
  static constexpr size_t kCanaries = 256;
  static constexpr unsigned char kCanary = 0xa5;
  size_t size_;
  std::vector<unsigned char> bytes_;
};

// max |a - b| / max |b|, at least 1 in the denominator; NaN anywhere in `a` counts as infinity.
inline double error(const Values& a, const Values& b) {
  if (a.v.size() != b.v.size()) return INFINITY;
  double worst = 0, largest = 1;
  for (size_t i = 0; i < a.v.size(); ++i) {
    const double difference = std::abs(a.v[i] - b.v[i]);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    largest = std::max(largest, std::abs(b.v[i]));
  }
  return worst / largest;
}

// Equal to the bit, and no NaN that nobody has overwritten.
inline bool identical(const Values& a, const Values& b) { return a.v.size() == b.v.size() && a.v == b.v; }

inline double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.v.size(); ++i) sum += a.v[i] * b.v[i];
  return sum;
}

inline Values rows_of(const Values& x, int64_t first, int64_t count) {
  Values out(count, x.cols);
  std::copy_n(x.v.begin() + first * x.cols, count * x.cols, out.v.begin());
  return out;
}

// Derivative of loss() along `direction` at x, which is left as it was: central differences of fourth order.
template <class Loss>
double derivative(Values& x, const Values& direction, Loss&& loss, double step = 5e-4) {
  const Values at = x;
  const auto moved = [&](double by) {
    for (size_t i = 0; i < x.v.size(); ++i) x.v[i] = at.v[i] + by * direction.v[i];
    return loss();
  };
  const double near = moved(step) - moved(-step), far = moved(2 * step) - moved(-2 * step);
  x = at;
  return (8 * near - far) / (12 * step);
}

// Directions to test a gradient along: `dense` random ones that reach every entry, then `single` entries alone.
inline std::vector<Values> directions(const Values& x, int dense, int single, Random& random) {
  std::vector<Values> out;
  for (int i = 0; i < dense; ++i) {
    out.push_back(random_values(x.rows, x.cols, random));
    const double length = std::sqrt(dot(out.back(), out.back()));
    for (double& d : out.back().v) d /= length > 0 ? length : 1;
  }
  for (int i = 0; i < single; ++i) {
    out.emplace_back(x.rows, x.cols);
    out.back().v[static_cast<size_t>(random.below(x.rows * x.cols))] = 1;
  }
  return out;
}

}  // namespace flexdit::test
