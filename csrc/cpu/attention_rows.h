// Which rows attend to one another, and the tasks of attention's forward and backward.
#pragma once

#include "cpu/isa.h"
#include "flexdit/ops.h"

namespace flexdit::cpu::FLEXDIT_ISA {

// Packed rows that attend to one another: a sample's, or those of one position in its frames.
struct Rows {
  int64_t begin, count, step = 1;
  int64_t operator[](int64_t i) const { return begin + i * step; }
};

// One head of them: columns [column, column + d) of a matrix.
template <class T>
struct Head {
  const Matrix& matrix;
  Rows rows;
  int64_t column;
  T* operator[](int64_t i) const { return row<T>(matrix, rows[i]) + column; }
};

// How many of them a sample has, and which.
inline int64_t sequences(const Attention& p, int64_t b) {
  const Grid& grid = p.layout_q.grid(b);
  return p.across_frames ? int64_t{grid.height} * grid.width : 1;
}
inline Rows sequence(const TokenLayout& layout, bool across_frames, int64_t b, int64_t i) {
  const int64_t begin = layout.offset(b);
  if (!across_frames) return {begin, layout.grid(b).tokens()};
  const Grid& grid = layout.grid(b);
  return {begin + i, grid.frames, int64_t{grid.height} * grid.width};
}

// Calls body(sample, sequence, head, share) for every head of all of them, and each share of its work.
template <class Body>
void for_heads(const Attention& p, int threads, int64_t shares, const Body& body) {
  int64_t most = 0;
  for (int64_t b = 0; b < p.layout_q.batch; ++b) most = larger(most, sequences(p, b));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < p.layout_q.batch * most * p.num_heads * shares; ++task) {
    const int64_t share = task % shares, h = task / shares % p.num_heads, i = task / (shares * p.num_heads) % most,
                  b = task / (shares * p.num_heads * most);
    if (i < sequences(p, b)) body(b, i, h, share);
  }
}

// Calls body(q, k, v, head's columns, first query, last, head) for every head and each stretch of its queries.
template <class T, class Body>
void for_stretches(const Attention& p, int threads, int64_t stretch, const Body& body) {
  const int64_t d = p.q.cols / p.num_heads;
  int64_t stretches = 1;
  for (int64_t b = 0; b < p.layout_q.batch; ++b)
    stretches = larger(stretches, (sequence(p.layout_q, p.across_frames, b, 0).count - 1) / stretch + 1);
  for_heads(p, threads, stretches, [&](int64_t b, int64_t i, int64_t h, int64_t share) {
    const Rows q = sequence(p.layout_q, p.across_frames, b, i), k = sequence(p.layout_k, p.across_frames, b, i);
    const int64_t first = share * stretch, last = smaller(first + stretch, q.count);
    if (first < last) body(Head<T>{p.q, q, h * d}, Head<T>{p.k, k, h * d}, Head<T>{p.v, k, h * d}, d, first, last, h);
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
