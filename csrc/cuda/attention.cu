// Attention within samples with an online softmax. Source: FlashAttention-2, arXiv 2307.08691, algorithm 1.
#include "cuda/attention_tiles.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {
namespace {

template <class T>
struct Forward {
  Geometry g;
  View<T> q, k, v, out;
  View<float> lse;
};

// A thread's part of the running softmax of its rows; sums are over its own columns until the end.
template <class S>
struct Softmax {
  float maximum[S::R][2], sum[S::R][2];
};

// The maximum or the sum over the four lanes that share a row.
__device__ __forceinline__ float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float row_total(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Scores become probabilities up to a factor of their row that the sum knows.
template <class S>
__device__ __forceinline__ void online_softmax(typename S::Scores& scores, Softmax<S>& softmax, typename S::Sums& out,
                                               float scale_log2) {
#pragma unroll
  for (int r = 0; r < S::R; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& maximum = softmax.maximum[r][half];
      float largest = maximum, total = 0;
#pragma unroll
      for (int n = 0; n < S::kStream / 8; ++n)
        largest = fmaxf(largest, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
      largest = row_maximum(largest);
      const float rescale = exp2_fast((maximum - largest) * scale_log2), offset = largest * scale_log2;
#pragma unroll
      for (int n = 0; n < S::kStream / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[r][n][i] = exp2_fast(scores[r][n][i] * scale_log2 - offset);
          total += scores[r][n][i];
        }
      maximum = largest;
      softmax.sum[r][half] = softmax.sum[r][half] * rescale + total;
#pragma unroll
      for (int n = 0; n < S::kHead / 8; ++n) {
        out[r][n][2 * half] *= rescale;
        out[r][n][2 * half + 1] *= rescale;
      }
    }
}

template <class S, class T>
__device__ __forceinline__ void finish(const Forward<T>& p, const Block& block, const View<T>& out, T* tile,
                                       const Softmax<S>& softmax, const typename S::Sums& sums) {
  float factor[S::R][2];
#pragma unroll
  for (int r = 0; r < S::R; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_total(softmax.sum[r][half]);
      factor[r][half] = 1.f / total;
      const int i = (static_cast<int>(threadIdx.x) / kWarp * S::R + r) * 16 + 8 * half + lane_row();
      if (p.lse.data && lane_column() == 0 && i < block.count)
        p.lse.data[(block.first + i * block.step) * p.lse.stride + block.head] = softmax.maximum[r][half] * p.g.scale + logf(total);
    }
  store_rows<S>(out, block.count, p.g.head_size, tile, sums, factor);
}

template <class S, class T>
__device__ __forceinline__ void write_spare(const Forward<T>& p, const Block& block, const View<T>& out) {
  write_zeros<S>(out, block.count, p.g.head_size);
  write_zeros<S>(p.lse.at(block.first, block.head), block.count, 1);
}

template <class S, int kBlocks>
__global__ void __launch_bounds__(S::kThreads, kBlocks) attention_kernel(const Forward<typename S::Type> p) {
  await_predecessor();
  using T = typename S::Type;
  const Block block = block_of_thread<S>(p.g);
  if (block.count == 0) return;
  const int64_t column = int64_t{block.head} * p.g.head_size;
  const View<T> out = p.out.at(block.first, column, block.step);
  if (block.spare) return write_spare<S>(p, block, out);

  FLEXDIT_DYNAMIC_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* kv_tiles = q_tile + S::kOwnTile;  // [2 stages][k, v]
  float* scratch = reinterpret_cast<float*>(kv_tiles + 4 * S::kStreamTile) +
                   static_cast<int>(threadIdx.x) / kWarp * S::R * S::kScratch;
  const auto load_keys = [&](T* tiles, int first) {
    const int left = block.others - first;
    const int64_t row = block.first_other + first * block.step;
    load_tile<S, S::kStream>(tiles, p.k.at(row, column, block.step), left, p.g.head_size);
    load_tile<S, S::kStream>(tiles + S::kStreamTile, p.v.at(row, column, block.step), left, p.g.head_size);
    commit_copies();
  };
  load_tile<S, S::kOwn>(q_tile, p.q.at(block.first, column, block.step), block.count, p.g.head_size);
  load_keys(kv_tiles, 0);

  typename S::Owned q;
  typename S::Sums sums = {};
  Softmax<S> softmax;
#pragma unroll
  for (int r = 0; r < S::R; ++r)
    for (int half = 0; half < 2; ++half) softmax.maximum[r][half] = -INFINITY, softmax.sum[r][half] = 0;
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < S::R; ++r)
    q[r].template load<S::kStride>(q_tile + (static_cast<int>(threadIdx.x) / kWarp * S::R + r) * 16 * S::kStride);
#pragma unroll 1
  for (int first = 0, stage = 0;; first += S::kStream, stage ^= 1) {
    const T* tiles = kv_tiles + stage * 2 * S::kStreamTile;
    const int left = block.others - first;
    if (left > S::kStream) load_keys(kv_tiles + (stage ^ 1) * 2 * S::kStreamTile, first + S::kStream);
    typename S::Scores scores = {};
    multiply_transposed<S::kStride>(scores, q, tiles);
    if (left < S::kStream) mask_columns(scores, left);
    online_softmax<S>(scores, softmax, sums, p.g.scale_log2());
    Rows<T, S::kStream> probabilities[S::R];
#pragma unroll
    for (int r = 0; r < S::R; ++r) probabilities[r].take(scores[r], scratch + r * S::kScratch);
    multiply<S::kStride>(sums, probabilities, tiles + S::kStreamTile);
    if (left <= S::kStream) break;
    wait_copies<0>();
    __syncthreads();  // the next tile is there, and this one has been read
  }
  finish<S>(p, block, out, q_tile, softmax, sums);
}

template <class S, int kBlocks, class T>
void launch_forward(const Op& op, const Forward<T>& p, const Execution& exec) {
  constexpr size_t kShared = (S::kOwnTile + 4 * S::kStreamTile) * sizeof(T) + S::kBlockScratch * sizeof(float);
  launch(op, attention_kernel<S, kBlocks>, dim3(block_count(p.g, S::kOwn)), dim3(S::kThreads), kShared, exec, p);
}

// Two sets of 16 rows per warp halve the reads of shared memory per product, which mma is bound by; worth it where the
// samples fill such blocks and the blocks the GPU.
bool prefers_long_blocks(const Geometry& g) {
  constexpr int64_t kEnoughBlocks = 256;
  return g.batch > 0 && g.capacity > 64 * int64_t{g.batch} && g.capacity * g.heads >= kEnoughBlocks * 128;
}

template <int kHead, class T>
void launch_bucket(const Op& op, const Forward<T>& p, bool across_frames, const Execution& exec) {
  if (across_frames) return launch_forward<Shape<T, kHead, 1, 1, 16, true>, 8>(op, p, exec);
  if constexpr (std::is_same_v<T, float>) {
    launch_forward<Shape<T, kHead, 2, 1, kHead == 128 ? 16 : 32>, 1>(op, p, exec);
  } else if constexpr (kHead == 128) {
    launch_forward<Shape<T, kHead, 4, 1, 64>, 2>(op, p, exec);
  } else {
    if (prefers_long_blocks(p.g))
      launch_forward<Shape<T, kHead, 4, 2, 64>, 2>(op, p, exec);
    else
      launch_forward<Shape<T, kHead, 4, 1, 64>, 3>(op, p, exec);
  }
}

}  // namespace

void attention(const Attention& p, const Execution& exec) {
  const Op op{"attention", p.q.rows, p.q.cols};
  const Geometry g = geometry_of("attention", p, p.layout_q, p.layout_k, p.out.rows);
  with_type(p.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Forward<T> forward{
        g, view_of<T>(p.q), view_of<T>(p.k), view_of<T>(p.v), view_of<T>(p.out), view_of<float>(p.lse)};
    with_bucket(g.head_size, [&](auto head) { launch_bucket<head()>(op, forward, p.across_frames, exec); });
  });
}

}  // namespace flexdit::cuda
