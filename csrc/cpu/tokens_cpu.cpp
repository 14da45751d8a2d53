// Sparse-dense token exchange: adaptive pooling down, nearest gather up, and the fixed position table.
#include "cpu/kernels.h"

namespace flexdit::cpu::FLEXDIT_ISA {
namespace {

struct Index {
  int64_t frame, y, x;
};
Index index_of(const Grid& grid, int64_t token) {
  return {token / (int64_t{grid.height} * grid.width), token / grid.width % grid.height, token % grid.width};
}
int64_t token_at(const Grid& grid, int64_t frame, int64_t y, int64_t x) {
  return (frame * grid.height + y) * grid.width + x;
}

// A box of grid positions, ends excluded.
struct Box {
  int64_t frame, frame_end, y, y_end, x, x_end;
  int64_t size() const { return (frame_end - frame) * (y_end - y) * (x_end - x); }
};

Box pooling_window(const Grid& dense, const Grid& sparse, int64_t token) {
  const auto [f, y, x] = index_of(sparse, token);
  return {window_begin(f, dense.frames, sparse.frames), window_end(f, dense.frames, sparse.frames),
          window_begin(y, dense.height, sparse.height), window_end(y, dense.height, sparse.height),
          window_begin(x, dense.width, sparse.width),   window_end(x, dense.width, sparse.width)};
}

// First j whose nearest source among m is >= i: the inverse of nearest_source.
int64_t first_with_source(int64_t i, int64_t n, int64_t m) { return (i * n + m - 1) / m; }

// The dense tokens whose nearest sparse token is this one.
Box nearest_targets(const Grid& dense, const Grid& sparse, int64_t token) {
  const auto [f, y, x] = index_of(sparse, token);
  return {first_with_source(f, dense.frames, sparse.frames), first_with_source(f + 1, dense.frames, sparse.frames),
          first_with_source(y, dense.height, sparse.height), first_with_source(y + 1, dense.height, sparse.height),
          first_with_source(x, dense.width, sparse.width),   first_with_source(x + 1, dense.width, sparse.width)};
}

// The sparse tokens whose pooling windows hold this dense token. Windows begin and end in ascending order, so
// along each axis they are consecutive: those with begin <= i < end.
void containing_range(int64_t i, int64_t n, int64_t m, int64_t* first, int64_t* end) {
  int64_t w = i * m / n;  // the first window that holds i: the one before ends at ceil(w n / m) <= i
  *first = w;
  while (w < m && window_begin(w, n, m) <= i) ++w;
  *end = w;
}
Box containing_windows(const Grid& dense, const Grid& sparse, int64_t token) {
  const auto [f, y, x] = index_of(dense, token);
  Box box;
  containing_range(f, dense.frames, sparse.frames, &box.frame, &box.frame_end);
  containing_range(y, dense.height, sparse.height, &box.y, &box.y_end);
  containing_range(x, dense.width, sparse.width, &box.x, &box.x_end);
  return box;
}

template <class Body>
void for_each(const Grid& grid, const Box& box, Body&& body) {
  for (int64_t f = box.frame; f < box.frame_end; ++f)
    for (int64_t y = box.y; y < box.y_end; ++y)
      for (int64_t x = box.x; x < box.x_end; ++x) body(token_at(grid, f, y, x));
}

constexpr int64_t kColumnBlock = 256;  // columns summed at a time, in registers and first-level cache

// Calls body(first column, number of columns) for every block of a row.
template <class Body>
void for_columns(int64_t c, Body&& body) {
  for (int64_t first = 0; first < c; first += kColumnBlock)
    body(first, c - first < kColumnBlock ? c - first : kColumnBlock);
}

}  // namespace

void pool_tokens(const PoolTokens& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t rows = p.sparse_layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.sparse_layout.sample_of(r), begin = p.layout.offset(b);
      const Grid &dense = p.layout.grid(b), &sparse = p.sparse_layout.grid(b);
      const Box window = pooling_window(dense, sparse, r - p.sparse_layout.offset(b));
      const A inverse = A(1) / A(window.size());
      for_columns(p.x.cols, [&](int64_t first, int64_t count) {
        A sum[kColumnBlock] = {};
        for_each(dense, window, [&](int64_t n) {
          const T* x = row<T>(p.x, begin + n) + first;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) sum[i] += load(x, i);
          if (!p.position) return;
          const T* position = row<T>(p.position.rows, p.position.first(b) + n) + first;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) sum[i] += load(position, i);
        });
        T* out = row<T>(p.out, r) + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(out, i, sum[i] * inverse);
      });
    }
  });
  if (p.normed)
    modulated_layer_norm(
        {.x = p.out, .shift = p.shift, .scale = p.scale, .layout = p.sparse_layout, .y = p.normed, .eps = p.eps},
        threads);
}

