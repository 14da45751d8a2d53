// Linear layers on Intel's tile registers (AMX), in bfloat16 and, in three planes, in float32; see tiles_amx.h.
// Rows of a are packed a piece at a time, then every task makes two panels (32 columns) of c, chunk after chunk of k so
// that b's part of a chunk stays in the first cache while the piece's rows pass by.
#include "cpu/product.h"

#ifdef __AMX_BF16__
#include "cpu/scratch.h"
#include "cpu/tiles_amx.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kBlock = 2 * kTileRows;   // rows and columns that four tiles of sums cover
constexpr int64_t kSums = kBlock * kBlock;  // floats
constexpr int64_t kMostRows = 512;          // of a piece
constexpr int64_t kPieceBytes = 2 << 20;    // of a piece's packed rows, for the second cache
constexpr int64_t kChunkBytes = 72 << 10;   // of two panels' chunk, for the first and the second

Lines lines_of_a(const Operand& a) { return {a.matrix.data, a.matrix.stride, a.rows(), a.cols(), !a.transposed}; }
Lines lines_of_b(const Operand& b) { return {b.matrix.data, b.matrix.stride, b.cols(), b.rows(), b.transposed}; }

template <class T>
void pack_panel(const Lines& from, int64_t panel, int64_t first_step, int64_t steps, bool rows_are_lines, char* out) {
  for (int64_t s = 0; s < steps; ++s)
    pack_tiles<T>(from, panel * kTileRows, (first_step + s) * kTileDepth, rows_are_lines, out + s * kStepBytes<T>);
}

inline __m512 gelu(__m512 v) {
  alignas(64) float x[16];
  _mm512_store_ps(x, v);
  for (float& value : x) value *= gelu_gate(value);
  return _mm512_load_ps(x);
}

// Four tiles of sums -> rows and columns of c.
template <class C, class Bias>
void store_block(const Product& p, int64_t i0, int64_t j0, const float* sums) {
  const int64_t rows = smaller(kBlock, p.c.rows() - i0), cols = p.c.cols() - j0;
  for (int64_t half = 0; half < 2; ++half) {
    const __mmask16 mask = first_lanes(cols - half * kTileRows);
    const int64_t column = j0 + half * kTileRows;
    if (!mask) return;
    const __m512 bias = p.bias ? load16(row<Bias>(p.bias, 0) + column, mask) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t tile = i / kTileRows * 2 + half;
      C* out = row<C>(p.c.matrix, i0 + i) + column;
      __m512 v = _mm512_add_ps(_mm512_load_ps(sums + tile * kSums / 4 + i % kTileRows * kTileRows), bias);
      if (p.accumulate) v = _mm512_add_ps(v, load16(out, mask));
      if (p.gelu) v = gelu(v);
      store16(out, mask, v);
    }
  }
}

// A product cut into pieces of a's rows and, within one, tasks of 32 columns.
template <class T>
class Plan {
 public:
  Plan(const Product& p, const char* tiles, int threads)
      : p_(p), a_(lines_of_a(p.a)), b_(lines_of_b(p.b)), tiles_(tiles), steps_(pieces(a_.depth, kTileDepth)) {
    const int64_t fitting = kPieceBytes / larger(steps_ * kStepBytes<T>, 1) * kTileRows / kBlock * kBlock;
    const int64_t least = (tiles ? 4 : 8) * kBlock;  // to make reading, or packing, b worth while
    piece_rows_ = smaller(larger(fitting, least), kMostRows);
    chunk_ = smaller(larger(kChunkBytes / (2 * kStepBytes<T>), 1), larger(steps_, 1));
    columns_ = pieces(b_.count, kBlock);
    // Where columns alone leave threads idle, tasks share a piece's rows, too.
    const int64_t wanted = pieces(3 * threads, columns_);
    task_rows_ = threads == 1 ? piece_rows_ : larger(piece_rows_ / wanted / kBlock, 1) * kBlock;
  }

