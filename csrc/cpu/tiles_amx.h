// Matrices as Intel's tile registers (AMX) read them, and the product of two blocks of bfloat16. A tile has 16 rows of
// 16 pairs of bfloat16; a product adds 16 x 16 sums over 32 values of k in float32. Only k decides in which order it is
// summed: rows do not depend on their company. float32 goes through tiles of integers, see tiles_float32.h.
#pragma once

#include <immintrin.h>

#include "cpu/isa.h"

namespace flexdit::cpu::FLEXDIT_ISA {

constexpr int64_t kTileLines = 16;  // rows of a, or columns of b, in a tile
constexpr int64_t kTileDepth = 32;  // values of k
constexpr int64_t kTileBytes = 1024;

// Tiles come in pairs, 32 rows of a or columns of b, over all k: a step has a tile of each half.
constexpr int64_t kPairLines = 2 * kTileLines;
constexpr int64_t kStepBytes = 2 * kTileBytes;

constexpr int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Lines (rows of a, columns of b) of values of k: value k of line j is data[j * stride + k] along k, else
// data[k * stride + j].
struct Lines {
  const void* data;
  int64_t stride, count, depth;
  bool along_k;
};

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }

inline __m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

inline __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load16(const bfloat16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }
inline void store16(float* p, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store16(bfloat16* p, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

// Two halves of 16 values.
inline __m512i load_halves(const bfloat16* first, __mmask16 first_mask, const bfloat16* second, __mmask16 second_mask) {
  const __m256i low = _mm256_maskz_loadu_epi16(first_mask, first), high = _mm256_maskz_loadu_epi16(second_mask, second);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// v[i] dword j <-> v[j] dword i.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88),
                  c = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd), d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// The tile of lines [line, line + 16) and values [k, k + 32): its rows are lines for a, pairs of k for b.
inline void pack_tile(const Lines& from, int64_t line, int64_t k, bool rows_are_lines, char* tile) {
  const int64_t lines = from.count - line, depth = from.depth - k;
  __m512i rows[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    if (from.along_k) {
      const bfloat16* values = static_cast<const bfloat16*>(from.data) + (line + i) * from.stride + k;
      const int64_t given = i < lines ? depth : 0;
      rows[i] = load_halves(values, first_lanes(given), values + 16, first_lanes(given - 16));
    } else {
      const bfloat16* values = static_cast<const bfloat16*>(from.data) + (k + 2 * i) * from.stride + line;
      const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      rows[i] = _mm512_permutexvar_epi16(
          interleaved, load_halves(values, first_lanes(2 * i < depth ? lines : 0), values + from.stride,
                                   first_lanes(2 * i + 1 < depth ? lines : 0)));
    }
  }
  if (from.along_k != rows_are_lines) transpose(rows);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, rows[i]);
}

// The pair of lines [32 pair, 32 pair + 32) and `steps` steps of k.
inline void pack_pair(const Lines& from, int64_t pair, int64_t first_step, int64_t steps, bool rows_are_lines,
                      char* out) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t side = 0; side < 2; ++side)
      pack_tile(from, pair * kPairLines + side * kTileLines, (first_step + s) * kTileDepth, rows_are_lines,
                out + s * kStepBytes + side * kTileBytes);
}

// The intrinsics of tiles do not tell the compiler that they read and write memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Tile registers 0 to 3 hold sums, 4 to 7 what is multiplied; all of 16 rows of 64 bytes. For a scope, since
// others in the process may use the registers otherwise.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) uint8_t configuration[64] = {1};  // palette; then 16-bit widths from byte 16, heights from byte 48
    for (int i = 0; i < 8; ++i) configuration[16 + 2 * i] = 64, configuration[48 + i] = 16;
    memory_barrier();
    _tile_loadconfig(configuration);
  }
  ~TileRegisters() { _tile_release(); }
};

constexpr int64_t kSums = kPairLines * kPairLines;
// Where row i of a pair has its first 16 sums; the other 16 are kSums / 4 behind.
constexpr int64_t row_of_sums(int64_t i) { return i / kTileLines * kSums / 2 + i % kTileLines * kTileLines; }

// Cache lines that will be read next, `lines` of them fetched in every step, behind its products.
struct Ahead {
  const char* data = nullptr;
  int64_t lines = 0;

  void fetch_step() {
    for (int64_t line = 0; line < lines; ++line, data += 64) _mm_prefetch(data, _MM_HINT_T1);
  }
};

// sums (+)= a b for a pair of each: 4 tiles of 16 x 16 floats. TWO: more than 16 rows of a are wanted.
template <bool TWO>
inline void multiply_pairs(const char* a, const char* b, int64_t steps, float* sums, bool accumulate,
                           Ahead ahead = {}) {
  constexpr int64_t kTile = kSums / 4;
  memory_barrier();
  if (accumulate) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTile, 64);
    if (TWO) _tile_loadd(2, sums + 2 * kTile, 64);
    if (TWO) _tile_loadd(3, sums + 3 * kTile, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) _tile_zero(2);
    if (TWO) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += kStepBytes, b += kStepBytes) {
    ahead.fetch_step();
    _tile_loadd(4, a, 64);
    if (TWO) _tile_loadd(5, a + kTileBytes, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) _tile_dpbf16ps(2, 5, 6);
    if (TWO) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTile, 64);
  if (TWO) _tile_stored(2, sums + 2 * kTile, 64);
  if (TWO) _tile_stored(3, sums + 3 * kTile, 64);
  memory_barrier();
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
