// Linear layers on Intel's tile registers (AMX), in bfloat16 (tiles_amx.h) and float32 (tiles_float32.h).
// Rows of a are packed a piece at a time, then every task makes a group of columns of c, chunk after chunk of k so that
// b's part of a chunk stays near while the piece's rows pass by; meanwhile the next chunk is fetched.
#include "cpu/product.h"

#ifdef __AMX_BF16__
#include "cpu/scratch.h"
#include "cpu/tiles_float32.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kMostRows = 512;  // of a piece

// How a type is packed and multiplied: in groups of lines, chunks of k, which begin with kHead bytes, and steps. A
// piece's packed rows are for the second cache; under kLeastRows reading b for them would be too dear.
struct Bfloat16Format {
  using Value = bfloat16;
  static constexpr int64_t kGroup = kPairLines, kDepth = kTileDepth, kStep = kStepBytes, kHead = 0;
  static constexpr int64_t kMostSteps = 36;  // 72 KB of b, for the first and the second cache
  static constexpr int64_t kPieceBytes = 1536 << 10, kLeastRows = 128, kBehind = 0;

  static void pack(const Lines& from, int64_t group, int64_t first_step, int64_t steps, bool rows_are_lines,
                   char* out) {
    pack_pair(from, group, first_step, steps, rows_are_lines, out);
  }

  // sums (+)= a b. They are complete kBehind products later, or after finish().
  void multiply(const char* a, const char* b, int64_t steps, int64_t rows, float* sums, bool accumulate, Ahead ahead) {
    (rows > kTileLines ? multiply_pairs<true> : multiply_pairs<false>)(a, b, steps, sums, accumulate, ahead);
  }
  void finish() {}
};

struct Float32Format {
  using Value = float;
  static constexpr int64_t kGroup = kTileLines, kDepth = kDigitDepth, kStep = kDigitStepBytes, kHead = kScaleBytes;
  static constexpr int64_t kMostSteps = 6;  // 18 KB each of a and b, for the first cache
  static constexpr int64_t kPieceBytes = 1024 << 10, kLeastRows = 96, kBehind = 1;

  static void pack(const Lines& from, int64_t group, int64_t first_step, int64_t steps, bool rows_are_lines,
                   char* out) {
    pack_digits(from, group * kGroup, first_step, steps, rows_are_lines, out);
  }
  void multiply(const char* a, const char* b, int64_t steps, int64_t, float* sums, bool accumulate, Ahead ahead) {
    products_.multiply(a, b, steps, sums, accumulate, ahead);
  }
  void finish() { products_.finish(); }

 private:
  DigitProducts products_;
};

// Where the chunks of a packed group are.
template <class Format>
struct Chunks {
  explicit Chunks(int64_t depth)
      : steps(pieces(depth, Format::kDepth)),
        most(pieces(larger(steps, 1), pieces(larger(steps, 1), Format::kMostSteps))) {}

  int64_t count() const { return pieces(larger(steps, 1), most); }
  int64_t steps_of(int64_t chunk) const { return smaller(most, steps - chunk * most); }
  int64_t bytes_of(int64_t chunk) const { return Format::kHead + steps_of(chunk) * Format::kStep; }
  int64_t offset_of(int64_t chunk) const { return chunk * (Format::kHead + most * Format::kStep); }
  int64_t group_bytes() const { return offset_of(count() - 1) + bytes_of(count() - 1); }

  void pack(const Lines& from, int64_t group, int64_t chunk, bool rows_are_lines, char* out) const {
    Format::pack(from, group, chunk * most, steps_of(chunk), rows_are_lines, out);
  }

  int64_t steps, most;
};

Lines lines_of_a(const Operand& a) { return {a.matrix.data, a.matrix.stride, a.rows(), a.cols(), !a.transposed}; }
Lines lines_of_b(const Operand& b) { return {b.matrix.data, b.matrix.stride, b.cols(), b.rows(), b.transposed}; }

inline __m512 gelu(__m512 v) {
  alignas(64) float x[16];
  _mm512_store_ps(x, v);
  for (float& value : x) value *= gelu_gate(value);
  return _mm512_load_ps(x);
}

