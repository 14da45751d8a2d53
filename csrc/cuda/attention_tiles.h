// What the attention kernels share: their shapes, which block has which rows, and the way of tiles between device and
// shared memory.
#pragma once

#include <cmath>

#include "cuda/mma.h"
#include "flexdit/ops.h"

namespace flexdit::cuda {

// Each warp of a block owns 16 R rows of one head (queries, or keys in the kernel of their gradients); the other side
// streams by in tiles of kStream rows, double-buffered. kHead is the head size rounded up to a bucket: columns behind
// the head size are zeros in shared memory, so results are exact.
// With kAcrossFrames_ the rows of a block are those of one position in consecutive frames.
template <class T, int kHeadColumns, int kWarps_, int R_, int kStreamRows, bool kAcrossFrames_ = false>
struct Shape {
  using Type = T;
  static constexpr bool kAcrossFrames = kAcrossFrames_;
  static constexpr int kHead = kHeadColumns, kWarps = kWarps_, R = R_, kStream = kStreamRows;
  static constexpr int kThreads = kWarps * kWarp, kOwn = 16 * R * kWarps;
  static constexpr int kStride = kTileStride<T, kHead>;
  static constexpr int kOwnTile = kOwn * kStride, kStreamTile = kStream * kStride;  // elements
  // Rows<float>::take
  static constexpr int kScratch = std::is_same_v<T, float> ? 16 * kTileStride<float, kStream> : 0;  // per 16 rows
  static constexpr int kBlockScratch = kScratch * R * kWarps;
  // At 128 columns the operands that a warp owns are read again for every tile instead of kept: there are not enough
  // registers.
  static constexpr bool kKeeps = kHead <= 72;
  using Owned = Rows<T, kHead>[R];
  using Scores = float[R][kStream / 8][4];
  using Sums = float[R][kHead / 8][4];
};

// A matrix, or its part from a row and a column on; data is null for an empty one.
template <class T>
struct View {
  T* data;
  int64_t rows, stride;
  bool aligned;  // to 16 bytes, rows too

  __device__ __forceinline__ View at(int64_t row, int64_t column, int64_t step = 1) const {
    return {data + row * stride + column, rows - row, stride * step, aligned};
  }
};
template <class T>
View<T> view_of(const Matrix& m) {
  return {static_cast<T*>(m.data), m ? m.rows : 0, m.stride, vectorizable<T>(kVector<T>, m)};
}

struct Geometry {
  const LayoutRow *own, *other;  // tables of the rows that blocks own, and of those that stream by
  int batch, heads, head_size;
  int64_t capacity;   // of the owned rows
  int64_t sequences;  // no less than there are: samples, or positions of their frames
  float scale;       // of the scores: 1 / sqrt(head_size)

