// Attention within samples, an online softmax over blocks of keys; backward recomputes the probabilities.
// A task is one head of one sequence (forward: and a stretch of its queries), so no two threads write the same row.
#include <algorithm>

#include "cpu/attention_rows.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/tile_gemm.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

constexpr int64_t kQueryBlock = 48;
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kQueryStretch = 240;  // queries of a forward task

// out[i][c] = factor * head[first + i][c], rows of ld values, the padding behind column d set to zero.
template <class T, class A = Acc<T>>
void unpack(const Head<T>& head, int64_t first, int64_t count, int64_t d, A factor, A* out, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = head[first + i];
    A* to = out + i * ld;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) to[c] = factor * load(from, c);
    for (int64_t c = d; c < ld; ++c) to[c] = 0;
  }
}

// out[c][i] = head[first + i][c], rows of ld >= count values, the padding set to zero.
template <class T, class A = Acc<T>>
void unpack_transposed(const Head<T>& head, int64_t first, int64_t count, int64_t d, A* out, int64_t ld) {
  constexpr int64_t kStep = 16;  // reads of 16 rows share their cache lines
  for (int64_t c = 0; c < d; ++c)
    for (int64_t i = count; i < ld; ++i) out[c * ld + i] = 0;
  for (int64_t c0 = 0; c0 < d; c0 += kStep)
    for (int64_t i = 0; i < count; ++i) {
      const T* from = head[first + i];
      for (int64_t c = c0; c < smaller(c0 + kStep, d); ++c) out[c * ld + i] = load(from, c);
    }
}

// Rows of scores become unnormalised probabilities; the running maximum, sum and output of each row follow.
template <class A>
void online_softmax(A* scores, int64_t rows, int64_t keys, int64_t ld, A* maximum, A* sum, A* out, int64_t dp) {
  for (int64_t i = 0; i < rows; ++i) {
    A* s = scores + i * ld;
    A largest = maximum[i];
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < keys; ++j) largest = s[j] > largest ? s[j] : largest;
    const A rescale = exponential(maximum[i] - largest);
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < keys; ++j) {
      s[j] = exponential(s[j] - largest);
      total += s[j];
    }
    sum[i] = sum[i] * rescale + total;
    maximum[i] = largest;
    if (rescale != A(1))
      for (int64_t c = 0; c < dp; ++c) out[i * dp + c] *= rescale;
  }
}

// Keys outside, so that a block of them is packed once; the running maximum, sum and output of all queries wait inside.
template <class T>
void forward_task(const Attention& p, const Head<T>& q, const Head<T>& k, const Head<T>& v, int64_t d, int64_t first,
                  int64_t last, int64_t head_index) {
  using A = Acc<T>;
  const int64_t dp = round_up(d, kLanes<A>), keys = smaller(k.rows.count, kKeyBlock), ld = round_up(keys, kLanes<A>);
  const int64_t queries = last - first;
  Scratch& scratch = thread_scratch();
  scratch.reset<A>(d * ld + keys * dp + kQueryBlock * ld + queries * (d + dp + 2), 7);
  A *kt = scratch.take<A>(d * ld), *vb = scratch.take<A>(keys * dp), *s = scratch.take<A>(kQueryBlock * ld),
    *qb = scratch.take<A>(queries * d), *o = scratch.take<A>(queries * dp), *maximum = scratch.take<A>(queries),
    *sum = scratch.take<A>(queries);
  unpack<T>(q, first, queries, d, 1 / std::sqrt(A(d)), qb, d);
  for (int64_t i = 0; i < queries; ++i) maximum[i] = A(-1e30), sum[i] = 0;
  for (int64_t i = 0; i < queries * dp; ++i) o[i] = 0;
  for (int64_t j0 = 0; j0 < k.rows.count; j0 += kKeyBlock) {
    const int64_t count = smaller(kKeyBlock, k.rows.count - j0);
    unpack_transposed<T>(k, j0, count, d, kt, ld);
    unpack<T>(v, j0, count, d, A(1), vb, dp);
    for (int64_t i = 0; i < queries; i += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, queries - i);
      multiply<A>({.m = rows,
                   .n = count,
                   .k = d,
                   .a = qb + i * d,
                   .a_row = d,
                   .a_k = 1,
                   .b = kt,
                   .ldb = ld,
                   .c = s,
                   .ldc = ld});
      online_softmax(s, rows, count, ld, maximum + i, sum + i, o + i * dp, dp);
      multiply<A>({.m = rows,
                   .n = d,
                   .k = count,
                   .a = s,
                   .a_row = ld,
                   .a_k = 1,
                   .b = vb,
                   .ldb = dp,
                   .c = o + i * dp,
                   .ldc = dp,
                   .accumulate = true});
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    T* out = row<T>(p.out, q.rows[first + i]) + q.column;
    const A inverse = 1 / sum[i];
    for (int64_t c = 0; c < d; ++c) store(out, c, o[i * dp + c] * inverse);
    if (p.lse) row<A>(p.lse, q.rows[first + i])[head_index] = maximum[i] + std::log(sum[i]);
  }
}

