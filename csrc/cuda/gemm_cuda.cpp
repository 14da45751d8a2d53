// Linear layers through cuBLASLt, which is loaded at run time: nothing links to it, and a process that has imported
// torch has it already. Algorithms come from its heuristic, once per shape. Only those without workspace are asked for
// where the caller brings none: nothing is allocated here.
#include <cuda_runtime_api.h>

#include "cuda/kernels.h"

#ifdef FLEXDIT_CUBLASLT

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

namespace flexdit::cuda {
namespace {

#define FLEXDIT_STRINGIZE(x) #x
#define FLEXDIT_SONAME(major) "libcublasLt.so." FLEXDIT_STRINGIZE(major)

// The functions that are used, by their names without "cublasLt".
#define FLEXDIT_CUBLASLT_FUNCTIONS(FUNCTION)                                                   \
  FUNCTION(Create)                                                                             \
  FUNCTION(GetStatusString)                                                                    \
  FUNCTION(Matmul)                                                                             \
  FUNCTION(MatmulAlgoGetHeuristic) FUNCTION(MatmulDescCreate) FUNCTION(MatmulDescSetAttribute) \
      FUNCTION(MatmulDescDestroy) FUNCTION(MatrixLayoutCreate) FUNCTION(MatrixLayoutDestroy)   \
          FUNCTION(MatmulPreferenceCreate) FUNCTION(MatmulPreferenceSetAttribute) FUNCTION(MatmulPreferenceDestroy)

struct Library {
#define FLEXDIT_POINTER(name) decltype(&cublasLt##name) name = nullptr;
  FLEXDIT_CUBLASLT_FUNCTIONS(FLEXDIT_POINTER)
#undef FLEXDIT_POINTER
  std::string error;

  Library() {
    const char* path = std::getenv("FLEXDIT_CUBLASLT");
    void* handle = dlopen(path ? path : FLEXDIT_SONAME(CUBLAS_VER_MAJOR), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      error =
          std::string("cuBLASLt could not be loaded (") + dlerror() +
          "): install the CUDA toolkit's or PyPI's nvidia-cublas, and import torch first or set FLEXDIT_CUBLASLT to "
          "the path of " FLEXDIT_SONAME(CUBLAS_VER_MAJOR);
      return;
    }
#define FLEXDIT_SYMBOL(name)                                                \
  name = reinterpret_cast<decltype(name)>(dlsym(handle, "cublasLt" #name)); \
  if (!name) error = "cuBLASLt lacks cublasLt" #name;
    FLEXDIT_CUBLASLT_FUNCTIONS(FLEXDIT_SYMBOL)
#undef FLEXDIT_SYMBOL
  }
};
const Library& library() {
  static const Library loaded;
  return loaded;
}

// An operand of c (+)= a b + bias: a row-major matrix, perhaps read transposed.
struct Operand {
  Matrix matrix;
  bool transposed = false;
};
struct Product {
  const char* op;
  Operand a, b;
  Matrix c;
  Matrix bias = {};
  bool gelu = false, accumulate = false;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;

  int64_t depth() const { return a.transposed ? a.matrix.rows : a.matrix.cols; }
};

[[noreturn]] void fail(const Product& p, const std::string& words) {
  throw DeviceError(std::string(p.op) + " of [" + std::to_string(p.c.rows) + ", " + std::to_string(p.depth()) +
                    "] and [" + std::to_string(p.depth()) + ", " + std::to_string(p.c.cols) + "] in " +
                    name_of(p.c.dtype) + ": " + words);
}
void check(const Product& p, cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail(p, std::string(call) + " says \"" + library().GetStatusString(status) + "\"");
}
void check(const Product& p, cudaError_t status) {
  if (status != cudaSuccess) fail(p, std::string("CUDA says \"") + cudaGetErrorString(status) + "\"");
}

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::float32 ? CUDA_R_32F : dtype == DType::bfloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

struct Layout {
  cublasLtMatrixLayout_t handle = nullptr;
  // cuBLASLt counts in columns: a row-major [rows, cols] is its [cols, rows].
  Layout(const Product& p, const Matrix& m) {
    const int64_t stride = m.rows <= 1 ? std::max(m.stride, m.cols) : m.stride;
    check(p, library().MatrixLayoutCreate(&handle, type_of(m.dtype), uint64_t(m.cols), uint64_t(m.rows), stride),
          "cublasLtMatrixLayoutCreate");
  }
  Layout(const Layout&) = delete;
  ~Layout() { library().MatrixLayoutDestroy(handle); }
};

// c^T = b^T a^T in cuBLASLt's order, so b comes first.
struct Description {
  cublasLtMatmulDesc_t handle = nullptr;
  explicit Description(const Product& p) {
    check(p, library().MatmulDescCreate(&handle, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
      check(p, library().MatmulDescSetAttribute(handle, attribute, &value, sizeof value),
            "cublasLtMatmulDescSetAttribute");
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (p.bias) {
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(p.bias.data));
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(p.bias.dtype));
    }
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.gelu   ? p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU
                                       : p.bias ? CUBLASLT_EPILOGUE_BIAS
                                                : CUBLASLT_EPILOGUE_DEFAULT);
  }
  Description(const Description&) = delete;
  ~Description() { library().MatmulDescDestroy(handle); }
};

// The largest power of two up to 256 that divides an address.
uint32_t alignment_of(const Matrix& m) {
  const auto address = reinterpret_cast<uintptr_t>(m.data) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

using Key =
    std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, uint32_t, uint32_t, uint32_t>;
Key key_of(const Product& p, int device) {
  const int flags = p.a.transposed | p.b.transposed << 1 | p.gelu << 2 | p.accumulate << 3 | bool(p.bias) << 4 |
                    static_cast<int>(p.c.dtype) << 5;
  return {device,
          p.c.rows,
          p.c.cols,
          p.depth(),
          p.a.matrix.stride,
          p.b.matrix.stride,
          p.c.stride,
          p.workspace_bytes,
          flags,
          alignment_of(p.a.matrix),
          alignment_of(p.b.matrix),
          alignment_of(p.c)};
}

struct Preference {
  cublasLtMatmulPreference_t handle = nullptr;
  explicit Preference(const Product& p) {
    check(p, library().MatmulPreferenceCreate(&handle), "cublasLtMatmulPreferenceCreate");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(p, library().MatmulPreferenceSetAttribute(handle, attribute, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(p.workspace_bytes));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b.matrix));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a.matrix));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
  }
  Preference(const Preference&) = delete;
  ~Preference() { library().MatmulPreferenceDestroy(handle); }
};

// What is kept between calls: a handle per device and the heuristic's answers.
struct State {
  std::mutex mutex;
  std::map<int, cublasLtHandle_t> handles;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;
};
State& state() {
  static State kept;
  return kept;
}

void run(const Product& p, int device, cudaStream_t stream) {
  const Description description(p);
  const Layout a(p, p.a.matrix), b(p, p.b.matrix), c(p, p.c);
  cublasLtHandle_t handle;
  cublasLtMatmulAlgo_t algorithm;
  {
    const std::lock_guard lock(state().mutex);
    cublasLtHandle_t& made = state().handles[device];
    if (!made) check(p, library().Create(&made), "cublasLtCreate");
    handle = made;
    const Key key = key_of(p, device);
    auto found = state().algorithms.find(key);
    if (found == state().algorithms.end()) {
      const Preference preference(p);
      cublasLtMatmulHeuristicResult_t result;
      int count = 0;
      check(p,
            library().MatmulAlgoGetHeuristic(handle, description.handle, b.handle, a.handle, c.handle, c.handle,
                                             preference.handle, 1, &result, &count),
            "cublasLtMatmulAlgoGetHeuristic");
      if (count == 0) fail(p, "cuBLASLt has no algorithm");
      found = state().algorithms.emplace(key, result.algo).first;
    }
    algorithm = found->second;
  }
  const float one = 1, beta = p.accumulate ? 1 : 0;
  check(p,
        library().Matmul(handle, description.handle, &one, p.b.matrix.data, b.handle, p.a.matrix.data, a.handle, &beta,
                         p.c.data, c.handle, p.c.data, c.handle, &algorithm, p.workspace, size_t(p.workspace_bytes),
                         stream),
        "cublasLtMatmul");
}

void multiply(const Product& p, const Execution& exec) {
  if (p.c.rows == 0 || p.c.cols == 0) return;
  if (!library().error.empty()) fail(p, library().error);
  const auto stream = static_cast<cudaStream_t>(exec.stream);
  int before = 0;
  check(p, cudaGetDevice(&before));
  struct Restore {  // whatever is thrown
    int device;
    ~Restore() { cudaSetDevice(device); }
  } const restore{before};
  check(p, cudaSetDevice(exec.device_index));
  if (p.depth() > 0) return run(p, exec.device_index, stream);
  if (p.accumulate) return;
  const auto bytes = [&](int64_t values) { return static_cast<size_t>(values * size_of(p.c.dtype)); };
  check(p, cudaMemset2DAsync(p.c.data, bytes(p.c.stride), 0, bytes(p.c.cols), size_t(p.c.rows), stream));
}

}  // namespace

