// Products of small matrices by one warp. Below: the instructions mma and ldmatrix, each with a twin for the emulator.
// Above them: C += A B^T and C += A B with 16 R rows of A held by the warp and B in shared memory, for bfloat16 and
// float16 on the tensor cores and with the same interface for float32 as plain FMAs (tf32 would lose 13 bits).
//
// Everything is cut into 16 x 8 tiles; lane 4 g + t holds the elements (g, 2t), (g, 2t + 1), (g + 8, 2t) and
// (g + 8, 2t + 1) of a tile: as float[4] where sums are kept, packed in two words where a tile is an operand. So a tile
// of sums becomes an operand without leaving its lane.
//
// Rows in shared memory are kStride elements apart, an odd number of 16-byte chunks: the eight rows that an instruction
// reads lie in different banks without any swizzle, and addresses differ by constants.
#pragma once

#include "cuda/device.h"

namespace flexdit::cuda {

template <class T, int kCols>
constexpr int kTileStride = ((kCols * int(sizeof(T)) / 16) | 1) * 16 / int(sizeof(T));

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int lane_row() { return lane_of_thread() / 4; }         // g
__device__ __forceinline__ int lane_column() { return lane_of_thread() % 4 * 2; }  // 2t

// 2^x to 2 ulp; -inf gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef FLEXDIT_EMULATED
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ int count_bits(uint32_t word) {
#ifdef FLEXDIT_EMULATED
  return __builtin_popcount(word);
#else
  return __popc(word);
#endif
}

// Two values in a word, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef FLEXDIT_EMULATED
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
#else
  uint32_t word;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

// ---- ldmatrix: kMatrices 8 x 8 matrices of 2-byte values. Lane 8 i + r brings the address of row r of matrix i; lane
// 4 g + t gets elements (g, 2t), (g, 2t + 1) of each matrix, of its transpose with kTransposed.

#ifdef FLEXDIT_EMULATED
// Matrices two of whose rows lay in the same banks: each costs a real ldmatrix another pass.
inline thread_local int64_t bank_conflicts = 0;

template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t* words, const void* row) {
  const unsigned lane = emulator::lane_id();
  const unsigned char* rows = emulator::warp_exchange(&row, sizeof row, kAllLanes, "ldmatrix");
  if (lane < 8 * kMatrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix of an unaligned row");
    emulator::check_shared(row, 16, "ldmatrix");
  }
  for (unsigned i = 0; i < kMatrices; ++i) {
    const auto at = [&](unsigned r) {
      const unsigned char* address;
      std::memcpy(&address, rows + (8 * i + r) * sizeof address, sizeof address);
      return address;
    };
    if (kTransposed)
      for (unsigned j = 0; j < 2; ++j)
        std::memcpy(reinterpret_cast<unsigned char*>(words + i) + 2 * j, at(lane % 4 * 2 + j) + lane / 4 * 2, 2);
    else
      std::memcpy(words + i, at(lane / 4) + lane % 4 * 4, 4);
    uint32_t banks = 0;
    for (unsigned r = 0; r < 8; ++r) banks |= 1u << reinterpret_cast<uintptr_t>(at(r)) / 16 % 8;
    if (lane == 0 && banks != 0xff) ++bank_conflicts;
  }
}
#else
template <int kMatrices, bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t* words, const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 4 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (kMatrices == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
}
#endif

// ---- mma: c[16 x 8] += a[16 x k] b[k x 8], k = 8 kChunks. Two words of a and one of b per 8 of k; b's word holds rows
// 2t and 2t + 1 of column g.

#ifdef FLEXDIT_EMULATED
template <class T, int kChunks>
void mma(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  struct Operands {
    uint32_t a[kChunks][2], b[kChunks];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const unsigned char* all = emulator::warp_exchange(&mine, sizeof mine, kAllLanes, "mma");
  const unsigned g = emulator::lane_id() / 4, t = emulator::lane_id() % 4;
  const auto value = [](uint32_t word, int half) { return to_float(T{static_cast<uint16_t>(word >> 16 * half)}); };
  for (unsigned lane = 0; lane < 4; ++lane) {  // the lane of each row, or column, that holds 2 lane and 2 lane + 1 of k
    Operands row, columns[2];
    std::memcpy(&row, all + (4 * g + lane) * sizeof row, sizeof row);
    for (unsigned j = 0; j < 2; ++j) std::memcpy(&columns[j], all + (4 * (2 * t + j) + lane) * sizeof row, sizeof row);
    for (int chunk = 0; chunk < kChunks; ++chunk)
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) c[i] += value(row.a[chunk][i / 2], half) * value(columns[i % 2].b[chunk], half);
  }
}
#else
#define FLEXDIT_MMA(type)                                                      \
  if constexpr (kChunks == 2)                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  else                                                                         \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                  \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(b[0]))

template <class T, int kChunks>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  static_assert(kChunks == 1 || kChunks == 2);
  if constexpr (std::is_same_v<T, bfloat16>) {
    FLEXDIT_MMA("bf16");
  } else {
    FLEXDIT_MMA("f16");
  }
}
#undef FLEXDIT_MMA
#endif

// ---- The left operand: 16 rows of kCols values, held by the warp.

template <class T, int kCols>
struct Rows {
  uint32_t words[kCols / 4];  // two for each 16 x 8 tile