  __device__ __forceinline__ float scale_log2() const { return scale * 1.44269504f; }
};

inline Geometry geometry_of(const char* op, const Attention& p, const TokenLayout& own, const TokenLayout& other,
                            int64_t capacity) {
  const int64_t head_size = p.q.cols / p.num_heads;
  if (head_size % 8 || head_size < 8 || head_size > 128)
    throw ArgumentError(std::string(op) + ": the head size is " + std::to_string(head_size) +
                        ", must be a multiple of 8 from 8 to 128 on CUDA");
  return {own.table,
          other.table,
          static_cast<int>(own.batch),
          static_cast<int>(p.num_heads),
          static_cast<int>(head_size),
          capacity,
          !p.across_frames ? own.batch : p.max_positions ? p.max_positions : capacity,
          static_cast<float>(1 / std::sqrt(static_cast<double>(head_size)))};
}

// Calls body(std::integral_constant<int, kHead>{}).
template <class Body>
void with_bucket(int head_size, Body&& body) {
  if (head_size <= 64)
    body(std::integral_constant<int, 64>{});
  else if (head_size == 72)
    body(std::integral_constant<int, 72>{});
  else
    body(std::integral_constant<int, 128>{});
}

// ---- Which rows a block owns. The host does not know where samples end, so samples get slots by a bound that needs
// no prefix sum: sample b begins at slot offset(b) / kOwn + b, and rows behind the total are sample `batch`.

struct Block {
  int head;
  int64_t first;        // row
  int count;            // of the owned rows, at most kOwn; 0: nothing to do
  int64_t first_other;  // row
  int others;
  int64_t step;  // from row to row
  bool spare;  // rows without a sample, or without rows to attend to: zeros
};

inline unsigned block_count(const Geometry& g, int own) {
  return static_cast<unsigned>((ceil_divide(g.capacity, own) + g.sequences) * g.heads);
}

// The last sample that begins at or before `slot`; every lane looks at another sample, so a batch of 32 takes one step.
template <int kOwn>
__device__ __forceinline__ int sample_at(const Geometry& g, int slot) {
  int low = 0;
  for (int count = g.batch + 1; count > 1;) {
    const int step = (count + kWarp - 1) / kWarp, mine = lane_of_thread() * step;
    const bool begun = mine < count && g.own[low + mine].offset / kOwn + low + mine <= slot;
    const uint32_t lanes = __ballot_sync(kAllLanes, begun);
    const int last = count_bits(lanes) - 1;
    low += last * step;
    count = count - last * step < step ? count - last * step : step;
  }
  return low;
}

// How many of `left` rows a block takes.
template <int kOwn>
__device__ __forceinline__ int count_of(int64_t left) {
  return static_cast<int>(left < 0 ? 0 : left < kOwn ? left : kOwn);
}

template <int kOwn>
__device__ __forceinline__ Block block_within_sample(const Geometry& g, int slot) {
  Block block;
  const int sample = sample_at<kOwn>(g, slot), begin = g.own[sample].offset;
  const int64_t end = sample < g.batch ? g.own[sample + 1].offset : g.capacity;
  block.first = begin + int64_t{slot - (begin / kOwn + sample)} * kOwn;
  block.count = count_of<kOwn>(end - block.first);
  block.first_other = block.others = 0;
  if (sample < g.batch) {
    block.first_other = g.other[sample].offset;
    block.others = int(g.other[sample].grid.tokens());
  }
  block.step = 1;
  block.spare = block.others == 0;
  return block;
}

// A sample has H W ceil(F / kOwn) slots; slots behind the last sample's clear spare rows. Every lane looks at another
// sample, 32 at a time.
template <int kOwn>
__device__ __forceinline__ Block block_across_frames(const Geometry& g, int slot) {
  Block block;
  for (int first = 0; first < g.batch; first += kWarp) {
    const int mine = first + lane_of_thread();
    const Grid grid = mine < g.batch ? g.own[mine].grid : Grid{0, 0, 0};
    const int positions = grid.height * grid.width, slots = positions * ((grid.frames + kOwn - 1) / kOwn);
    int end = slots;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, static_cast<unsigned>(lanes));
      if (lane_of_thread() >= lanes) end += before;
    }
    const int lane = count_bits(__ballot_sync(kAllLanes, end <= slot));
    if (lane < kWarp) {
      const int sample = first + lane, width = __shfl_sync(kAllLanes, positions, lane),
                local = slot - __shfl_sync(kAllLanes, end - slots, lane), frame = local / width * kOwn;
      block.step = width;
      block.first_other = g.own[sample].offset + local % width;
      block.others = g.own[sample].grid.frames;
      block.first = block.first_other + int64_t{frame} * width;
      block.count = count_of<kOwn>(block.others - frame);
      block.spare = false;
      return block;
    }
    slot -= __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  block.step = 1;
  block.first_other = block.others = 0;
  block.first = g.own[g.batch].offset + int64_t{slot} * kOwn;
  block.count = count_of<kOwn>(g.capacity - block.first);
  block.spare = true;
  return block;
}

template <class S>
__device__ __forceinline__ Block block_of_thread(const Geometry& g) {
  const int slot = static_cast<int>(blockIdx.x / static_cast<unsigned>(g.heads));
  Block block;
  if constexpr (S::kAcrossFrames)
    block = block_across_frames<S::kOwn>(g, slot);
  else
    block = block_within_sample<S::kOwn>(g, slot);
  block.head = static_cast<int>(blockIdx.x % static_cast<unsigned>(g.heads));
  return block;
}

// ---- Tiles.

