// Linear layers on Intel's tile registers (AMX), in bfloat16 and, in three planes, in float32; see tiles_amx.h.
// Rows of a are packed a piece at a time, then every task makes 32 columns of c, chunk after chunk of k so that b's
// part of a chunk stays near while the piece's rows pass by; meanwhile the next chunk is fetched.
#include "cpu/product.h"

#ifdef __AMX_BF16__
#include "cpu/scratch.h"
#include "cpu/tiles_amx.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kMostRows = 512;           // of a piece
constexpr int64_t kPieceBytes = 1536 << 10;  // of a piece's packed rows, for the second cache
constexpr int64_t kChunkBytes = 72 << 10;    // of a pair's chunk, for the first and the second

Lines lines_of_a(const Operand& a) { return {a.matrix.data, a.matrix.stride, a.rows(), a.cols(), !a.transposed}; }
Lines lines_of_b(const Operand& b) { return {b.matrix.data, b.matrix.stride, b.cols(), b.rows(), b.transposed}; }

inline __m512 gelu(__m512 v) {
  alignas(64) float x[16];
  _mm512_store_ps(x, v);
  for (float& value : x) value *= gelu_gate(value);
  return _mm512_load_ps(x);
}

// A pair's sums -> rows and columns of c.
template <class C, class Bias>
void store_block(const Product& p, int64_t i0, int64_t j0, const float* sums) {
  const int64_t rows = smaller(kPairLines, p.c.rows() - i0), cols = p.c.cols() - j0;
  for (int64_t half = 0; half < 2; ++half) {
    const __mmask16 mask = first_lanes(cols - half * kTileLines);
    const int64_t column = j0 + half * kTileLines;
    if (!mask) return;
    const __m512 bias = p.bias ? load16(row<Bias>(p.bias, 0) + column, mask) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      C* out = row<C>(p.c.matrix, i0 + i) + column;
      __m512 v = _mm512_add_ps(_mm512_load_ps(sums + row_of_sums(i) + half * kSums / 4), bias);
      if (p.accumulate) v = _mm512_add_ps(v, load16(out, mask));
      if (p.gelu) v = gelu(v);
      store16(out, mask, v);
    }
  }
}

// A product cut into pieces of a's rows and, within one, tasks of 32 columns and perhaps a share of the rows.
template <class T>
class Plan {
 public:
  Plan(const Product& p, const char* tiles, int threads)
      : p_(p), a_(lines_of_a(p.a)), b_(lines_of_b(p.b)), tiles_(tiles), threads_(threads) {
    steps_ = pieces(a_.depth, kTileDepth);
    const int64_t fitting = kPieceBytes / larger(pair_bytes(), 1) * kPairLines;
    const int64_t least = (tiles ? 4 : 8) * kPairLines;  // to make reading, or packing, b worth while
    const int64_t most = smaller(larger(fitting, least), kMostRows);
    piece_rows_ = pieces(pieces(larger(a_.count, 1), pieces(larger(a_.count, 1), most)), kPairLines) * kPairLines;
    chunk_ = smaller(kChunkBytes / kStepBytes<T>, larger(steps_, 1));
    columns_ = pieces(b_.count, kPairLines);
    // Where columns alone leave threads idle, tasks share a piece's rows, too.
    const int64_t wanted = pieces(3 * threads, columns_);
    task_rows_ = threads == 1 ? piece_rows_ : larger(piece_rows_ / wanted / kPairLines, 1) * kPairLines;
  }

  int64_t piece_bytes() const { return pieces(smaller(piece_rows_, a_.count), kPairLines) * pair_bytes(); }