  int64_t piece_bytes() const { return pieces(smaller(piece_rows_, a_.count), kTileRows) * panel_bytes(); }
  int64_t panel_bytes() const { return steps_ * kStepBytes<T>; }

  void run(char* packed, int threads) const {
#pragma omp parallel num_threads(threads)
    {
      const TileRegisters registers;
      for (int64_t first = 0; first < a_.count; first += piece_rows_) {
        const int64_t rows = smaller(piece_rows_, a_.count - first);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < pieces(rows, kTileRows); ++panel)
          pack_panel<T>(a_, first / kTileRows + panel, 0, steps_, true, packed + panel * panel_bytes());
        const int64_t shares = pieces(rows, task_rows_);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shares * columns_; ++task) {
          const int64_t begin = task % shares * task_rows_;
          column_task(packed + begin / kTileRows * panel_bytes(), first + begin, smaller(task_rows_, rows - begin),
                      task / shares * kBlock);
        }
      }
    }
  }

 private:
  // c[first + rows, 32 columns from `column`], a's panels from `packed`.
  void column_task(const char* packed, int64_t first, int64_t rows, int64_t column) const {
    const int64_t blocks = pieces(rows, kBlock);
    const bool two_b = b_.count - column > kTileRows;
    Scratch& scratch = thread_scratch();
    scratch.reset<char>(2 * chunk_ * kStepBytes<T> + blocks * kSums * 4, 2);
    char* own = scratch.take<char>(2 * chunk_ * kStepBytes<T>);
    float* sums = scratch.take<float>(blocks * kSums);
    int64_t step = 0;
    do {
      const int64_t count = smaller(chunk_, steps_ - step);
      const char *b0 = own, *b1 = own + count * kStepBytes<T>;
      if (tiles_) {
        b0 = tiles_ + column / kTileRows * panel_bytes() + step * kStepBytes<T>;
        b1 = b0 + panel_bytes();
      } else {
        for (int64_t i = 0; i < (two_b ? 2 : 1); ++i)
          pack_panel<T>(b_, column / kTileRows + i, step, count, false, own + i * count * kStepBytes<T>);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const char* a0 = packed + 2 * block * panel_bytes() + step * kStepBytes<T>;
        const bool two_a = rows - block * kBlock > kTileRows;
        float* block_sums = sums + (steps_ > chunk_ ? block * kSums : 0);
        const auto multiply = two_a ? (two_b ? multiply_panels<T, true, true> : multiply_panels<T, true, false>)
                                    : (two_b ? multiply_panels<T, false, true> : multiply_panels<T, false, false>);
        multiply(a0, a0 + panel_bytes(), b0, b1, count, block_sums, step > 0);
        if (step + count >= steps_)
          (p_.c.matrix.dtype == DType::float32
               ? store_block<float, T>
               : store_block<bfloat16, T>)(p_, first + block * kBlock, column, block_sums);
      }
      step += count;
    } while (step < steps_);
  }

  const Product& p_;
  Lines a_, b_;
  const char* tiles_;
  int64_t steps_, piece_rows_, chunk_, columns_, task_rows_;
};

template <class T>
void multiply_as(const Product& p, const char* tiles, int threads) {
  static thread_local Scratch rows;  // shared by the threads of the product, whose own scratch is taken
  const Plan<T> plan(p, tiles, threads);
  rows.reset<char>(plan.piece_bytes(), 1);
  plan.run(rows.take<char>(plan.piece_bytes()), threads);
}

template <class T>
void pack_as(const Lines& b, char* tiles, int threads) {
  const int64_t steps = pieces(b.depth, kTileDepth);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t panel = 0; panel < pieces(b.count, kTileRows); ++panel)
    pack_panel<T>(b, panel, 0, steps, false, tiles + panel * steps * kStepBytes<T>);
}

}  // namespace

int64_t packed_bytes(const Operand& b) {
  const int64_t step = b.matrix.dtype == DType::bfloat16 ? kStepBytes<bfloat16> : kStepBytes<float>;
  return pieces(b.cols(), kTileRows) * pieces(b.rows(), kTileDepth) * step;
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
