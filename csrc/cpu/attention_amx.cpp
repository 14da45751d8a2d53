// Attention's forward in bfloat16 on Intel's tile registers (AMX); see tiles_amx.h. As attention_cpu.cpp it runs an
// online softmax over blocks of keys, 32 queries at a time. Scores stay in tiles: a row of 16 is one vector, and two of
// them become one row of the tile of probabilities that multiplies v.
// float32 stays with AVX-512: in three planes of bfloat16 it was a fifth faster, and lost two bits of its scores.
#include "cpu/kernels.h"

#ifdef __AMX_BF16__
#include "cpu/attention_rows.h"
#include "cpu/scratch.h"
#include "cpu/tiles_amx.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kKeys = 256;     // of a block
constexpr int64_t kStretch = 256;  // queries of a task
constexpr float kNone = -1e30f;    // an exponent before the first key
constexpr float kLogOfTwo = 0.69314718f;

// 2^x for x <= 0, to about 1e-7 relative: x = n + r, the series of e^(r ln 2).
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // in this order a NaN stays
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  constexpr float kSeries[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f};
  __m512 power = _mm512_set1_ps(1.5403530e-4f);
#pragma GCC unroll 6
  for (float factor : kSeries) power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(power, n);
}

// Rows of a head in memory, as lines along their columns or across.
Lines lines(const Head<bfloat16>& head, int64_t first, int64_t count, int64_t d, bool along_k) {
  const int64_t stride = head.matrix.stride * head.rows.step;
  return {head[first], stride, along_k ? count : d, along_k ? d : count, along_k};
}

void pack(const Lines& from, bool rows_are_lines, int64_t pairs, int64_t steps, char* out) {
  for (int64_t pair = 0; pair < pairs; ++pair)
    pack_pair(from, pair, 0, steps, rows_are_lines, out + pair * steps * kStepBytes);
}

// Up to 32 rows of a by pairs of b's columns, all of `steps` steps: sums (+)= a b, pair after pair.
void multiply(const char* a, int64_t rows, const char* b, int64_t pairs, int64_t steps, float* sums, bool accumulate) {
  for (int64_t j = 0; j < pairs; ++j)
    (rows > kTileLines ? multiply_pairs<true> : multiply_pairs<false>)(a, b + j * steps * kStepBytes, steps,
                                                                       sums + j * kSums, accumulate, {});
}

// What the online softmax keeps of each query, and the factor that makes scores exponents of two.
struct Softmax {
  float *maximum, *sum;
  float scale;
};

// A row's exponents of two in `step`, less `shift`; keys that are not there get kNone.
struct ScoreRow {
  const float* scores;
  int64_t keys;

  template <bool ALL>
  void read(int64_t step, __m512 scale, __m512 shift, __m512* half) const {
    for (int64_t side = 0; side < 2; ++side) {
      const __m512 exponents = _mm512_fmsub_ps(scale, _mm512_load_ps(scores + step * kSums + side * kSums / 4), shift);
      const __mmask16 mask = ALL ? 0xffff : first_lanes(keys - step * kTileDepth - side * kTileLines);
      half[side] = ALL ? exponents : _mm512_mask_blend_ps(mask, _mm512_set1_ps(kNone), exponents);
    }
  }
};

// Scores of 32-column pairs -> unnormalised probabilities, packed as the left operand. `rescale`: of earlier sums.
void softmax_rows(const float* scores, int64_t rows, int64_t keys, const Softmax& state, char* probabilities,
                  float* rescale) {
  const int64_t steps = pieces(keys, kTileDepth), whole = keys / kTileDepth;
  const __m512 scale = _mm512_set1_ps(state.scale);
  for (int64_t i = 0; i < rows; ++i) {
    const ScoreRow row{scores + row_of_sums(i), keys};
    __m512 most = _mm512_set1_ps(kNone), half[2];
    const auto raise = [&] { most = _mm512_max_ps(most, _mm512_max_ps(half[0], half[1])); };
    for (int64_t step = 0; step < whole; ++step) row.read<true>(step, scale, _mm512_setzero_ps(), half), raise();
    if (whole < steps) row.read<false>(whole, scale, _mm512_setzero_ps(), half), raise();
    const float here = _mm512_reduce_max_ps(most), maximum = here > state.maximum[i] ? here : state.maximum[i];
    const __m512 shift = _mm512_set1_ps(maximum);
    __m512 total = _mm512_setzero_ps();
    char* out = probabilities + i / kTileLines * kTileBytes + i % kTileLines * 64;
    const auto put = [&](int64_t step) {
      const __m512 low = power_of_two(half[0]), high = power_of_two(half[1]);
      total = _mm512_add_ps(total, _mm512_add_ps(low, high));
      _mm512_store_si512(out + step * kStepBytes, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    };
    for (int64_t step = 0; step < whole; ++step) row.read<true>(step, scale, shift, half), put(step);
    if (whole < steps) row.read<false>(whole, scale, shift, half), put(whole);
    rescale[i] = exponential((state.maximum[i] - maximum) * kLogOfTwo);
    state.sum[i] = state.sum[i] * rescale[i] + _mm512_reduce_add_ps(total);
    state.maximum[i] = maximum;
  }
}

// A block's sums of out, after a maximum has grown.
void rescale_rows(const float* factors, int64_t rows, int64_t tile_pairs, float* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t tile = 0; tile < 2 * tile_pairs; ++tile) {
      float* row = sums + tile / 2 * kSums + tile % 2 * kSums / 4 + row_of_sums(i);
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_set1_ps(factors[i]), _mm512_load_ps(row)));
    }
}

