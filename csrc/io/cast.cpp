#include "io/cast.h"

#include <bit>
#include <cstring>

namespace flexdit::io {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

float widen(float x) { return x; }
double widen(double x) { return x; }
float widen(bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
float widen(float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 1023u;
  if (exponent == 0) {  // mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
}

void narrow(double x, double& to) { to = x; }
void narrow(double x, float& to) { to = static_cast<float>(x); }
void narrow(float x, bfloat16& to) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void narrow(float x, float16& to) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= std::bit_cast<uint32_t>(65520.f)) {  // half way between the largest value and 2^16
    half = 0x7c00;
  } else if (magnitude < std::bit_cast<uint32_t>(0x1p-14f)) {  // 0.5's last bit is 2^-24, the addition rounds to it
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

template <class From, class To>
void cast_values(const void* from, void* to, int64_t count) {
  const auto* bytes = static_cast<const std::byte*>(from);
  To* out = static_cast<To*>(to);
  for (int64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof value), sizeof value);
    // A float64 on its way to 16 bits becomes a float32 in the call.
    if constexpr (sizeof(To) == 2)
      narrow(static_cast<float>(widen(value)), out[i]);
    else
      narrow(static_cast<double>(widen(value)), out[i]);
  }
}

template <class From>
void cast_from(const void* from, void* to, DType to_dtype, int64_t count) {
  if (to_dtype == DType::float32) return cast_values<From, float>(from, to, count);
  if (to_dtype == DType::bfloat16) return cast_values<From, bfloat16>(from, to, count);
  if (to_dtype == DType::float16) return cast_values<From, float16>(from, to, count);
  cast_values<From, double>(from, to, count);
}

}  // namespace

void cast(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count) {
  if (count == 0) return;
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(count * size_of(to_dtype)));
    return;
  }
  if (from_dtype == DType::float32) return cast_from<float>(from, to, to_dtype, count);
  if (from_dtype == DType::bfloat16) return cast_from<bfloat16>(from, to, to_dtype, count);
  if (from_dtype == DType::float16) return cast_from<float16>(from, to, to_dtype, count);
  cast_from<double>(from, to, to_dtype, count);
}

}  // namespace flexdit::io