// 16 bytes, zeros unless valid; asynchronously where the view allows.
template <class T>
__device__ __forceinline__ void load_chunk(T* to, const T* from, bool valid, bool aligned) {
  if (aligned) {
    copy_async16(to, from, valid);
  } else {
#pragma unroll 1
    for (int j = 0; j < kVector<T>; ++j) {
      to[j] = from_float<T>(0.f);
      if (valid) to[j] = from[j];
    }
  }
}

// threadIdx.x as something new at every call: what follows from it is computed again rather than kept in registers
// through a loop that has none to spare.
__device__ __forceinline__ int thread_again() {
#ifdef FLEXDIT_EMULATED
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// Rows [0, count) of m, then zeros up to kRows. Eight threads side by side take 128 bytes of a row, so that a thread's
// addresses differ by constants; what is left of the rows comes last.
template <class S, int kRows, class T>
__device__ __forceinline__ void load_tile(T* tile, const View<T>& m, int count, int head_size) {
  constexpr int kChunks = S::kHead / kVector<T>, kRest = kChunks % 8, kStep = S::kThreads / 8;
  static_assert(kRows % kStep == 0);
  const int thread = thread_again();
  {
    const int row = thread / 8, column = thread % 8 * kVector<T>;
    T* to = tile + row * S::kStride + column;
    const T* from = m.data + row * m.stride + column;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep, from += kStep * m.stride)
#pragma unroll
      for (int c = 0; c < kChunks - kRest; c += 8)
        load_chunk(to + r * S::kStride + c * kVector<T>, from + c * kVector<T>,
                   row + r < count && column + c * kVector<T> < head_size, m.aligned);
  }
  if constexpr (kRest > 0) {
#pragma unroll
    for (int first = 0; first < kRows * kRest; first += S::kThreads) {
      const int row = (first + thread) / kRest, column = (kChunks - kRest + (first + thread) % kRest) * kVector<T>;
      if (row < kRows)
        load_chunk(tile + row * S::kStride + column, m.data + row * m.stride + column,
                   row < count && column < head_size, m.aligned);
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void write_zeros(const View<T>& m, int count, int columns) {
  for (int i = static_cast<int>(threadIdx.x); i < count * columns; i += S::kThreads)
    if (i / columns < m.rows) m.data[i / columns * m.stride + i % columns] = from_float<T>(0.f);
}

template <class T>
__device__ __forceinline__ void store_pair(T* to, float x, float y) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<Pair*>(to) = {x, y};
  } else {
    const uint32_t word = pack<T>(x, y);
    Vector<T, 2> values;
    memcpy(&values, &word, sizeof values);
    store(to, values);
  }
}

// The warp's rows of sums times `factor`, through its rows of a tile that nobody needs any more, to m.
template <class S, class T>
__device__ __forceinline__ void store_rows(const View<T>& m, int count, int head_size, T* tile,
                                           const typename S::Sums& sums, const float (&factor)[S::R][2]) {
  constexpr int kRows = 16 * S::R, kChunks = S::kHead / kVector<T>;
  const int first = static_cast<int>(threadIdx.x) / kWarp * kRows;
  T* own = tile + first * S::kStride;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < S::R; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < S::kHead / 8; ++n)
        store_pair(own + (16 * r + 8 * half + lane_row()) * S::kStride + 8 * n + lane_column(),
                   sums[r][n][2 * half] * factor[r][half], sums[r][n][2 * half + 1] * factor[r][half]);
  __syncwarp();
  for (int chunk = lane_of_thread(); chunk < kRows * kChunks; chunk += kWarp) {
    const int r = chunk / kChunks, column = chunk % kChunks * kVector<T>;
    if (first + r >= count || column >= head_size) continue;
    const auto values = load<kVector<T>>(own + r * S::kStride + column);
    T* to = m.data + (first + r) * m.stride + column;
    if (m.aligned) {
      store(to, values);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) to[j] = values.v[j];
    }
  }
}

// Scores in columns from `count` on vanish in the softmax.
template <int R, int N>
__device__ __forceinline__ void mask_columns(float (&scores)[R][N][4], int count) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * n + lane_column() + i % 2 >= count)
#pragma unroll
        for (int r = 0; r < R; ++r) scores[r][n][i] = -INFINITY;
}

}  // namespace flexdit::cuda
