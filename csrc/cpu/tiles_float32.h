// Products of float32 on tiles of signed bytes: a tile has 16 rows of 64 bytes, a product adds 16 x 16 exact sums over
// 64 values of k.
//
// In a chunk of k a line (a row of a, a column of b) has one scale, the power of two under its largest value. Its
// values become integers of 24 bits, three signed digits of 8 each: x = scale 2^-22 (d1 2^16 + d2 2^8 + d3). The nine
// products of digits have five weights; the smallest, of d3 with d3, is left out, and each of the others has a tile of
// sums. At the chunk's end they are scaled and added in float32. A value's error is thus at most 2^-23 of the largest
// in its line and chunk, for values of like size about what float32's own roundings are. Integers have no order of
// summation: a row depends on k and its own values only.
#pragma once

#include "cpu/tiles_amx.h"

namespace flexdit::cpu::FLEXDIT_ISA {

constexpr int64_t kDigits = 3;
constexpr int64_t kDigitDepth = 64;  // values of k in a step
constexpr int64_t kDigitStepBytes = kDigits * kTileBytes;
constexpr int64_t kScaleBytes = 64;  // in front of a chunk: the scales of its 16 lines
constexpr int64_t kDigitSums = kTileLines * kTileLines;

// As integers magnitudes keep their order, and what is not finite is on top.
inline __m512i magnitudes(__m512 x) { return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)); }

// Exponents (biased by 127) of the scales of 16 lines over `depth` values from k. Those that are not finite get 255,
// whose scale is infinite: no sum with it is finite. Under 2^-105 digits would need factors that float32 has not.
inline __m512i find_exponents(const Lines& from, int64_t line, int64_t k, int64_t depth) {
  const int64_t lines = smaller(from.count - line, kTileLines);
  __m512i most = _mm512_setzero_si512();
  if (from.along_k) {
    alignas(64) uint32_t each[16] = {};
    for (int64_t i = 0; i < lines; ++i) {
      const float* values = static_cast<const float*>(from.data) + (line + i) * from.stride + k;
      __m512i here = _mm512_setzero_si512();
      for (int64_t j = 0; j < depth; j += 16)
        here = _mm512_max_epu32(here, magnitudes(load16(values + j, first_lanes(depth - j))));
      each[i] = _mm512_reduce_max_epu32(here);
    }
    most = _mm512_load_si512(each);
  } else {
    const float* values = static_cast<const float*>(from.data) + k * from.stride + line;
    for (int64_t j = 0; j < depth; ++j)
      most = _mm512_max_epu32(most, magnitudes(load16(values + j * from.stride, first_lanes(lines))));
  }
  // Digits end at 127.5 2^16, a little under 2^23: what is above is carried to the next exponent.
  const __m512i exponents = _mm512_srli_epi32(_mm512_add_epi32(most, _mm512_set1_epi32(0x18000)), 23);
  return _mm512_max_epu32(exponents, _mm512_set1_epi32(22));
}

// Byte FROM of each dword of four vectors, side by side. Any order will do, if it is the same for a and b.
template <int FROM>
inline __m512i gather_bytes(const __m512i (&v)[4]) {
  constexpr int kSelect = 0xca;  // a ? b : c, bit by bit
  const auto at = [](__m512i x, int byte) {
    const int shift = 8 * (byte - FROM);
    return shift > 0 ? _mm512_slli_epi32(x, static_cast<unsigned>(shift))
                     : _mm512_srli_epi32(x, static_cast<unsigned>(-shift));
  };
  const __m512i even = _mm512_set1_epi16(0x00ff), low = _mm512_set1_epi32(0x0000ffff);
  const __m512i first = _mm512_ternarylogic_epi32(even, at(v[0], 0), at(v[1], 1), kSelect),
                second = _mm512_ternarylogic_epi32(even, at(v[2], 2), at(v[3], 3), kSelect);
  return _mm512_ternarylogic_epi32(low, first, second, kSelect);
}

