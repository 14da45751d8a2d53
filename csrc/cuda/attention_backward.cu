// Gradients of attention, the probabilities recomputed from lse. Source: FlashAttention-2, arXiv 2307.08691,
// algorithm 2, cut into a kernel whose blocks own queries and one whose blocks own keys: every gradient is summed by
// one warp in a fixed order, so results repeat to the bit without a mode for it, at the price of 7 products instead
// of 5.
#include "cuda/attention_tiles.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {
namespace {

template <class T>
struct Backward {
  Geometry g;
  View<T> q, k, v, out, grad_out;
  View<float> lse;
  View<T> grad_q, grad_k, grad_v;
};

// dots[i] = the product of rows i of two tiles. A few neighbouring threads share a row.
template <class S, int kRows, class T>
__device__ __forceinline__ void row_dots(const T* x, const T* y, float* dots) {
  constexpr int kShares = S::kThreads / kRows, kChunks = S::kHead / kVector<T>;
  static_assert(kShares >= 1 && S::kThreads % kRows == 0);
  const int row = static_cast<int>(threadIdx.x) / kShares, share = static_cast<int>(threadIdx.x) % kShares;
  float sum = 0;
  for (int chunk = share; chunk < kChunks; chunk += kShares) {
    const int at = row * S::kStride + chunk * kVector<T>;
    const auto a = load<kVector<T>>(x + at), b = load<kVector<T>>(y + at);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum += a[i] * b[i];
  }
#pragma unroll
  for (int lanes = kShares / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (share == 0) dots[row] = sum;
}

// lse in powers of two; infinite for a row that is not there, so that its probabilities are 0.
template <class T>
__device__ __forceinline__ float lse_of(const Backward<T>& p, int64_t first, int64_t step, int head, int i, int count) {
  return i < count ? p.lse.data[(first + i * step) * p.lse.stride + head] * 1.44269504f : INFINITY;
}

// The left operand of a product: kept in registers, or read again where they are too few.
template <class S>
struct Operand {
  using T = typename S::Type;
  typename S::Owned kept;
  const T* tile;

  __device__ __forceinline__ void begin(const T* warp_tile) {
    tile = warp_tile;
    if constexpr (S::kKeeps) kept[0].template load<S::kStride>(tile);
  }
  // sums = this, times the tile's transpose
  __device__ __forceinline__ void multiply_with(const T* other, typename S::Scores& sums) {
    if constexpr (!S::kKeeps) kept[0].template load<S::kStride>(tile);
#pragma unroll
    for (int n = 0; n < S::kStream / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][n][i] = 0;
    multiply_transposed<S::kStride>(sums, kept, other);
  }
};

template <class S>
__device__ __forceinline__ void accumulate(typename S::Sums& sums, const typename S::Scores& left, float* scratch,
                                           const typename S::Type* right) {
  Rows<typename S::Type, S::kStream> rows[1];
  rows[0].take(left[0], scratch);
  multiply<S::kStride>(sums, rows, right);
}

template <class S>
constexpr int kWarpTile = 16 * S::kStride;

__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

// A block owns queries; keys and values stream by.
template <class S, int kBlocks>
__global__ void __launch_bounds__(S::kThreads, kBlocks) attention_grad_q_kernel(const Backward<typename S::Type> p) {
  await_predecessor();
  using T = typename S::Type;
  const int d = p.g.head_size;
  const Block block = block_of_thread<S>(p.g);
  if (block.count == 0) return;
  const int64_t column = int64_t{block.head} * d;
  const View<T> grad_q = p.grad_q.at(block.first, column, block.step);
  if (block.spare) return write_zeros<S>(grad_q, block.count, d);

  FLEXDIT_DYNAMIC_SHARED(shared);
  T *q_tile = reinterpret_cast<T*>(shared), *grad_tile = q_tile + S::kOwnTile, *out_tile = grad_tile + S::kOwnTile;
  T* kv_tiles = out_tile + S::kOwnTile;  // [2 stages][k, v]
  float* delta_of = reinterpret_cast<float*>(kv_tiles + 4 * S::kStreamTile);
  float* scratch = delta_of + S::kOwn + warp_of_thread() * S::kScratch;
  const auto load_keys = [&](T* tiles, int first) {
    const int left = block.others - first;
    const int64_t row = block.first_other + first * block.step;
    load_tile<S, S::kStream>(tiles, p.k.at(row, column, block.step), left, d);
    load_tile<S, S::kStream>(tiles + S::kStreamTile, p.v.at(row, column, block.step), left, d);
    commit_copies();
  };
  load_tile<S, S::kOwn>(q_tile, p.q.at(block.first, column, block.step), block.count, d);
  load_tile<S, S::kOwn>(grad_tile, p.grad_out.at(block.first, column, block.step), block.count, d);
  load_tile<S, S::kOwn>(out_tile, p.out.at(block.first, column, block.step), block.count, d);
  load_keys(kv_tiles, 0);
  float lse[2], delta[2], factor[1][2] = {{p.g.scale, p.g.scale}};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    lse[half] = lse_of(p, block.first, block.step, block.head, 16 * warp_of_thread() + 8 * half + lane_row(), block.count);
  wait_copies<0>();
  __syncthreads();
  row_dots<S, S::kOwn>(out_tile, grad_tile, delta_of);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) delta[half] = delta_of[16 * warp_of_thread() + 8 * half + lane_row()];

  Operand<S> q, grad;
  q.begin(q_tile + warp_of_thread() * kWarpTile<S>);
  grad.begin(grad_tile + warp_of_thread() * kWarpTile<S>);
  typename S::Sums sums = {};
#pragma unroll 1
  for (int first = 0, stage = 0;; first += S::kStream, stage ^= 1) {
    const T *k_tile = kv_tiles + stage * 2 * S::kStreamTile, *v_tile = k_tile + S::kStreamTile;
    const int left = block.others - first;
    if (left > S::kStream) load_keys(kv_tiles + (stage ^ 1) * 2 * S::kStreamTile, first + S::kStream);
    typename S::Scores scores, grads;
    q.multiply_with(k_tile, scores);
    if (left < S::kStream) mask_columns(scores, left);
    grad.multiply_with(v_tile, grads);
#pragma unroll
    for (int n = 0; n < S::kStream / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float probability = exp2_fast(scores[0][n][i] * p.g.scale_log2() - lse[i / 2]);
        grads[0][n][i] = probability * (grads[0][n][i] - delta[i / 2]);
      }
    accumulate<S>(sums, grads, scratch, k_tile);
    if (left <= S::kStream) break;
    wait_copies<0>();
    __syncthreads();  // the next tile is there, and this one has been read
  }
  store_rows<S>(grad_q, block.count, d, q_tile, sums, factor);
}

// A block owns keys and values; queries and the gradients of their outputs stream by.
template <class S, int kBlocks>
__global__ void __launch_bounds__(S::kThreads, kBlocks) attention_grad_kv_kernel(const Backward<typename S::Type> p) {
  await_predecessor();
  using T = typename S::Type;
  const int d = p.g.head_size;
  const Block block = block_of_thread<S>(p.g);
  if (block.count == 0) return;
  const int64_t column = int64_t{block.head} * d;
  const View<T> grad_k = p.grad_k.at(block.first, column, block.step),
                grad_v = p.grad_v.at(block.first, column, block.step);
  if (block.spare) {
    write_zeros<S>(grad_k, block.count, d);
    write_zeros<S>(grad_v, block.count, d);
    return;
  }

  FLEXDIT_DYNAMIC_SHARED(shared);
  T *k_tile = reinterpret_cast<T*>(shared), *v_tile = k_tile + S::kOwnTile;
  T* q_tiles = v_tile + S::kOwnTile;  // [2 stages][q, grad_out, out]
  float *delta_of = reinterpret_cast<float*>(q_tiles + 6 * S::kStreamTile), *lse_at = delta_of + S::kStream;
  float* scratch = lse_at + S::kStream + warp_of_thread() * S::kScratch;
  // The first threads carry lse from one tile to the next.
  const bool carries = static_cast<int>(threadIdx.x) < S::kStream;
  float lse = 0;
  const auto load_queries = [&](T* tiles, int first) {
    const int64_t row = block.first_other + first * block.step;
    const int left = block.others - first;
    load_tile<S, S::kStream>(tiles, p.q.at(row, column, block.step), left, d);
    load_tile<S, S::kStream>(tiles + S::kStreamTile, p.grad_out.at(row, column, block.step), left, d);
    load_tile<S, S::kStream>(tiles + 2 * S::kStreamTile, p.out.at(row, column, block.step), left, d);
    commit_copies();
    if (carries) lse = lse_of(p, row, block.step, block.head, static_cast<int>(threadIdx.x), left);
  };
  load_tile<S, S::kOwn>(k_tile, p.k.at(block.first, column, block.step), block.count, d);
  load_tile<S, S::kOwn>(v_tile, p.v.at(block.first, column, block.step), block.count, d);
  load_queries(q_tiles, 0);

  Operand<S> k, v;
  wait_copies<0>();
  __syncthreads();
  k.begin(k_tile + warp_of_thread() * kWarpTile<S>);
  v.begin(v_tile + warp_of_thread() * kWarpTile<S>);
  typename S::Sums sums_k = {}, sums_v = {};
#pragma unroll 1
  for (int first = 0, stage = 0;; first += S::kStream, stage ^= 1) {
    const T *q_tile = q_tiles + stage * 3 * S::kStreamTile, *grad_tile = q_tile + S::kStreamTile;
    const int left = block.others - first;
    if (carries) lse_at[threadIdx.x] = lse;
    row_dots<S, S::kStream>(grad_tile + S::kStreamTile, grad_tile, delta_of);
    if (left > S::kStream) load_queries(q_tiles + (stage ^ 1) * 3 * S::kStreamTile, first + S::kStream);
    __syncthreads();  // delta and lse are there
    typename S::Scores scores, grads;
    k.multiply_with(q_tile, scores);
    v.multiply_with(grad_tile, grads);
#pragma unroll
    for (int n = 0; n < S::kStream / 8; ++n) {
      const Pair lses = *reinterpret_cast<const Pair*>(lse_at + 8 * n + lane_column());
      const Pair deltas = *reinterpret_cast<const Pair*>(delta_of + 8 * n + lane_column());
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[0][n][i];
        score = exp2_fast(score * p.g.scale_log2() - (i % 2 ? lses.y : lses.x));
        grads[0][n][i] = score * (grads[0][n][i] - (i % 2 ? deltas.y : deltas.x));
      }
    }
    accumulate<S>(sums_v, scores, scratch, grad_tile);
    accumulate<S>(sums_k, grads, scratch, q_tile);
    if (left <= S::kStream) break;
    wait_copies<0>();
    __syncthreads();  // the next tile is there, and this one has been read
  }
  const float scales[1][2] = {{p.g.scale, p.g.scale}}, ones[1][2] = {{1, 1}};
  if (grad_k.rows > 0) store_rows<S>(grad_k, block.count, d, k_tile, sums_k, scales);
  if (grad_v.rows > 0) store_rows<S>(grad_v, block.count, d, v_tile, sums_v, ones);
}