void pool_tokens_backward(const PoolTokensBackward& p, int threads) {
  with_type(p.grad_x.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t rows = p.layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.layout.sample_of(r), begin = p.sparse_layout.offset(b);
      const Grid &dense = p.layout.grid(b), &sparse = p.sparse_layout.grid(b);
      const Box windows = containing_windows(dense, sparse, r - p.layout.offset(b));
      for_columns(p.grad_x.cols, [&](int64_t first, int64_t count) {
        A sum[kColumnBlock] = {};
        for_each(sparse, windows, [&](int64_t s) {
          const A inverse = A(1) / A(pooling_window(dense, sparse, s).size());
          const T* g = row<T>(p.grad_out, begin + s) + first;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) sum[i] += load(g, i) * inverse;
        });
        T* grad = row<T>(p.grad_x, r) + first;
        for (int64_t i = 0; i < count; ++i) store(grad, i, p.accumulate ? load(grad, i) + sum[i] : sum[i]);
      });
    }
  });
}

void gather_sparse(const GatherSparse& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t rows = p.layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.layout.sample_of(r), n = r - p.layout.offset(b);
      const Grid &dense = p.layout.grid(b), &sparse = p.sparse_layout.grid(b);
      const auto [f, y, x] = index_of(dense, n);
      const int64_t source =
          token_at(sparse, nearest_source(f, dense.frames, sparse.frames),
                   nearest_source(y, dense.height, sparse.height), nearest_source(x, dense.width, sparse.width));
      const T *from_x = row<T>(p.x, r), *from_s = row<T>(p.s, p.sparse_layout.offset(b) + source);
      T* out = row<T>(p.out, r);
      if (p.position) {
        const T* position = row<T>(p.position.rows, p.position.first(b) + n);
#pragma omp simd
        for (int64_t i = 0; i < p.x.cols; ++i) store(out, i, load(from_x, i) + load(from_s, i) + load(position, i));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < p.x.cols; ++i) store(out, i, load(from_x, i) + load(from_s, i));
      }
    }
  });
  if (p.normed)
    modulated_layer_norm(
        {.x = p.out, .shift = p.shift, .scale = p.scale, .layout = p.layout, .y = p.normed, .eps = p.eps}, threads);
}

void gather_sparse_backward(const GatherSparseBackward& p, int threads) {
  with_type(p.grad_s.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t rows = p.sparse_layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.sparse_layout.sample_of(r), begin = p.layout.offset(b);
      const Grid& dense = p.layout.grid(b);
      const Box targets = nearest_targets(dense, p.sparse_layout.grid(b), r - p.sparse_layout.offset(b));
      for_columns(p.grad_s.cols, [&](int64_t first, int64_t count) {
        A sum[kColumnBlock] = {};
        for_each(dense, targets, [&](int64_t n) {
          const T* g = row<T>(p.grad_out, begin + n) + first;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) sum[i] += load(g, i);
        });
        T* grad = row<T>(p.grad_s, r) + first;
        for (int64_t i = 0; i < count; ++i) store(grad, i, sum[i]);
      });
    }
  });
}

void add_position(const AddPosition& p, int threads) {
  with_type(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t rows = p.layout.total();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = p.layout.sample_of(r);
      T* x = row<T>(p.x, r);
      const T* position = row<T>(p.position.rows, p.position.first(b) + r - p.layout.offset(b));
#pragma omp simd
      for (int64_t i = 0; i < p.x.cols; ++i) store(x, i, load(x, i) + load(position, i));
    }
  });
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