struct Task {
  const Head<bfloat16>&q, &k, &v;
  int64_t d, first, last, head;  // columns of the head, queries, number of the head
};

void forward_task(const Attention& p, const Task& t) {
  const int64_t queries = t.last - t.first, blocks = pieces(queries, kPairLines), depth = pieces(t.d, kTileDepth);
  const int64_t most_pairs = pieces(smaller(t.k.rows.count, kKeys), kPairLines), pair = depth * kStepBytes;
  Scratch& scratch = thread_scratch();
  scratch.reset<char>((blocks + 2 * most_pairs) * pair + most_pairs * kStepBytes +
                          ((most_pairs + blocks * depth) * kSums + 2 * queries + kPairLines) * 4,
                      9);
  char *qb = scratch.take<char>(blocks * pair), *kb = scratch.take<char>(most_pairs * pair),
       *vb = scratch.take<char>(most_pairs * pair), *chances = scratch.take<char>(most_pairs * kStepBytes);
  float *scores = scratch.take<float>(most_pairs * kSums), *sums = scratch.take<float>(blocks * depth * kSums),
        *maximum = scratch.take<float>(queries), *total = scratch.take<float>(queries),
        *rescale = scratch.take<float>(kPairLines);
  const float scale = 1 / (std::sqrt(float(t.d)) * kLogOfTwo);
  const TileRegisters registers;
  pack(lines(t.q, t.first, queries, t.d, true), true, blocks, depth, qb);
  for (int64_t i = 0; i < queries; ++i) maximum[i] = kNone, total[i] = 0;
  for (int64_t j0 = 0; j0 < t.k.rows.count; j0 += kKeys) {
    const int64_t keys = smaller(kKeys, t.k.rows.count - j0), pairs = pieces(keys, kPairLines);
    pack(lines(t.k, j0, keys, t.d, true), false, pairs, depth, kb);
    pack(lines(t.v, j0, keys, t.d, false), false, depth, pairs, vb);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i0 = block * kPairLines, rows = smaller(kPairLines, queries - i0);
      float* block_sums = sums + block * depth * kSums;
      multiply(qb + block * pair, rows, kb, pairs, depth, scores, false);
      softmax_rows(scores, rows, keys, {maximum + i0, total + i0, scale}, chances, rescale);
      if (j0 > 0) rescale_rows(rescale, rows, depth, block_sums);
      multiply(chances, rows, vb, depth, pairs, block_sums, j0 > 0);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    bfloat16* out = row<bfloat16>(p.out, t.q.rows[t.first + i]) + t.q.column;
    const __m512 inverse = _mm512_set1_ps(1 / total[i]);
    const float* from = sums + i / kPairLines * depth * kSums + row_of_sums(i % kPairLines);
    for (int64_t c = 0; c < t.d; c += kTileLines)
      store16(out + c, first_lanes(t.d - c),
              _mm512_mul_ps(inverse, _mm512_load_ps(from + c / kPairLines * kSums + c / kTileLines % 2 * kSums / 4)));
    if (p.lse) row<float>(p.lse, t.q.rows[t.first + i])[t.head] = maximum[i] * kLogOfTwo + std::log(total[i]);
  }
}

}  // namespace

void attention(const Attention& p, int threads) {
  for_stretches<bfloat16>(p, threads, kStretch,
                          [&](const Head<bfloat16>& q, const Head<bfloat16>& k, const Head<bfloat16>& v, auto... rest) {
                            forward_task(p, {q, k, v, rest...});
                          });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
#endif