// A chunk, steps [first_step, first_step + steps), of 16 lines. Byte j of dword i of a line is value 16 j + i of a
// step.
inline void pack_digits(const Lines& from, int64_t line, int64_t first_step, int64_t steps, bool rows_are_lines,
                        char* out) {
  const int64_t k = first_step * kDigitDepth, depth = smaller(from.depth - k, steps * kDigitDepth);
  const int64_t lines = from.count - line;
  const __m512i exponents = find_exponents(from, line, k, depth);
  _mm512_store_si512(out, _mm512_slli_epi32(exponents, 23));
  alignas(64) int32_t inverse[16];  // of the scales, times 2^22
  _mm512_store_si512(inverse, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254 + 22), exponents), 23));
  const __m512i halves = _mm512_set1_epi32(0x8080);  // rounds to a digit what is under it
  out += kScaleBytes;
  for (int64_t s = 0; s < steps; ++s, out += kDigitStepBytes) {
    const int64_t first = s * kDigitDepth;
    __m512i rows[kDigits][16];
#pragma GCC unroll 2
    for (int64_t i = 0; i < 16; ++i) {
      const __m512i factor = from.along_k ? _mm512_set1_epi32(inverse[i]) : _mm512_load_si512(inverse);
      __m512i v[4];
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t at = first + 16 * j + (from.along_k ? 0 : i), row = from.along_k ? line + i : k + at;
        const float* values = static_cast<const float*>(from.data) + row * from.stride + (from.along_k ? k + at : line);
        const int64_t given = from.along_k ? (i < lines ? depth - at : 0) : (at < depth ? lines : 0);
        const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(load16(values, first_lanes(given)), (__m512)factor));
        v[j] = _mm512_xor_si512(_mm512_add_epi32(integers, halves), halves);
      }
      rows[0][i] = gather_bytes<2>(v);
      rows[1][i] = gather_bytes<1>(v);
      rows[2][i] = gather_bytes<0>(v);
    }
    for (int64_t d = 0; d < kDigits; ++d) {
      if (from.along_k != rows_are_lines) transpose(rows[d]);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + d * kTileBytes + i * 64, rows[d][i]);
    }
  }
}

// Blocks of 16 x 16 sums, one after the other. A block's integers leave the tiles at its end, and become sums behind
// the products of the next: finish() makes the last ones.
class DigitProducts {
 public:
  // sums (+)= a b over a chunk of each.
  void multiply(const char* a, const char* b, int64_t steps, float* sums, bool accumulate, Ahead ahead) {
    const int64_t rows_a_step = pieces(kTileLines, steps);
    const Block next{reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), sums, accumulate};
    a += kScaleBytes, b += kScaleBytes;
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, a += kDigitStepBytes, b += kDigitStepBytes) {
      ahead.fetch_step();
      multiply_step(a, b);
      add_rows(step * rows_a_step, smaller(rows_a_step, kTileLines - step * rows_a_step));
    }
    _tile_stored(0, integers_, 64);
    _tile_stored(1, integers_ + kDigitSums, 64);
    _tile_stored(2, integers_ + 2 * kDigitSums, 64);
    _tile_stored(3, integers_ + 3 * kDigitSums, 64);
    memory_barrier();
    waiting_ = next;
  }

  void finish() {
    add_rows(0, kTileLines);
    waiting_ = {};
  }

 private:
  struct Block {
    const float *row_scales = nullptr, *column_scales = nullptr;
    float* sums = nullptr;
    bool accumulate = false;
  };

  // Registers 0 to 3 hold the sums by weight, from the largest, 4 and 5 digits of a, 6 and 7 of b. Of all orders with
  // these registers one that loads the fewest tiles, each sum's products apart as far as that goes.
  static void multiply_step(const char* a, const char* b) {
    constexpr int64_t kMiddle = kTileBytes, kLow = 2 * kTileBytes;
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b + kLow, 64);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(5, a + kMiddle, 64);
    _tile_dpbssd(3, 5, 6);
    _tile_loadd(7, b, 64);
    _tile_dpbssd(0, 4, 7);
    _tile_dpbssd(1, 5, 7);
    _tile_loadd(6, b + kMiddle, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(4, a + kLow, 64);
    _tile_dpbssd(3, 4, 6);
    _tile_dpbssd(2, 4, 7);
  }

  // sums (+)= scales of row and column times the weighted integers, for rows of the block that waits.
  void add_rows(int64_t first, int64_t count) const {
    if (!waiting_.sums) return;
    const __m512 column_scales = _mm512_load_ps(waiting_.column_scales);
    for (int64_t i = first; i < first + count; ++i) {
      const auto level = [&](int64_t l) { return _mm512_load_si512(integers_ + l * kDigitSums + i * kTileLines); };
      // Digits weigh 2^-6, 2^-14 and 2^-22 of their scale.
      const __m512i low = _mm512_add_epi32(level(2), _mm512_srai_epi32(level(3), 8));
      __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(0x1p-28f));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(level(1)), _mm512_set1_ps(0x1p-20f), sum);
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(level(0)), _mm512_set1_ps(0x1p-12f), sum);
      float* out = waiting_.sums + i * kTileLines;
      const __m512 before = waiting_.accumulate ? _mm512_load_ps(out) : _mm512_setzero_ps();
      const __m512 row_scale = _mm512_set1_ps(waiting_.row_scales[i]);
      _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_mul_ps(sum, column_scales), row_scale, before));
    }
  }

  alignas(64) int32_t integers_[4 * kDigitSums];
  Block waiting_;
};

}  // namespace flexdit::cpu::FLEXDIT_ISA