// A block's sums -> rows and columns of c.
template <class Format, class C>
void store_block(const Product& p, int64_t i0, int64_t j0, const float* sums) {
  const int64_t rows = smaller(Format::kGroup, p.c.rows() - i0), cols = p.c.cols() - j0;
  for (int64_t side = 0; side < Format::kGroup / kTileLines; ++side) {
    const __mmask16 mask = first_lanes(cols - side * kTileLines);
    const int64_t column = j0 + side * kTileLines;
    if (!mask) return;
    const __m512 bias = p.bias ? load16(row<typename Format::Value>(p.bias, 0) + column, mask) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      C* out = row<C>(p.c.matrix, i0 + i) + column;
      __m512 v = _mm512_add_ps(_mm512_load_ps(sums + row_of_sums(i) + side * kSums / 4), bias);
      if (p.accumulate) v = _mm512_add_ps(v, load16(out, mask));
      if (p.gelu) v = gelu(v);
      store16(out, mask, v);
    }
  }
}

// A product cut into pieces of a's rows and, within one, tasks of a group of columns and perhaps a share of the rows.
template <class Format>
class Plan {
 public:
  Plan(const Product& p, const char* tiles, int threads)
      : p_(p), a_(lines_of_a(p.a)), b_(lines_of_b(p.b)), tiles_(tiles), threads_(threads), chunks_(a_.depth) {
    const int64_t fitting = Format::kPieceBytes / larger(chunks_.group_bytes(), 1) * kGroup;
    const int64_t least = tiles ? Format::kLeastRows : 256;  // if b must be packed, more
    const int64_t most = smaller(larger(fitting, least), kMostRows);
    piece_rows_ = pieces(pieces(larger(a_.count, 1), pieces(larger(a_.count, 1), most)), kGroup) * kGroup;
    columns_ = pieces(b_.count, kGroup);
    // Where columns alone leave threads idle, tasks share a piece's rows, too.
    const int64_t wanted = pieces(3 * threads, columns_);
    task_rows_ = threads == 1 ? piece_rows_ : larger(piece_rows_ / wanted / kGroup, 1) * kGroup;
  }

  int64_t piece_bytes() const { return pieces(smaller(piece_rows_, a_.count), kGroup) * chunks_.group_bytes(); }