  void run(char* packed) const {
#pragma omp parallel num_threads(threads_)
    {
      const TileRegisters registers;
      for (int64_t first = 0; first < a_.count; first += piece_rows_) {
        const int64_t rows = smaller(piece_rows_, a_.count - first);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pieces(rows, kPairLines); ++pair)
          pack_pair<T>(a_, first / kPairLines + pair, 0, steps_, true, packed + pair * pair_bytes());
        const int64_t shares = pieces(rows, task_rows_);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shares * columns_; ++task) {
          const int64_t begin = task % shares * task_rows_;
          column_task(packed + begin / kPairLines * pair_bytes(), first + begin, smaller(task_rows_, rows - begin),
                      task / shares, (task + threads_) / shares);
        }
      }
    }
  }

 private:
  int64_t pair_bytes() const { return steps_ * kStepBytes<T>; }

  // c[first + rows, pair of columns], a's pairs from `packed`. `next`: the pair that this thread likely has next.
  void column_task(const char* packed, int64_t first, int64_t rows, int64_t column, int64_t next) const {
    const int64_t blocks = pieces(rows, kPairLines);
    Scratch& scratch = thread_scratch();
    scratch.reset<char>(chunk_ * kStepBytes<T> + (blocks + 1) * kSums * 4, 3);
    char* own = scratch.take<char>(chunk_ * kStepBytes<T>);
    float *sums = scratch.take<float>(blocks * kSums), *fresh = scratch.take<float>(kSums);
    int64_t step = 0;
    do {
      const int64_t count = smaller(chunk_, steps_ - step);
      const bool last = step + count >= steps_;
      const char* b = tiles_ ? tiles_ + column * pair_bytes() + step * kStepBytes<T> : own;
      if (!tiles_) pack_pair<T>(b_, column, step, count, false, own);
      Ahead ahead;
      if (tiles_ && (!last || next < columns_)) {
        const int64_t coming = smaller(chunk_, last ? steps_ : steps_ - step - count) * kStepBytes<T>;
        ahead = {last ? tiles_ + next * pair_bytes() : b + count * kStepBytes<T>, pieces(coming / 64, blocks * count)};
      }
      for (int64_t block = 0; block < blocks; ++block, ahead.data += ahead.lines * count * 64) {
        float* block_sums = sums + (steps_ > chunk_ ? block * kSums : 0);
        const bool two = rows - block * kPairLines > kTileLines;
        // float32 adds chunk to chunk: one long sum of its six products would lose bits to rounding.
        const bool apart = kPlanes<T> > 1 && step > 0;
        (two ? multiply_pairs<T, true> : multiply_pairs<T, false>)(packed + block * pair_bytes() + step * kStepBytes<T>,
                                                                   b, count, apart ? fresh : block_sums,
                                                                   !apart && step > 0, ahead);
        if (apart)
          for (int64_t i = 0; i < kSums; ++i) block_sums[i] += fresh[i];
        if (last)
          (p_.c.matrix.dtype == DType::float32
               ? store_block<float, T>
               : store_block<bfloat16, T>)(p_, first + block * kPairLines, column * kPairLines, block_sums);
      }
      step += count;
    } while (step < steps_);
  }

  const Product& p_;
  Lines a_, b_;
  const char* tiles_;
  int threads_;
  int64_t steps_, piece_rows_, chunk_, columns_, task_rows_;
};

template <class T>
void multiply_as(const Product& p, const char* tiles, int threads) {
  static thread_local Scratch rows;  // shared by the threads of the product, whose own scratch is taken
  const Plan<T> plan(p, tiles, threads);
  rows.reset<char>(plan.piece_bytes(), 1);
  plan.run(rows.take<char>(plan.piece_bytes()));
}

template <class T>
void pack_as(const Lines& b, char* tiles, int threads) {
  const int64_t steps = pieces(b.depth, kTileDepth);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t pair = 0; pair < pieces(b.count, kPairLines); ++pair)
    pack_pair<T>(b, pair, 0, steps, false, tiles + pair * steps * kStepBytes<T>);
}

}  // namespace

int64_t packed_bytes(const Operand& b) {
  const int64_t step = b.matrix.dtype == DType::bfloat16 ? kStepBytes<bfloat16> : kStepBytes<float>;
  return pieces(b.cols(), kPairLines) * pieces(b.rows(), kTileDepth) * step;
}

void pack(const Operand& b, char* tiles, int threads) {
  (b.matrix.dtype == DType::bfloat16 ? pack_as<bfloat16> : pack_as<float>)(lines_of_b(b), tiles, threads);
}

void multiply(const Product& p, const char* tiles, int threads) {
  (p.a.matrix.dtype == DType::bfloat16 ? multiply_as<bfloat16> : multiply_as<float>)(p, tiles, threads);
}

}  // namespace flexdit::cpu::FLEXDIT_ISA

#else  // a compiler or a system without tiles: has_amx() is false, and nothing calls these

#include <cstdlib>

namespace flexdit::cpu::amx {
int64_t packed_bytes(const Operand&) { std::abort(); }
void pack(const Operand&, char*, int) { std::abort(); }
void multiply(const Product&, const char*, int) { std::abort(); }
}  // namespace flexdit::cpu::amx

#endif
