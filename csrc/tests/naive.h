// The operations of ops.h again, as plainly as method.md states them: float64, loops over everything.
#pragma once

#include <vector>

#include "support.h"

namespace flexdit::test::naive {

using Grids = std::vector<Grid>;

inline int64_t total(const Grids& grids) {
  int64_t sum = 0;
  for (const Grid& g : grids) sum += g.tokens();
  return sum;
}
// Calls body(sample, first row) for every sample.
template <class Body>
void for_samples(const Grids& grids, Body&& body) {
  int64_t first = 0;
  for (size_t b = 0; b < grids.size(); first += grids[b++].tokens()) body(static_cast<int64_t>(b), first);
}
// Calls body(sample, row, token within the sample).
template <class Body>
void for_tokens(const Grids& grids, Body&& body) {
  for_samples(grids, [&](int64_t b, int64_t first) {
    for (int64_t n = 0; n < grids[static_cast<size_t>(b)].tokens(); ++n) body(b, first + n, n);
  });
}

inline double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}
inline double silu(double x) { return x / (1 + std::exp(-x)); }

template <class F>
Values map(const Values& x, F&& f) {
  Values y = x;
  for (double& value : y.v) value = f(value);
  return y;
}

inline Values linear(const Values& x, const Values& weight, const Values& bias) {
  Values y(x.rows, weight.rows);
  for (int64_t i = 0; i < y.rows; ++i)
    for (int64_t j = 0; j < y.cols; ++j) {
      double sum = bias.rows ? bias(0, j) : 0;
      for (int64_t k = 0; k < x.cols; ++k) sum += x(i, k) * weight(j, k);
      y(i, j) = sum;
    }
  return y;
}

inline Values modulated_layer_norm(const Values& x, const Values& shift, const Values& scale, const Grids& grids,
                                   double eps = 1e-6) {
  Values y(x.rows, x.cols);
  for_tokens(grids, [&](int64_t b, int64_t r, int64_t) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < x.cols; ++i) mean += x(r, i) / double(x.cols);
    for (int64_t i = 0; i < x.cols; ++i) variance += (x(r, i) - mean) * (x(r, i) - mean) / double(x.cols);
    for (int64_t i = 0; i < x.cols; ++i)
      y(r, i) = (x(r, i) - mean) / std::sqrt(variance + eps) * (1 + scale(b, i)) + shift(b, i);
  });
  return y;
}

inline Values modulated_mean(const Values& x, const Values& shift, const Values& scale, const Grids& grids) {
  const Values y = modulated_layer_norm(x, shift, scale, grids);
  Values mean(shift.rows, x.cols);
  for_tokens(grids, [&](int64_t b, int64_t r, int64_t) {
    for (int64_t i = 0; i < x.cols; ++i) mean(b, i) += y(r, i) / double(grids[size_t(b)].tokens());
  });
  return mean;
}

inline Values gated_residual(const Values& x, const Values& y, const Values& gate, const Grids& grids,
                             bool y_per_sample) {
  Values out = x;
  for_tokens(grids, [&](int64_t b, int64_t r, int64_t) {
    for (int64_t i = 0; i < x.cols; ++i) out(r, i) += gate(b, i) * y(y_per_sample ? b : r, i);
  });
  return out;
}

inline int64_t frame_of(const Grid& g, int64_t n) { return n / (g.height * g.width); }
inline int64_t row_of(const Grid& g, int64_t n) { return n / g.width % g.height; }
inline int64_t column_of(const Grid& g, int64_t n) { return n % g.width; }

// floor(i n / m) <= j < ceil((i + 1) n / m), method.md's window, in exact integers.
inline bool in_window(int64_t j, int64_t i, int64_t n, int64_t m) { return j >= i * n / m && j * m < (i + 1) * n; }

// Position tables: all samples' rows, and where each sample's begin; no offsets mean 0, no rows no table.
struct Position {
  Values rows;
  std::vector<int32_t> offset = {};

  double operator()(int64_t b, int64_t n, int64_t i) const {
    return rows.rows ? rows(n + (offset.empty() ? 0 : offset[size_t(b)]), i) : 0;
  }
};