void linear(const Linear& p, const Execution& exec) {
  multiply({.op = "linear",
            .a = {p.x},
            .b = {p.weight, true},
            .c = p.y,
            .bias = p.bias,
            .gelu = p.activation == Activation::gelu_tanh},
           exec);
}

void linear_backward(const LinearBackward& p, const Execution& exec) {
  constexpr const char* name = "linear_backward";
  const int64_t bytes = p.workspace ? linear_backward_workspace(p.x.dtype, p.weight.rows, p.weight.cols) : 0;
  void* workspace = bytes ? p.workspace : nullptr;
  if (p.grad_x)
    multiply({.op = name,
              .a = {p.grad_y},
              .b = {p.weight},
              .c = p.grad_x,
              .accumulate = p.accumulate_grad_x,
              .workspace = workspace,
              .workspace_bytes = bytes},
             exec);
  if (p.grad_weight)
    multiply({.op = name,
              .a = {p.grad_y, true},
              .b = {p.x},
              .c = p.grad_weight,
              .workspace = workspace,
              .workspace_bytes = bytes},
             exec);
  if (p.grad_bias) column_sums(bias_gradient(p), exec);
}

}  // namespace flexdit::cuda

#else

namespace flexdit::cuda {
namespace {

[[noreturn]] void no_header(const char* op) {
  throw DeviceError(std::string(op) + ": this build of flexdit found no cublasLt.h. Install it with pip install " +
                    "nvidia-cublas (or the CUDA toolkit's libcublas-dev) and build flexdit again");
}

}  // namespace

void linear(const Linear&, const Execution&) { no_header("linear"); }
void linear_backward(const LinearBackward&, const Execution&) { no_header("linear_backward"); }

}  // namespace flexdit::cuda

#endif
