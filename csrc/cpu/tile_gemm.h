// A small matrix product on one thread, for attention and for float64: C (+)= A B with a register tile of MR rows
// by NV vectors. A may be read along any strides, so a transposed A costs nothing; B and C are row-major, padded
// to whole vectors. The sum over k of an element runs in order, whatever the tile: results do not depend on shapes.
#pragma once

#include "cpu/isa.h"

namespace flexdit::cpu::FLEXDIT_ISA {

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(FLEXDIT_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
constexpr int64_t kLanes = FLEXDIT_VECTOR_BYTES / static_cast<int64_t>(sizeof(A));
// AVX-512 has 32 vector registers, the others 16: accumulators, NV of B and one broadcast of A must fit.
constexpr int kTileRows = FLEXDIT_VECTOR_BYTES == 64 ? 6 : 4;
constexpr int kTileVectors = FLEXDIT_VECTOR_BYTES == 64 ? 4 : 2;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class A>
struct Product {
  int64_t m, n, k;  // n is rounded up to whole vectors
  const A* a;
  int64_t a_row, a_k;  // A(i, l) = a[i * a_row + l * a_k]
  const A* b;
  int64_t ldb;
  A* c;
  int64_t ldc;
  bool accumulate = false;
};

template <class A, int MR, int NV>
inline void tile(const Product<A>& p, int64_t i, int64_t j) {
  using V = typename VectorOf<A>::type;
  V sum[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      sum[r][v] = p.accumulate ? *reinterpret_cast<const V*>(p.c + (i + r) * p.ldc + j + v * kLanes<A>) : V{};
  const A* a = p.a + i * p.a_row;
  const A* b = p.b + j;
  for (int64_t l = 0; l < p.k; ++l, a += p.a_k, b += p.ldb) {
    V bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = *reinterpret_cast<const V*>(b + v * kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const A value = a[r * p.a_row];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] += value * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) *reinterpret_cast<V*>(p.c + (i + r) * p.ldc + j + v * kLanes<A>) = sum[r][v];
}

template <class A, int NV>
inline void tile_column(const Product<A>& p, int64_t j) {
  int64_t i = 0;
  for (; i + kTileRows <= p.m; i += kTileRows) tile<A, kTileRows, NV>(p, i, j);
  for (; i < p.m; ++i) tile<A, 1, NV>(p, i, j);
}

template <class A>
inline void multiply(const Product<A>& p) {
  constexpr int64_t kWide = kTileVectors * kLanes<A>;
  int64_t j = 0;
  for (; j + kWide <= round_up(p.n, kLanes<A>); j += kWide) tile_column<A, kTileVectors>(p, j);
  for (; j < p.n; j += kLanes<A>) tile_column<A, 1>(p, j);
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