  template <int kStride>
  __device__ __forceinline__ void load(const T* tile) {
    const T* row = tile + lane_of_thread() % 16 * kStride + lane_of_thread() / 16 * 8;
#pragma unroll
    for (int i = 0; i + 1 < kCols / 8; i += 2) load_matrices<4, false>(words + 2 * i, row + 8 * i);
    if constexpr (kCols / 8 % 2)
      load_matrices<2, false>(words + kCols / 4 - 2, tile + lane_of_thread() % 16 * kStride + kCols - 8);
  }
  // From sums, rounded. The tensor cores need no scratch.
  __device__ __forceinline__ void take(const float (&sums)[kCols / 8][4], float*) {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) words[2 * i + j] = pack<T>(sums[i][2 * j], sums[i][2 * j + 1]);
  }
};

struct alignas(8) Pair {
  float x, y;
};

// float32 stays in shared memory.
template <int kCols>
struct Rows<float, kCols> {
  const float* first;
  int stride;

  template <int kStride>
  __device__ __forceinline__ void load(const float* tile) {
    first = tile, stride = kStride;
  }
  // `scratch` has 16 rows that belong to this warp and these sums.
  __device__ __forceinline__ void take(const float (&sums)[kCols / 8][4], float* scratch) {
    first = scratch, stride = kTileStride<float, kCols>;
    __syncwarp();  // who still reads what was there before
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        *reinterpret_cast<Pair*>(scratch + (lane_row() + 8 * j) * stride + 8 * i + lane_column()) = {
            sums[i][2 * j], sums[i][2 * j + 1]};
    __syncwarp();
  }
  __device__ __forceinline__ Vector<float, 4> four(int half, int k) const {
    return cuda::load<4>(first + (lane_row() + 8 * half) * stride + k);
  }
};

// ---- c += a b^T: the rows of b are c's columns.

template <int kStride, int R, int N, int kCols, class T>
__device__ __forceinline__ void multiply_transposed(float (&c)[R][N][4], const Rows<T, kCols> (&a)[R], const T* b) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int k = 0; k + 1 < kCols / 8; k += 2)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t words[4];
      load_matrices<4, false>(words, b + (8 * n + lane / 16 * 8 + lane % 8) * kStride + 8 * k + lane / 8 % 2 * 8);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        mma<T, 2>(c[r][n], a[r].words + 2 * k, words);
        mma<T, 2>(c[r][n + 1], a[r].words + 2 * k, words + 2);
      }
    }
  if constexpr (kCols / 8 % 2) {  // head size 72: the last 8 alone, four of c's tiles at once, or its two
    constexpr int kAtOnce = N % 4 == 0 ? 4 : 2;
    static_assert(N % kAtOnce == 0);
#pragma unroll
    for (int n = 0; n < N; n += kAtOnce) {
      uint32_t words[kAtOnce];
      load_matrices<kAtOnce, false>(words, b + (8 * n + lane % (8 * kAtOnce)) * kStride + kCols - 8);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int r = 0; r < R; ++r) mma<T, 1>(c[r][n + i], a[r].words + kCols / 4 - 2, words + i);
    }
  }
}

template <int kStride, int R, int N, int kCols>
__device__ __forceinline__ void multiply_transposed(float (&c)[R][N][4], const Rows<float, kCols> (&a)[R],
                                                    const float* b) {
#pragma unroll 2
  for (int k = 0; k < kCols; k += 4) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float* column = b + (8 * n + lane_column()) * kStride + k;
      const Vector<float, 4> columns[2] = {load<4>(column), load<4>(column + kStride)};
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Vector<float, 4> row = a[r].four(half, k);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) c[r][n][2 * half + j] += row.v[i] * columns[j].v[i];
        }
    }
  }
}

// ---- c += a b.

template <int kStride, int R, int N, int kCols, class T>
__device__ __forceinline__ void multiply(float (&c)[R][N][4], const Rows<T, kCols> (&a)[R], const T* b) {
  static_assert(kCols % 16 == 0);
  const int lane = lane_of_thread();
#pragma unroll
  for (int k = 0; k < kCols / 8; k += 2) {
    const T* row = b + (8 * k + lane % 16) * kStride;
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      uint32_t words[4];
      load_matrices<4, true>(words, row + 8 * n + lane / 16 * 8);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        mma<T, 2>(c[r][n], a[r].words + 2 * k, words);
        mma<T, 2>(c[r][n + 1], a[r].words + 2 * k, words + 2);
      }
    }
    if constexpr (N % 2) {
      uint32_t words[2];
      load_matrices<2, true>(words, row + 8 * (N - 1));
#pragma unroll
      for (int r = 0; r < R; ++r) mma<T, 2>(c[r][N - 1], a[r].words + 2 * k, words);
    }
  }
}

template <int kStride, int R, int N, int kCols>
__device__ __forceinline__ void multiply(float (&c)[R][N][4], const Rows<float, kCols> (&a)[R], const float* b) {
#pragma unroll 1
  for (int k = 0; k < kCols; k += 4) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Vector<float, 4> rows[2] = {a[r].four(0, k), a[r].four(1, k)};
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Pair columns = *reinterpret_cast<const Pair*>(b + (k + i) * kStride + 8 * n + lane_column());
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            c[r][n][2 * half] += rows[half].v[i] * columns.x;
            c[r][n][2 * half + 1] += rows[half].v[i] * columns.y;
          }
        }
    }
  }
}

}  // namespace flexdit::cuda
