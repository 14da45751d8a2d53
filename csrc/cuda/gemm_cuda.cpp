// Linear layers through cuBLASLt, which is loaded at run time: nothing links to it, and a process that has imported
// torch has it already. Algorithms come from its heuristic, once per shape, or are timed once per shape with
// FLEXDIT_TUNE=1. Only those without workspace are asked for where the caller brings none: nothing is allocated here.
// GELU and its derivative run in the product's epilogue where cuBLASLt can do that, else as kernels of their own.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>

#include "cuda/cublaslt_api.h"
#include "cuda/kernels.h"

namespace flexdit::cuda {
namespace {

using namespace cublaslt;

struct Library {
#define FLEXDIT_POINTER(result, name, parameters) result(*name) parameters = nullptr;
  FLEXDIT_CUBLASLT_FUNCTIONS(FLEXDIT_POINTER)
#undef FLEXDIT_POINTER
  std::string error;

  Library() {
    void* handle = open();
    if (!handle) return;
#define FLEXDIT_SYMBOL(result, name, parameters)                            \
  name = reinterpret_cast<decltype(name)>(dlsym(handle, "cublasLt" #name)); \
  if (!name) error = "cuBLASLt lacks cublasLt" #name ", at least version 11.6 is needed";
    FLEXDIT_CUBLASLT_FUNCTIONS(FLEXDIT_SYMBOL)
#undef FLEXDIT_SYMBOL
  }

 private:
  // The version that belongs to this build, else another one, which torch may have brought.
  void* open() {
    constexpr int kMajor = CUDART_VERSION / 1000;
    const auto name_of = [](int major) { return "libcublasLt.so." + std::to_string(major); };
    const char* path = std::getenv("FLEXDIT_CUBLASLT");
    const std::string wanted = path ? path : name_of(kMajor);
    if (void* handle = dlopen(wanted.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    error = std::string("cuBLASLt could not be loaded (") + dlerror() + "). Install it with pip install nvidia-cublas" +
            (kMajor < 13 ? "-cu" + std::to_string(kMajor) : "") +
            " or with the CUDA toolkit; then import torch first, or set FLEXDIT_CUBLASLT to the path of " +
            name_of(kMajor);
    for (int major : {13, 12})
      if (void* handle = path ? nullptr : dlopen(name_of(major).c_str(), RTLD_NOW | RTLD_LOCAL)) {
        error.clear();
        return handle;
      }
    return nullptr;
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
// What happens to a product on its way to c.
enum class Epilogue {
  none,
  gelu,           // c = GELU(product + bias), and aux = product + bias unless it is empty
  gelu_gradient,  // c = product GELU'(aux)
};
struct Product {
  const char* op;
  Operand a, b;
  Matrix c;
  Matrix bias = {}, aux = {};
  Epilogue epilogue = Epilogue::none;
  bool accumulate = false;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;

  int64_t depth() const { return a.transposed ? a.matrix.rows : a.matrix.cols; }
};

[[noreturn]] void fail(const Product& p, const std::string& words) {
  throw DeviceError(std::string(p.op) + " of [" + std::to_string(p.c.rows) + ", " + std::to_string(p.depth()) +
                    "] and [" + std::to_string(p.depth()) + ", " + std::to_string(p.c.cols) + "] in " +
                    name_of(p.c.dtype) + ": " + words);
}
void check(const Product& p, Status status, const char* call) {
  if (status == kSuccess) return;
  fail(p, std::string(call) + " says \"" + library().GetStatusString(status) + "\"");
}
void check(const Product& p, cudaError_t status) {
  if (status != cudaSuccess) fail(p, std::string("CUDA says \"") + cudaGetErrorString(status) + "\"");
}

int type_of(DType dtype) {
  return dtype == DType::float32 ? kTypeFloat32 : dtype == DType::bfloat16 ? kTypeBfloat16 : kTypeFloat16;
}
// cuBLASLt counts in columns: a row-major [rows, cols] is its [cols, rows]. The stride of a single row says nothing.
int64_t leading_dimension(const Matrix& m) { return m.rows <= 1 ? std::max(m.stride, m.cols) : m.stride; }

struct LayoutOf {
  Layout handle = nullptr;
  LayoutOf(const Product& p, const Matrix& m) {
    check(p,
          library().MatrixLayoutCreate(&handle, type_of(m.dtype), uint64_t(m.cols), uint64_t(m.rows),
                                       leading_dimension(m)),
          "cublasLtMatrixLayoutCreate");
  }
  LayoutOf(const LayoutOf&) = delete;
  ~LayoutOf() { library().MatrixLayoutDestroy(handle); }
};

EpilogueMode mode_of(const Product& p) {
  if (p.epilogue == Epilogue::gelu_gradient) return kDgelu;
  if (p.epilogue == Epilogue::none) return p.bias ? kBias : kDefault;
  if (p.aux) return p.bias ? kGeluAuxBias : kGeluAux;
  return p.bias ? kGeluBias : kGelu;
}

// c^T = b^T a^T in cuBLASLt's order, so b comes first.
struct Description {
  Desc handle = nullptr;
  explicit Description(const Product& p) {
    check(p, library().MatmulDescCreate(&handle, kComputeFloat32, kTypeFloat32), "cublasLtMatmulDescCreate");
    const auto set = [&](DescAttribute attribute, auto value) {
      check(p, library().MatmulDescSetAttribute(handle, attribute, &value, sizeof value),
            "cublasLtMatmulDescSetAttribute");
    };
    set(kTransA, int32_t{p.b.transposed ? kTransposed : kNotTransposed});
    set(kTransB, int32_t{p.a.transposed ? kTransposed : kNotTransposed});
    set(kEpilogue, int32_t{mode_of(p)});
    if (p.bias) set(kBiasPointer, static_cast<const void*>(p.bias.data)), set(kBiasDataType, type_of(p.bias.dtype));
    if (p.aux) set(kAuxPointer, p.aux.data), set(kAuxLd, leading_dimension(p.aux));
  }
  Description(const Description&) = delete;
  ~Description() { library().MatmulDescDestroy(handle); }
};

// The largest power of two up to 256 that divides an address.
uint32_t alignment_of(const Matrix& m) {
  const auto address = reinterpret_cast<uintptr_t>(m.data) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

// What an algorithm depends on.
using Key = std::array<int64_t, 15>;
Key key_of(const Product& p, int device) {
  const int64_t flags = p.a.transposed | p.b.transposed << 1 | p.accumulate << 2;
  return {device,
          p.c.rows,
          p.c.cols,
          p.depth(),
          p.a.matrix.stride,
          p.b.matrix.stride,
          p.c.stride,
          p.aux.stride,
          p.workspace_bytes,
          flags | int64_t{mode_of(p)} << 8,
          static_cast<int64_t>(p.c.dtype),
          alignment_of(p.a.matrix),
          alignment_of(p.b.matrix),
          alignment_of(p.c),
          alignment_of(p.aux) << 9 | alignment_of(p.bias)};
}

struct PreferenceOf {
  Preference handle = nullptr;
  explicit PreferenceOf(const Product& p) {
    check(p, library().MatmulPreferenceCreate(&handle), "cublasLtMatmulPreferenceCreate");
    const auto set = [&](PreferenceAttribute attribute, auto value) {
      check(p, library().MatmulPreferenceSetAttribute(handle, attribute, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute");
    };
    set(kMaxWorkspaceBytes, uint64_t(p.workspace_bytes));
    set(kMinAlignmentA, alignment_of(p.b.matrix));
    set(kMinAlignmentB, alignment_of(p.a.matrix));
    set(kMinAlignmentC, alignment_of(p.c));
    set(kMinAlignmentD, alignment_of(p.c));
  }
  PreferenceOf(const PreferenceOf&) = delete;
  ~PreferenceOf() { library().MatmulPreferenceDestroy(handle); }
};

// What is kept between calls: a handle per device, and each shape's algorithm, or that there is none.
struct State {
  std::mutex mutex;
  std::map<int, Handle> handles;
  std::map<Key, std::optional<Algorithm>> algorithms;
};
State& state() {
  static State kept;
  return kept;
}

// One product as cuBLASLt is called with it.
class Call {
 public:
  Call(const Product& p, int device, cudaStream_t stream)
      : p_(p), device_(device), stream_(stream), description_(p), a_(p, p.a.matrix), b_(p, p.b.matrix), c_(p, p.c) {}

  // False where cuBLASLt has no algorithm.
  bool run() {
    const std::optional<Algorithm> algorithm = find();
    if (!algorithm) return false;
    const Status status = run(*algorithm);
    if (status == kNotSupported && p_.epilogue != Epilogue::none) {
      const std::lock_guard lock(state().mutex);
      state().algorithms[key_of(p_, device_)].reset();
      return false;
    }
    check(p_, status, "cublasLtMatmul");
    return true;
  }

 private:
  Status run(const Algorithm& algorithm) const {
    const float one = 1, beta = p_.accumulate ? 1 : 0;
    return library().Matmul(handle_, description_.handle, &one, p_.b.matrix.data, b_.handle, p_.a.matrix.data,
                            a_.handle, &beta, p_.c.data, c_.handle, p_.c.data, c_.handle, &algorithm, p_.workspace,
                            size_t(p_.workspace_bytes), stream_);
  }

  std::optional<Algorithm> find() {
    const std::lock_guard lock(state().mutex);
    Handle& handle = state().handles[device_];
    if (!handle) check(p_, library().Create(&handle), "cublasLtCreate");
    handle_ = handle;
    const Key key = key_of(p_, device_);
    if (const auto found = state().algorithms.find(key); found != state().algorithms.end()) return found->second;
    const bool tunes = asked_to_tune() && !p_.accumulate;  // c must not change but once
    if (tunes && capturing()) return choose(false);        // measured when it next runs for itself
    return state().algorithms.emplace(key, choose(tunes)).first->second;
  }

  std::optional<Algorithm> choose(bool measured) const {
    constexpr int kCandidates = 8;
    const PreferenceOf preference(p_);
    std::array<HeuristicResult, kCandidates> results;
    int count = 0;
    const Status status =
        library().MatmulAlgoGetHeuristic(handle_, description_.handle, b_.handle, a_.handle, c_.handle, c_.handle,
                                         preference.handle, measured ? kCandidates : 1, results.data(), &count);
    if (status == kNotSupported) return {};
    check(p_, status, "cublasLtMatmulAlgoGetHeuristic");
    std::optional<Algorithm> best;
    float best_time = 0;
    for (int i = 0; i < count; ++i) {
      if (results[size_t(i)].state != kSuccess) continue;
      const Algorithm& algorithm = results[size_t(i)].algorithm;
      if (!measured) return algorithm;
      const float time = time_of(algorithm);
      if (time >= 0 && (!best || time < best_time)) best = algorithm, best_time = time;
    }
    return best;
  }

  static bool asked_to_tune() {
    static const char* wanted = std::getenv("FLEXDIT_TUNE");
    return wanted && std::strcmp(wanted, "1") == 0;
  }
  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(p_, cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }
  // Milliseconds of a few runs after one to warm up; negative where it does not run.
  float time_of(const Algorithm& algorithm) const {
    constexpr int kRuns = 10;
    if (run(algorithm) != kSuccess) return -1;
    cudaEvent_t begin, end;
    float time = 0;
    check(p_, cudaEventCreate(&begin));
    check(p_, cudaEventCreate(&end));
    check(p_, cudaEventRecord(begin, stream_));
    for (int i = 0; i < kRuns; ++i) check(p_, run(algorithm), "cublasLtMatmul");
    check(p_, cudaEventRecord(end, stream_));
    check(p_, cudaEventSynchronize(end));
    check(p_, cudaEventElapsedTime(&time, begin, end));
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return time;
  }

  const Product& p_;
  int device_;
  cudaStream_t stream_;
  Handle handle_ = nullptr;
  Description description_;
  LayoutOf a_, b_, c_;
};

// What NVIDIA demands of the matrix before GELU; the rest its heuristic decides.
bool fits_epilogue(const Matrix& aux) {
  return !aux || (reinterpret_cast<uintptr_t>(aux.data) % 16 == 0 && leading_dimension(aux) % 8 == 0);
}

// The product, then its epilogue.
void run_unfused(const Product& p, const Execution& exec) {
  Product plain = p;
  plain.epilogue = Epilogue::none, plain.aux = {};
  if (p.epilogue == Epilogue::gelu && p.aux) plain.c = p.aux;
  if (!Call(plain, exec.device_index, static_cast<cudaStream_t>(exec.stream)).run())
    fail(p, "cuBLASLt has no algorithm for this product");
  if (p.epilogue == Epilogue::gelu) cuda::gelu({.x = plain.c, .y = p.c}, exec);
  if (p.epilogue == Epilogue::gelu_gradient)
    cuda::gelu_backward({.x = p.aux, .grad_y = p.c, .y = {}, .grad_x = p.c}, exec);
}

void multiply(const Product& p, const Execution& exec) {
  if (p.c.rows == 0 || p.c.cols == 0) return;
  if (!library().error.empty()) fail(p, library().error);
  int before = 0;
  check(p, cudaGetDevice(&before));
  struct Restore {  // whatever is thrown
    int device;
    ~Restore() { cudaSetDevice(device); }
  } const restore{before};
  check(p, cudaSetDevice(exec.device_index));
  const auto stream = static_cast<cudaStream_t>(exec.stream);
  if (p.depth() == 0) {  // a sum over no rows, which cuBLASLt does not take
    const auto bytes = [&](int64_t values) { return static_cast<size_t>(values * size_of(p.c.dtype)); };
    if (!p.accumulate)
      check(p, cudaMemset2DAsync(p.c.data, bytes(p.c.stride), 0, bytes(p.c.cols), size_t(p.c.rows), stream));
    return;
  }
  const bool fused = p.epilogue != Epilogue::none && fits_epilogue(p.aux);
  if (!fused || !Call(p, exec.device_index, stream).run()) run_unfused(p, exec);
}

}  // namespace

void linear(const Linear& p, const Execution& exec) {
  multiply({.op = "linear",
            .a = {p.x},
            .b = {p.weight, true},
            .c = p.y,
            .bias = p.bias,
            .aux = p.pre_activation,
            .epilogue = p.activation == Activation::gelu_tanh ? Epilogue::gelu : Epilogue::none},
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
              .aux = p.gelu_input,
              .epilogue = p.gelu_input ? Epilogue::gelu_gradient : Epilogue::none,
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