// Source of the formulas: FlashAttention-2, arXiv 2307.08691, algorithm 2.
template <class T>
void backward_task(const AttentionBackward& p, const Head<T>& q, const Head<T>& k, const Head<T>& v, int64_t d,
                   int64_t head_index) {
  using A = Acc<T>;
  const int64_t dp = round_up(d, kLanes<A>), keys = smaller(k.rows.count, kKeyBlock), ld = round_up(keys, kLanes<A>);
  const A scale = 1 / std::sqrt(A(d));
  const Head<T> out{p.out, q.rows, q.column}, grad_out{p.grad_out, q.rows, q.column},
      grad_q{p.grad_q, q.rows, q.column}, grad_k{p.grad_k, k.rows, k.column}, grad_v{p.grad_v, k.rows, k.column};
  Scratch& scratch = thread_scratch();
  scratch.reset<A>(2 * d * ld + 3 * keys * dp + kQueryBlock * (2 * dp + 2 * ld) + q.rows.count * (dp + 1), 11);
  A *kt = scratch.take<A>(d * ld), *vt = scratch.take<A>(d * ld), *kb = scratch.take<A>(keys * dp),
    *dk = scratch.take<A>(keys * dp), *dv = scratch.take<A>(keys * dp), *qb = scratch.take<A>(kQueryBlock * dp),
    *dob = scratch.take<A>(kQueryBlock * dp), *s = scratch.take<A>(kQueryBlock * ld),
    *ds = scratch.take<A>(kQueryBlock * ld), *dq = scratch.take<A>(q.rows.count * dp),
    *delta = scratch.take<A>(q.rows.count);
  for (int64_t i = 0; i < q.rows.count * dp; ++i) dq[i] = 0;
  for (int64_t i = 0; i < q.rows.count; ++i) {
    A dot = 0;
    for (int64_t c = 0; c < d; ++c) dot += load(out[i], c) * load(grad_out[i], c);
    delta[i] = dot;
  }
  for (int64_t j0 = 0; j0 < k.rows.count; j0 += kKeyBlock) {
    const int64_t count = smaller(kKeyBlock, k.rows.count - j0);
    unpack_transposed<T>(k, j0, count, d, kt, ld);
    unpack_transposed<T>(v, j0, count, d, vt, ld);
    unpack<T>(k, j0, count, d, A(1), kb, dp);
    for (int64_t i = 0; i < count * dp; ++i) dk[i] = dv[i] = 0;
    for (int64_t i0 = 0; i0 < q.rows.count; i0 += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, q.rows.count - i0);
      unpack<T>(q, i0, rows, d, scale, qb, dp);
      unpack<T>(grad_out, i0, rows, d, A(1), dob, dp);
      multiply<A>(
          {.m = rows, .n = count, .k = d, .a = qb, .a_row = dp, .a_k = 1, .b = kt, .ldb = ld, .c = s, .ldc = ld});
      multiply<A>(
          {.m = rows, .n = count, .k = d, .a = dob, .a_row = dp, .a_k = 1, .b = vt, .ldb = ld, .c = ds, .ldc = ld});
      for (int64_t i = 0; i < rows; ++i) {
        const A lse = row<A>(p.lse, q.rows[i0 + i])[head_index], offset = delta[i0 + i];
        A *si = s + i * ld, *dsi = ds + i * ld;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          si[j] = exponential(si[j] - lse);
          dsi[j] = si[j] * (dsi[j] - offset);
        }
      }
      multiply<A>({.m = count,
                   .n = d,
                   .k = rows,
                   .a = s,
                   .a_row = 1,
                   .a_k = ld,
                   .b = dob,
                   .ldb = dp,
                   .c = dv,
                   .ldc = dp,
                   .accumulate = true});
      multiply<A>({.m = count,
                   .n = d,
                   .k = rows,
                   .a = ds,
                   .a_row = 1,
                   .a_k = ld,
                   .b = qb,
                   .ldb = dp,
                   .c = dk,
                   .ldc = dp,
                   .accumulate = true});
      multiply<A>({.m = rows,
                   .n = d,
                   .k = count,
                   .a = ds,
                   .a_row = ld,
                   .a_k = 1,
                   .b = kb,
                   .ldb = dp,
                   .c = dq + i0 * dp,
                   .ldc = dp,
                   .accumulate = true});
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < d; ++c) {
        store(grad_k[j0 + i], c, dk[i * dp + c]);  // q was scaled, so dk is already
        store(grad_v[j0 + i], c, dv[i * dp + c]);
      }
  }
  for (int64_t i = 0; i < q.rows.count; ++i)
    for (int64_t c = 0; c < d; ++c) store(grad_q[i], c, scale * dq[i * dp + c]);
}

}  // namespace

void attention(const Attention& p, int threads) {
  with_type(p.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_stretches<T>(p, threads, kQueryStretch,
                     [&](const Head<T>& q, const Head<T>& k, const Head<T>& v, auto... rest) {
                       forward_task<T>(p, q, k, v, rest...);
                     });
  });
}

void attention_backward(const AttentionBackward& p, int threads) {
  with_type(p.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t d = p.q.cols / p.num_heads;
    for_heads(p, threads, 1, [&](int64_t b, int64_t i, int64_t h, int64_t) {
      const Rows q = sequence(p.layout_q, p.across_frames, b, i), k = sequence(p.layout_k, p.across_frames, b, i);
      backward_task<T>(p, {p.q, q, h * d}, {p.k, k, h * d}, {p.v, k, h * d}, d, h);
    });
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
