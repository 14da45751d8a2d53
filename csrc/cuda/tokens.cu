// Sparse-dense token exchange: adaptive pooling down, nearest gather up, and the fixed position table.
// In pooling, its backward and the gather's backward each row is a weighted sum over a box of tokens.
#include "cuda/rows.h"

namespace flexdit::cuda {
namespace {

struct Index {
  int frame, y, x;
};
__device__ __forceinline__ Index index_of(const Grid& grid, int token) {
  return {token / (grid.height * grid.width), token / grid.width % grid.height, token % grid.width};
}
__device__ __forceinline__ int token_at(const Grid& grid, int frame, int y, int x) {
  return (frame * grid.height + y) * grid.width + x;
}

struct Range {
  int begin, end;
  __device__ __forceinline__ int size() const { return end - begin; }
};
struct Box {
  Range frame, y, x;
  __device__ __forceinline__ int size() const { return frame.size() * y.size() * x.size(); }
};

// A box made axis by axis: ranges(i, n, m) for position i, n dense and m sparse positions along the axis.
template <class Ranges>
__device__ __forceinline__ Box box_of(const Index& at, const Grid& dense, const Grid& sparse, Ranges&& ranges) {
  return {ranges(at.frame, dense.frames, sparse.frames), ranges(at.y, dense.height, sparse.height),
          ranges(at.x, dense.width, sparse.width)};
}

struct WindowRange {
  __device__ __forceinline__ Range operator()(int i, int n, int m) const {
    return {int(window_begin(i, n, m)), int(window_end(i, n, m))};
  }
};
// Windows that hold dense position i: they begin and end in ascending order, so they are consecutive.
struct ContainingRange {
  __device__ __forceinline__ Range operator()(int i, int n, int m) const {
    int first = int(nearest_source(i, n, m)), end = first;
    while (first > 0 && window_end(first - 1, n, m) > i) --first;
    while (end < m && window_begin(end, n, m) <= i) ++end;
    return {first, end};
  }
};
// Dense positions whose nearest sparse one is i: the inverse of nearest_source.
struct TargetRange {
  __device__ __forceinline__ Range operator()(int i, int n, int m) const {
    return {int((int64_t{i} * n + m - 1) / m), int((int64_t{i + 1} * n + m - 1) / m)};
  }
};

// What differs between the three sums: which tokens a row sums over, and their weights.
struct Pooling {  // dense tokens to a sparse row
  using Ranges = WindowRange;
  static constexpr bool kToDense = false;
  __device__ __forceinline__ static float weight(const Box& box, const Grid&, const Grid&, const Index&) {
    return 1.f / float(box.size());
  }
};
struct PoolingBackward {  // sparse tokens, each weighted by its window's size, to a dense row
  using Ranges = ContainingRange;
  static constexpr bool kToDense = true;
  __device__ __forceinline__ static float weight(const Box&, const Grid& dense, const Grid& sparse, const Index& from) {
    return 1.f / float(box_of(from, dense, sparse, WindowRange()).size());
  }
};
struct GatherBackward {  // dense tokens to the sparse row that they were gathered from
  using Ranges = TargetRange;
  static constexpr bool kToDense = false;
  __device__ __forceinline__ static float weight(const Box&, const Grid&, const Grid&, const Index&) { return 1.f; }
};

struct Boxes {
  TokenLayout dense, sparse;
  Matrix in;
  PositionTable position;  // added to each token of `in`, or empty
};

template <class T, int V>
__device__ __forceinline__ void add_row(float* sums, const T* p, float weight, int cols) {
  for_vectors<V>(cols, [&](int k, int column) {
    const auto value = load<V>(p + column);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[k * V + i] += weight * value[i];
  });
}

// A thread's share of the sum over the box of row r.
template <class T, int V, class Kind>
__device__ __forceinline__ void add_box(float* sums, const Boxes& p, int64_t sample, int64_t r, int cols) {
  const TokenLayout &to = Kind::kToDense ? p.dense : p.sparse, &from = Kind::kToDense ? p.sparse : p.dense;
  const int64_t begin = from.offset(sample);
  const Grid dense = p.dense.grid(sample), sparse = p.sparse.grid(sample);
  const Index at = index_of(Kind::kToDense ? dense : sparse, int(r - to.offset(sample)));
  const Box box = box_of(at, dense, sparse, typename Kind::Ranges());
  for (int frame = box.frame.begin; frame < box.frame.end; ++frame)
    for (int y = box.y.begin; y < box.y.end; ++y)
      for (int x = box.x.begin; x < box.x.end; ++x) {
        const int token = token_at(Kind::kToDense ? sparse : dense, frame, y, x);
        const float weight = Kind::weight(box, dense, sparse, {frame, y, x});
        add_row<T, V>(sums, row<T>(p.in, begin + token), weight, cols);
        if (p.position.rows.data)
          add_row<T, V>(sums, row<T>(p.position.rows, p.position.first(sample) + token), weight, cols);
      }
}

struct PooledRows {
  static constexpr int kLeastBlocks = 3;
  Boxes boxes;
  template <class T, int V>
  __device__ __forceinline__ Row<T, V> row_at(const TokenLayout&, int64_t sample, int64_t r, int cols) const {
    float sums[kLaneValues<V>] = {};
    add_box<T, V, Pooling>(sums, boxes, sample, r, cols);
    Row<T, V> out;
    for_vectors<V>(cols, [&](int k, int) {
#pragma unroll
      for (int i = 0; i < V; ++i) out.part[k].set(i, sums[k * V + i]);
    });
    return out;
  }
};

template <class T, int V, class Kind>
__global__ void __launch_bounds__(kRowThreads, 3) box_sums_kernel(Boxes p, Matrix to, bool accumulate) {
  await_predecessor();
  const int64_t r = row_of_thread<V>();
  const int cols = int(to.cols);
  const TokenLayout& layout = Kind::kToDense ? p.dense : p.sparse;
  if (r >= to.rows) return;
  if (r >= layout.total()) return write_zeros<T, V>(row<T>(to, r), cols);
  float sums[kLaneValues<V>] = {};
  add_box<T, V, Kind>(sums, p, layout.sample_of(r), r, cols);
  T* out = row<T>(to, r);
  for_vectors<V>(cols, [&](int k, int column) {
    Vector<T, V> value;
    if (accumulate) value = load<V>(out + column);
#pragma unroll
    for (int i = 0; i < V; ++i) value.set(i, (accumulate ? value[i] : 0.f) + sums[k * V + i]);
    store(out + column, value);
  });
}

template <class Kind>
void launch_box_sums(const char* name, const Boxes& p, const Matrix& out, bool accumulate, const Execution& exec) {
  with_vector(
      out.dtype, out.cols,
      [&](auto tag, auto vector) {
        launch({name, out.rows, out.cols}, box_sums_kernel<decltype(tag), vector(), Kind>,
               row_blocks<vector()>(out.rows), kRowThreads, 0, exec, p, out, accumulate);
      },
      p.in, out);
}

template <class T, int V>
__device__ __forceinline__ void add_to(Row<T, V>& out, const T* one, const T* other, int cols) {
  for_vectors<V>(cols, [&](int k, int column) {
    const auto a = load<V>(one + column);
    Vector<T, V> b;
    if (other) b = load<V>(other + column);
#pragma unroll
    for (int i = 0; i < V; ++i) out.part[k].set(i, out.part[k][i] + a[i] + (other ? b[i] : 0.f));
  });
}

struct GatheredRows {
  Matrix s, x;
  PositionTable position;
  TokenLayout sparse_layout;
  template <class T, int V>
  __device__ __forceinline__ Row<T, V> row_at(const TokenLayout& layout, int64_t sample, int64_t r, int cols) const {
    Row<T, V> out;
    out.read(row<T>(x, r), cols);
    const Grid dense = layout.grid(sample), sparse = sparse_layout.grid(sample);
    const int token = int(r - layout.offset(sample));
    const Index at = index_of(dense, token);
    const int source = token_at(sparse, int(nearest_source(at.frame, dense.frames, sparse.frames)),
                                int(nearest_source(at.y, dense.height, sparse.height)),
                                int(nearest_source(at.x, dense.width, sparse.width)));
    add_to(out, row<T>(s, sparse_layout.offset(sample) + source),
           position.rows.data ? row<T>(position.rows, position.first(sample) + token) : nullptr, cols);
    return out;
  }
};

struct PositionedRows {
  Matrix x;
  PositionTable position;
  template <class T, int V>
  __device__ __forceinline__ Row<T, V> row_at(const TokenLayout& layout, int64_t sample, int64_t r, int cols) const {
    Row<T, V> out;
    out.read(row<T>(x, r), cols);
    add_to<T, V>(out, row<T>(position.rows, position.first(sample) + r - layout.offset(sample)), nullptr, cols);
    return out;
  }
};

}  // namespace

void pool_tokens(const PoolTokens& p, const Execution& exec) {
  launch_rows("pool_tokens", p.sparse_layout, PooledRows{{p.layout, p.sparse_layout, p.x, p.position}}, p.out,
              Norm{p.shift, p.scale, p.normed, float(p.eps)}, exec, p.x, p.position.rows);
}

void pool_tokens_backward(const PoolTokensBackward& p, const Execution& exec) {
  launch_box_sums<PoolingBackward>("pool_tokens_backward", {p.layout, p.sparse_layout, p.grad_out, {}}, p.grad_x,
                                   p.accumulate, exec);
}

void gather_sparse(const GatherSparse& p, const Execution& exec) {
  launch_rows("gather_sparse", p.layout, GatheredRows{p.s, p.x, p.position, p.sparse_layout}, p.out,
              Norm{p.shift, p.scale, p.normed, float(p.eps)}, exec, p.s, p.x, p.position.rows);
}

void gather_sparse_backward(const GatherSparseBackward& p, const Execution& exec) {
  launch_box_sums<GatherBackward>("gather_sparse_backward", {p.layout, p.sparse_layout, p.grad_out, {}}, p.grad_s,
                                  false, exec);
}

void add_position(const AddPosition& p, const Execution& exec) {
  launch_rows("add_position", p.layout, PositionedRows{p.x, p.position}, p.x, Norm{}, exec, p.position.rows);
}

}  // namespace flexdit::cuda
