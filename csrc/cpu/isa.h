// The CPU kernels are compiled once per instruction set, each time into a namespace of its own; table.cpp picks
// the best one at run time. This header says what is being compiled and holds the arithmetic they share.
// Kernels use nothing from the standard library that could be emitted out of line: the linker would keep one
// copy for all instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "flexdit/tensor.h"

#ifndef FLEXDIT_ISA
#define FLEXDIT_ISA baseline
#endif
#if defined(__AVX512F__)
#define FLEXDIT_VECTOR_BYTES 64
#elif defined(__AVX__)
#define FLEXDIT_VECTOR_BYTES 32
#else
#define FLEXDIT_VECTOR_BYTES 16
#endif

namespace flexdit::cpu::FLEXDIT_ISA {

struct bfloat16 {
  uint16_t bits;
};

// Storage type -> type of the arithmetic.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulate<T>::type;

inline float load(const float* p, int64_t i) { return p[i]; }
inline double load(const double* p, int64_t i) { return p[i]; }
inline float load(const bfloat16* p, int64_t i) { return __builtin_bit_cast(float, uint32_t{p[i].bits} << 16); }
inline void store(float* p, int64_t i, float v) { p[i] = v; }
inline void store(double* p, int64_t i, double v) { p[i] = v; }
inline void store(bfloat16* p, int64_t i, float v) {  // round to nearest even, NaN stays NaN
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p[i].bits = static_cast<uint16_t>(v == v ? rounded : 0x7fc0);
}

// e^x to about 1e-7 relative, written so that the compiler vectorises it: x = n ln 2 + r, polynomial in r.
inline float exponential(float x) {
  x = x > 88.3f ? 88.3f : x < -87.3f ? -87.3f : x;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.3888889e-3f;
  e = e * r + 8.3333333e-3f;
  e = e * r + 4.1666667e-2f;
  e = e * r + 1.6666667e-1f;
  e = e * r + 0.5f;
  e = e * r + 1.f;
  e = e * r + 1.f;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, e) + (static_cast<int32_t>(n) << 23));
}
inline double exponential(double x) { return std::exp(x); }

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }
inline double sigmoid(double x) { return 1. / (1. + std::exp(-x)); }

// GELU(x) = x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), because (1 + tanh u) / 2 = sigmoid(2 u).
template <class A>
inline A gelu_gate(A x) {
  return sigmoid(A(1.5957691216057308) * (x + A(0.044715) * x * x * x));
}
template <class A>
inline A gelu_derivative(A x, A gate) {
  return gate + x * gate * (1 - gate) * A(1.5957691216057308) * (1 + A(3 * 0.044715) * x * x);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
inline T* row(const Matrix& m, int64_t i) {
  return static_cast<T*>(m.data) + i * m.stride;
}

// Calls body(T{}) with the storage type of `dtype`. The CPU has no float16 arithmetic here; ops/ refuses it before.
template <class Body>
inline void with_type(DType dtype, Body&& body) {
  if (dtype == DType::float32) body(float{});
  if (dtype == DType::float64) body(double{});
  if (dtype == DType::bfloat16) body(bfloat16{});
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