template <class S, int kBlocks, class T>
void launch_grad_q(const Op& op, const Backward<T>& p, const Execution& exec) {
  constexpr size_t kShared =
      (3 * S::kOwnTile + 4 * S::kStreamTile) * sizeof(T) + (S::kOwn + S::kBlockScratch) * sizeof(float);
  launch(op, attention_grad_q_kernel<S, kBlocks>, dim3(block_count(p.g, S::kOwn)), dim3(S::kThreads), kShared, exec, p);
}

template <class S, int kBlocks, class T>
void launch_grad_kv(const Op& op, const Backward<T>& p, const Execution& exec) {
  constexpr size_t kShared =
      (2 * S::kOwnTile + 6 * S::kStreamTile) * sizeof(T) + (2 * S::kStream + S::kBlockScratch) * sizeof(float);
  launch(op, attention_grad_kv_kernel<S, kBlocks>, dim3(block_count(p.g, S::kOwn)), dim3(S::kThreads), kShared, exec,
         p);
}

}  // namespace

void attention_backward(const AttentionBackward& p, const Execution& exec) {
  const Geometry queries = geometry_of("attention_backward", p, p.layout_q, p.layout_k, p.grad_q.rows);
  const int64_t rows_k = p.grad_k.rows > p.grad_v.rows ? p.grad_k.rows : p.grad_v.rows;
  const Geometry keys = geometry_of("attention_backward", p, p.layout_k, p.layout_q, rows_k);
  with_type(p.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    Backward<T> backward{queries,
                         view_of<T>(p.q),
                         view_of<T>(p.k),
                         view_of<T>(p.v),
                         view_of<T>(p.out),
                         view_of<T>(p.grad_out),
                         view_of<float>(p.lse),
                         view_of<T>(p.grad_q),
                         view_of<T>(p.grad_k),
                         view_of<T>(p.grad_v)};
    with_bucket(queries.head_size, [&](auto head) {
      constexpr bool kSingle = std::is_same_v<T, float>, kWide = head() == 128;
      constexpr int kWarps = kSingle ? 2 : 4, kStream = kSingle && kWide ? 16 : 32;
      // Blocks per multiprocessor: as many as leave enough registers.
      const Op op_q{"attention_backward", p.q.rows, p.q.cols}, op_k{"attention_backward", p.k.rows, p.k.cols};
      const bool keys_too = p.grad_k || p.grad_v;
      if (p.across_frames) {
        using Short = Shape<T, head(), 1, 1, 16, true>;
        if (p.grad_q) launch_grad_q<Short, 8>(op_q, backward, exec);
        backward.g = keys;
        if (keys_too) launch_grad_kv<Short, 8>(op_k, backward, exec);
        return;
      }
      if (p.grad_q)
        launch_grad_q<Shape<T, head(), kWarps, 1, kStream>, kSingle ? 1 : kWide ? 2 : 3>(op_q, backward, exec);
      backward.g = keys;
      if (keys_too)
        launch_grad_kv<Shape<T, head(), kWarps, 1, kSingle || kWide ? kStream : 64>, kSingle ? 1 : 2>(op_k, backward,
                                                                                                      exec);
    });
  });
}

}  // namespace flexdit::cuda
