// That cuda/cublaslt_api.h says what NVIDIA's header says. Nothing runs: it compiles or it does not.
#include "cuda/cublaslt_api.h"

#include <cublasLt.h>

namespace api = flexdit::cublaslt;

static_assert(api::kSuccess == CUBLAS_STATUS_SUCCESS && api::kInvalidValue == CUBLAS_STATUS_INVALID_VALUE &&
              api::kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED && api::kComputeFloat32 == CUBLAS_COMPUTE_32F);
static_assert(api::kTypeFloat32 == CUDA_R_32F && api::kTypeFloat16 == CUDA_R_16F && api::kTypeBfloat16 == CUDA_R_16BF &&
              api::kNotTransposed == CUBLAS_OP_N && api::kTransposed == CUBLAS_OP_T);
static_assert(int(api::kTransA) == CUBLASLT_MATMUL_DESC_TRANSA && int(api::kTransB) == CUBLASLT_MATMUL_DESC_TRANSB &&
              int(api::kEpilogue) == CUBLASLT_MATMUL_DESC_EPILOGUE &&
              int(api::kBiasPointer) == CUBLASLT_MATMUL_DESC_BIAS_POINTER &&
              int(api::kBiasDataType) == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE &&
              int(api::kAuxPointer) == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER &&
              int(api::kAuxLd) == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
static_assert(int(api::kDefault) == CUBLASLT_EPILOGUE_DEFAULT && int(api::kBias) == CUBLASLT_EPILOGUE_BIAS &&
              int(api::kGelu) == CUBLASLT_EPILOGUE_GELU && int(api::kGeluBias) == CUBLASLT_EPILOGUE_GELU_BIAS &&
              int(api::kGeluAux) == CUBLASLT_EPILOGUE_GELU_AUX && int(api::kDgelu) == CUBLASLT_EPILOGUE_DGELU &&
              int(api::kGeluAuxBias) == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
static_assert(int(api::kMaxWorkspaceBytes) == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
              int(api::kMinAlignmentA) == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
              int(api::kMinAlignmentB) == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES &&
              int(api::kMinAlignmentC) == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES &&
              int(api::kMinAlignmentD) == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(sizeof(api::Algorithm) == sizeof(cublasLtMatmulAlgo_t) &&
              sizeof(api::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t) &&
              offsetof(api::HeuristicResult, workspace_bytes) ==
                  offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
              offsetof(api::HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));

// The same number of parameters, each of the same size: pointers and enumerations pass as they are.
template <class... A, class... B>
constexpr bool alike(api::Status (*)(A...), cublasStatus_t (*)(B...)) {
  if constexpr (sizeof...(A) != sizeof...(B))
    return false;
  else
    return ((sizeof(A) == sizeof(B)) && ...);
}
constexpr bool alike(const char* (*)(api::Status), const char* (*)(cublasStatus_t)) { return true; }
namespace flexdit::cublaslt {
#define FLEXDIT_COMPARE(result, name, parameters) static_assert(alike((result(*) parameters) nullptr, &cublasLt##name));
FLEXDIT_CUBLASLT_FUNCTIONS(FLEXDIT_COMPARE)
}  // namespace flexdit::cublaslt

int main() {}