  void run(char* packed) const {
#pragma omp parallel num_threads(threads_)
    {
      const TileRegisters registers;
      for (int64_t first = 0; first < a_.count; first += piece_rows_) {
        const Piece piece{packed, first, smaller(piece_rows_, a_.count - first)};
#pragma omp for schedule(static)
        for (int64_t group = 0; group < piece.groups(); ++group)
          for (int64_t chunk = 0; chunk < chunks_.count(); ++chunk)
            chunks_.pack(a_, first / kGroup + group, chunk, true, at(piece, group, chunk));
        const int64_t shares = pieces(piece.rows, task_rows_);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shares * columns_; ++task)
          column_task(piece, task % shares * task_rows_, task / shares, (task + threads_) / shares);
      }
    }
  }

 private:
  static constexpr int64_t kGroup = Format::kGroup;

  // Packed rows of a, chunk after chunk and within one group after group, as tasks read them.
  struct Piece {
    char* packed;
    int64_t first, rows;
    int64_t groups() const { return pieces(rows, kGroup); }
  };
  char* at(const Piece& piece, int64_t group, int64_t chunk) const {
    return piece.packed + chunks_.offset_of(chunk) * piece.groups() + chunks_.bytes_of(chunk) * group;
  }

  // What a thread will read of b after a chunk, during `steps` steps. `next`: the columns that it likely has next.
  Ahead after(int64_t column, int64_t chunk, int64_t next, int64_t steps) const {
    const bool last = chunk + 1 == chunks_.count();
    if (!tiles_ || (last && next >= columns_)) return {};
    const int64_t coming = last ? 0 : chunk + 1;
    return {tiles_ + (last ? next : column) * chunks_.group_bytes() + chunks_.offset_of(coming),
            pieces(pieces(chunks_.bytes_of(coming), 64), larger(steps, 1))};
  }

  // c[piece's rows from `begin`, group of columns].
  void column_task(const Piece& piece, int64_t begin, int64_t column, int64_t next) const {
    const int64_t rows = smaller(task_rows_, piece.rows - begin), blocks = pieces(rows, kGroup);
    Scratch& scratch = thread_scratch();
    scratch.reset<char>(chunks_.bytes_of(0) + (blocks + 1) * kBlockSums * 4, 2);
    char* own = scratch.take<char>(chunks_.bytes_of(0));
    float* sums = scratch.take<float>((blocks + 1) * kBlockSums);
    // With a single chunk sums leave soon, and only those of the last blocks are kept.
    const auto sums_of = [&](int64_t block) {
      return sums + (chunks_.count() > 1 ? block : block % (1 + Format::kBehind)) * kBlockSums;
    };
    const auto store = [&](int64_t block) {
      const bool wide = p_.c.matrix.dtype == DType::float32;
      (wide ? store_block<Format, float> : store_block<Format, bfloat16>)(p_, piece.first + begin + block * kGroup,
                                                                          column * kGroup, sums_of(block));
    };
    Format products;
    for (int64_t chunk = 0; chunk < chunks_.count(); ++chunk) {
      const int64_t steps = chunks_.steps_of(chunk);
      const bool last = chunk + 1 == chunks_.count();
      const char* b = tiles_ ? tiles_ + column * chunks_.group_bytes() + chunks_.offset_of(chunk) : own;
      if (!tiles_) chunks_.pack(b_, column, chunk, false, own);
      Ahead ahead = after(column, chunk, next, blocks * steps);
      for (int64_t block = 0; block < blocks; ++block, ahead.data += ahead.lines * steps * 64) {
        products.multiply(at(piece, begin / kGroup + block, chunk), b, steps, rows - block * kGroup, sums_of(block),
                          chunk > 0, ahead);
        if (last && block >= Format::kBehind) store(block - Format::kBehind);
      }
      products.finish();
    }
    for (int64_t block = larger(blocks - Format::kBehind, 0); block < blocks; ++block) store(block);
  }

  static constexpr int64_t kBlockSums = kGroup * kGroup;

  const Product& p_;
  Lines a_, b_;
  const char* tiles_;
  int threads_;
  Chunks<Format> chunks_;
  int64_t piece_rows_, columns_, task_rows_;
};

template <class Format>
void multiply_as(const Product& p, const char* tiles, int threads) {
  static thread_local Scratch rows;  // shared by the threads of the product, whose own scratch is taken
  const Plan<Format> plan(p, tiles, threads);
  rows.reset<char>(plan.piece_bytes(), 1);
  plan.run(rows.take<char>(plan.piece_bytes()));
}

template <class Format>
void pack_as(const Lines& b, char* tiles, int threads) {
  const Chunks<Format> chunks(b.depth);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < pieces(b.count, Format::kGroup); ++group)
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
      chunks.pack(b, group, chunk, false, tiles + group * chunks.group_bytes() + chunks.offset_of(chunk));
}

}  // namespace

int64_t packed_bytes(const Operand& b) {
  return b.matrix.dtype == DType::bfloat16
             ? pieces(b.cols(), Bfloat16Format::kGroup) * Chunks<Bfloat16Format>(b.rows()).group_bytes()
             : pieces(b.cols(), Float32Format::kGroup) * Chunks<Float32Format>(b.rows()).group_bytes();
}

void pack(const Operand& b, char* tiles, int threads) {
  (b.matrix.dtype == DType::bfloat16 ? pack_as<Bfloat16Format> : pack_as<Float32Format>)(lines_of_b(b), tiles, threads);
}

void multiply(const Product& p, const char* tiles, int threads) {
  (p.a.matrix.dtype == DType::bfloat16 ? multiply_as<Bfloat16Format> : multiply_as<Float32Format>)(p, tiles, threads);
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
