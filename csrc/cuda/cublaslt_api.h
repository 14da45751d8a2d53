// The part of cuBLASLt's binary interface that gemm_cuda.cpp uses, declared here because the library is loaded at run
// time: building needs none of its packages. Names are those of cublasLt.h without their prefix, enumerations are int;
// csrc/tests/cublaslt_api_test.cpp compares them with that header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexdit::cublaslt {

using Status = int;
constexpr Status kSuccess = 0, kInvalidValue = 7, kNotSupported = 15;
constexpr int kComputeFloat32 = 68;
constexpr int kTypeFloat32 = 0, kTypeFloat16 = 2, kTypeBfloat16 = 14;  // cudaDataType_t
constexpr int kNotTransposed = 0, kTransposed = 1;
enum DescAttribute : int {
  kTransA = 3,
  kTransB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxLd = 12,
  kBiasDataType = 26
};
enum EpilogueMode : int {
  kDefault = 1,
  kBias = 4,
  kGelu = 32,
  kGeluBias = 36,
  kGeluAux = 160,
  kGeluAuxBias = 164,
  kDgelu = 192
};
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kMinAlignmentA = 5,
  kMinAlignmentB,
  kMinAlignmentC,
  kMinAlignmentD
};

using Handle = struct ContextOpaque*;
using Layout = struct LayoutOpaque*;
using Desc = struct DescOpaque*;
using Preference = struct PreferenceOpaque*;
struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

// FUNCTION(result, name, parameters): the functions, by their names without "cublasLt".
#define FLEXDIT_CUBLASLT_FUNCTIONS(FUNCTION)                                                                           \
  FUNCTION(Status, Create, (Handle*))                                                                                  \
  FUNCTION(const char*, GetStatusString, (Status))                                                                     \
  FUNCTION(Status, MatrixLayoutCreate, (Layout*, int type, uint64_t rows, uint64_t cols, int64_t ld))                  \
  FUNCTION(Status, MatrixLayoutDestroy, (Layout))                                                                      \
  FUNCTION(Status, MatmulDescCreate, (Desc*, int compute_type, int scale_type))                                        \
  FUNCTION(Status, MatmulDescSetAttribute, (Desc, int attribute, const void* value, size_t bytes))                     \
  FUNCTION(Status, MatmulDescDestroy, (Desc))                                                                          \
  FUNCTION(Status, MatmulPreferenceCreate, (Preference*))                                                              \
  FUNCTION(Status, MatmulPreferenceSetAttribute, (Preference, int attribute, const void* value, size_t bytes))         \
  FUNCTION(Status, MatmulPreferenceDestroy, (Preference))                                                              \
  FUNCTION(                                                                                                            \
      Status, MatmulAlgoGetHeuristic,                                                                                  \
      (Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, HeuristicResult*, int* count))    \
  FUNCTION(                                                                                                            \
      Status, Matmul,                                                                                                  \
      (Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta, const void* c, \
       Layout, void* d, Layout, const Algorithm*, void* workspace, size_t workspace_bytes, void* stream))

}  // namespace flexdit::cublaslt