inline Values pool_tokens(const Values& x, const Position& position, const Grids& grids, const Grids& sparse_grids) {
  Values out(total(sparse_grids), x.cols);
  int64_t first = 0;
  for_tokens(sparse_grids, [&](int64_t b, int64_t r, int64_t s) {
    const Grid &dense = grids[size_t(b)], &sparse = sparse_grids[size_t(b)];
    if (s == 0 && b > 0) first += grids[size_t(b - 1)].tokens();
    int64_t count = 0;
    for (int64_t n = 0; n < dense.tokens(); ++n) {
      if (!in_window(frame_of(dense, n), frame_of(sparse, s), dense.frames, sparse.frames) ||
          !in_window(row_of(dense, n), row_of(sparse, s), dense.height, sparse.height) ||
          !in_window(column_of(dense, n), column_of(sparse, s), dense.width, sparse.width))
        continue;
      ++count;
      for (int64_t i = 0; i < x.cols; ++i) out(r, i) += x(first + n, i) + position(b, n, i);
    }
    for (int64_t i = 0; i < x.cols; ++i) out(r, i) /= double(count);
  });
  return out;
}

inline Values gather_sparse(const Values& s, const Values& x, const Position& position, const Grids& grids,
                            const Grids& sparse_grids) {
  Values out = x;
  int64_t first = 0;
  for_tokens(grids, [&](int64_t b, int64_t r, int64_t n) {
    const Grid &dense = grids[size_t(b)], &sparse = sparse_grids[size_t(b)];
    if (n == 0 && b > 0) first += sparse_grids[size_t(b - 1)].tokens();
    const int64_t source = (frame_of(dense, n) * sparse.frames / dense.frames * sparse.height +
                            row_of(dense, n) * sparse.height / dense.height) *
                               sparse.width +
                           column_of(dense, n) * sparse.width / dense.width;
    for (int64_t i = 0; i < x.cols; ++i) out(r, i) += s(first + source, i) + position(b, n, i);
  });
  return out;
}

inline Values add_position(const Values& x, const Position& position, const Grids& grids) {
  Values out = x;
  for_tokens(grids, [&](int64_t b, int64_t r, int64_t n) {
    for (int64_t i = 0; i < x.cols; ++i) out(r, i) += position(b, n, i);
  });
  return out;
}

// Calls body(row, column, value of the packed images) for every value.
template <class Body>
void for_patches(const Grids& grids, int64_t channels, int64_t patch, bool channels_last, Body&& body) {
  for_samples(grids, [&](int64_t b, int64_t first) {
    const Grid& g = grids[size_t(b)];
    const int64_t height = g.frames * g.height * patch, width = g.width * patch;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) {
          const int64_t inside = y % patch * patch + x % patch;
          const int64_t column = channels_last ? inside * channels + c : c * patch * patch + inside;
          body(first + y / patch * g.width + x / patch, column,
               first * channels * patch * patch + (c * height + y) * width + x);
        }
  });
}

// Returns the output and the logarithm of the softmax's denominator.
inline std::vector<Values> attention(const Values& q, const Values& k, const Values& v, const Grids& grids_q,
                                     const Grids& grids_k, int64_t num_heads) {
  const int64_t d = q.cols / num_heads;
  Values out(q.rows, q.cols), lse(q.rows, num_heads);
  int64_t first_k = 0;
  for_tokens(grids_q, [&](int64_t b, int64_t r, int64_t n) {
    if (n == 0 && b > 0) first_k += grids_k[size_t(b - 1)].tokens();
    const int64_t keys = grids_k[size_t(b)].tokens();
    for (int64_t h = 0; h < num_heads; ++h) {
      std::vector<double> score(size_t(keys), 0.0);
      double largest = -INFINITY, sum = 0;
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = h * d; i < (h + 1) * d; ++i) score[size_t(j)] += q(r, i) * k(first_k + j, i) / std::sqrt(d);
        largest = std::max(largest, score[size_t(j)]);
      }
      for (double& s : score) sum += s = std::exp(s - largest);
      lse(r, h) = largest + std::log(sum);
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t i = h * d; i < (h + 1) * d; ++i) out(r, i) += score[size_t(j)] / sum * v(first_k + j, i);
    }
  });
  return {out, lse};
}

}  // namespace flexdit::test::naive
