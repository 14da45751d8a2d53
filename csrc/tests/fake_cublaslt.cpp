// A cuBLASLt for tests: the functions that gemm_cuda.cpp uses, as loops over column-major matrices as NVIDIA documents
// them, strict about shapes and alignment. It proves how gemm_cuda.cpp asks, not what cuBLASLt answers.
#include <cublasLt.h>

#include <cmath>
#include <cstring>
#include <map>

#include "support.h"

using namespace flexdit;

namespace {

struct Layout {
  cudaDataType_t type;
  int64_t rows, cols, ld;
};
struct Description {
  std::map<int, int32_t> values;
  const void* bias = nullptr;
};

DType dtype_of(cudaDataType_t type) {
  return type == CUDA_R_32F ? DType::float32 : type == CUDA_R_16BF ? DType::bfloat16 : DType::float16;
}
double element(const void* data, const Layout& l, int64_t i, int64_t j) {
  const DType dtype = dtype_of(l.type);
  return test::read(static_cast<const char*>(data) + (i + j * l.ld) * size_of(dtype), dtype);
}
const Layout& layout(const void* handle) { return *static_cast<const Layout*>(handle); }

double finish(double sum, int epilogue, double bias) {
  const bool gelu = epilogue == CUBLASLT_EPILOGUE_GELU || epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
  sum += bias;
  return gelu ? 0.5 * sum * (1 + std::tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum))) : sum;
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(new int);
  return CUBLAS_STATUS_SUCCESS;
}
const char* cublasLtGetStatusString(cublasStatus_t) { return "an invalid value"; }

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  if (ld < int64_t(rows)) return CUBLAS_STATUS_INVALID_VALUE;
  *out = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, int64_t(rows), int64_t(cols), ld});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete reinterpret_cast<Layout*>(l);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t compute, cudaDataType_t scale) {
  if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  *out = reinterpret_cast<cublasLtMatmulDesc_t>(new Description);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  auto& d = *reinterpret_cast<Description*>(desc);
  const bool pointer = attribute == CUBLASLT_MATMUL_DESC_BIAS_POINTER;
  if (bytes != (pointer ? 8u : 4u)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(pointer ? static_cast<void*>(&d.bias) : &d.values[attribute], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  delete reinterpret_cast<Description*>(desc);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
  *out = reinterpret_cast<cublasLtMatmulPreference_t>(new int);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  uint32_t alignment = 0;
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
    return bytes == 8 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
  if (bytes != 4) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&alignment, value, 4);
  const bool power = alignment >= 2 && alignment <= 256 && (alignment & (alignment - 1)) == 0;
  return power ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete reinterpret_cast<int*>(preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* count) {
  *results = {};
  *count = wanted;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void*, size_t,
                              cudaStream_t) {
  auto& description = *reinterpret_cast<Description*>(desc);
  const Layout &la = layout(a_layout), &lb = layout(b_layout), &lc = layout(c_layout), &ld = layout(d_layout);
  const bool ta = description.values[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T;
  const bool tb = description.values[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
  const int64_t m = ta ? la.cols : la.rows, k = ta ? la.rows : la.cols, n = tb ? lb.rows : lb.cols;
  if (k != (tb ? lb.cols : lb.rows) || ld.rows != m || ld.cols != n || lc.rows != m || !algorithm)
    return CUBLAS_STATUS_INVALID_VALUE;
  const DType dtype = dtype_of(ld.type);
  const int epilogue = description.values[CUBLASLT_MATMUL_DESC_EPILOGUE];
  const bool biased = epilogue == CUBLASLT_EPILOGUE_BIAS || epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
  const double scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  const Layout bias_layout{ld.type, m, 1, m};
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = keep != 0 ? keep * element(c, lc, i, j) : 0;
      for (int64_t l = 0; l < k; ++l)
        sum += scale * (ta ? element(a, la, l, i) : element(a, la, i, l)) *
               (tb ? element(b, lb, j, l) : element(b, lb, l, j));
      const double bias = biased ? element(description.bias, bias_layout, i, 0) : 0;
      test::write(static_cast<char*>(d) + (i + j * ld.ld) * size_of(dtype), dtype, finish(sum, epilogue, bias));
    }
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
