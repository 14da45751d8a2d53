// A cuBLASLt for tests: the functions that gemm_cuda.cpp uses, as loops over column-major matrices as NVIDIA documents
// them, strict about attributes, shapes, alignment and which algorithm is for which product. It proves how
// gemm_cuda.cpp asks, not what cuBLASLt answers.
#include "fake_cublaslt.h"

#include <cmath>
#include <cstring>
#include <map>

#include "cuda/cublaslt_api.h"
#include "support.h"

namespace flexdit::cublaslt {

struct LayoutOpaque {
  int type;
  int64_t rows, cols, ld;
};
struct DescOpaque {
  std::map<int, int64_t> values;  // pointers too
  int get(int attribute) const { return values.count(attribute) ? static_cast<int>(values.at(attribute)) : 0; }
  const void* pointer(int attribute) const {
    return values.count(attribute) ? reinterpret_cast<const void*>(values.at(attribute)) : nullptr;
  }
  int epilogue() const { return get(kEpilogue); }
  bool biased() const { return epilogue() == kBias || epilogue() == kGeluBias || epilogue() == kGeluAuxBias; }
  bool has_aux() const { return epilogue() == kGeluAux || epilogue() == kGeluAuxBias || epilogue() == kDgelu; }
};
struct PreferenceOpaque {
  std::map<int, uint64_t> values;
};

namespace {

FakeCublasLt control;

bool aligned(const void* p, uint64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
DType dtype_of(int type) {
  return type == kTypeFloat32 ? DType::float32 : type == kTypeBfloat16 ? DType::bfloat16 : DType::float16;
}
double element(const void* data, int type, int64_t ld, int64_t i, int64_t j) {
  const DType dtype = dtype_of(type);
  return test::read(static_cast<const char*>(data) + (i + j * ld) * size_of(dtype), dtype);
}
void put(void* data, int type, int64_t ld, int64_t i, int64_t j, double value) {
  const DType dtype = dtype_of(type);
  test::write(static_cast<char*>(data) + (i + j * ld) * size_of(dtype), dtype, value);
}

double gate(double x) { return 0.5 * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
double gelu(double x) { return x * gate(x); }
double gelu_derivative(double x) {
  return gate(x) + x * 2 * gate(x) * (1 - gate(x)) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}

// m, n and k of a product, or nothing if its parts do not fit together.
struct Sizes {
  int64_t m = 0, n = 0, k = -1;
};
Sizes sizes_of(const DescOpaque& d, Layout a, Layout b, Layout c, Layout out) {
  const bool ta = d.get(kTransA) == kTransposed, tb = d.get(kTransB) == kTransposed;
  const Sizes s{ta ? a->cols : a->rows, tb ? b->rows : b->cols, ta ? a->rows : a->cols};
  const auto is = [&](Layout l) { return l->rows == s.m && l->cols == s.n && l->type == a->type; };
  if (s.k < 1 || s.k != (tb ? b->cols : b->rows) || b->type != a->type || !is(c) || !is(out)) return {};
  if (d.biased() && (!d.pointer(kBiasPointer) || d.get(kBiasDataType) != a->type)) return {};
  if (d.has_aux()) {
    const int64_t ld = d.values.count(kAuxLd) ? d.values.at(kAuxLd) : 0;
    if (!d.pointer(kAuxPointer) || !aligned(d.pointer(kAuxPointer), 16) || ld < s.m || ld % 8) return {};
  }
  return s;
}

// An algorithm remembers what it was found for: number, alignments and workspace, then a hash of the product.
Algorithm algorithm_for(int number, const DescOpaque& d, const Sizes& s, int type, const PreferenceOpaque& preference) {
  Algorithm out = {};
  const auto value = [&](int attribute, uint64_t otherwise) {
    return preference.values.count(attribute) ? preference.values.at(attribute) : otherwise;
  };
  out.data[0] = static_cast<uint64_t>(number);
  for (int i = 0; i < 4; ++i) out.data[1 + i] = value(kMinAlignmentA + i, 256);
  out.data[5] = value(kMaxWorkspaceBytes, 0);
  uint64_t hash = 17;
  for (int64_t v :
       {s.m, s.n, s.k, int64_t{type}, int64_t{d.epilogue()}, int64_t{d.get(kTransA)}, int64_t{d.get(kTransB)}})
    hash = hash * 1000003 ^ static_cast<uint64_t>(v);
  out.data[6] = hash;
  return out;
}

bool refuses(const DescOpaque& d) {
  const bool plain = d.epilogue() == kDefault || d.epilogue() == kBias;
  return control.refuses_all || (!plain && control.refuses != FakeCublasLt::nothing);
}

}  // namespace
}  // namespace flexdit::cublaslt

using namespace flexdit;
using namespace flexdit::cublaslt;

extern "C" {

FakeCublasLt* fake_cublaslt() { return &control; }

Status cublasLtCreate(Handle* handle) {
  static int one;
  *handle = reinterpret_cast<Handle>(&one);
  return kSuccess;
}
const char* cublasLtGetStatusString(Status status) {
  return status == kNotSupported ? "the functionality is not supported" : "an unsupported value or parameter";
}

Status cublasLtMatrixLayoutCreate(Layout* out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (ld < int64_t(rows) || (type != kTypeFloat32 && type != kTypeFloat16 && type != kTypeBfloat16))
    return kInvalidValue;
  *out = new LayoutOpaque{type, int64_t(rows), int64_t(cols), ld};
  return kSuccess;
}
Status cublasLtMatrixLayoutDestroy(Layout layout) { return delete layout, kSuccess; }

Status cublasLtMatmulDescCreate(Desc* out, int compute, int scale) {
  if (compute != kComputeFloat32 || scale != kTypeFloat32) return kNotSupported;
  *out = new DescOpaque{{{kEpilogue, kDefault}}};
  return kSuccess;
}
Status cublasLtMatmulDescSetAttribute(Desc desc, int attribute, const void* value, size_t bytes) {
  const std::map<int, size_t> sizes = {{kTransA, 4},       {kTransB, 4},     {kEpilogue, 4}, {kBiasPointer, 8},
                                       {kBiasDataType, 4}, {kAuxPointer, 8}, {kAuxLd, 8}};
  const auto size = sizes.find(attribute);
  if (size == sizes.end() || size->second != bytes) return kInvalidValue;
  int64_t stored = 0;
  std::memcpy(&stored, value, bytes);
  desc->values[attribute] = stored;
  return kSuccess;
}
Status cublasLtMatmulDescDestroy(Desc desc) { return delete desc, kSuccess; }

Status cublasLtMatmulPreferenceCreate(Preference* out) { return *out = new PreferenceOpaque, kSuccess; }
Status cublasLtMatmulPreferenceSetAttribute(Preference preference, int attribute, const void* value, size_t bytes) {
  const bool is_alignment = attribute >= kMinAlignmentA && attribute <= kMinAlignmentD;
  if (bytes != (is_alignment ? 4u : 8u) || (!is_alignment && attribute != kMaxWorkspaceBytes)) return kInvalidValue;
  uint64_t stored = 0;
  std::memcpy(&stored, value, bytes);
  const bool power = stored >= 2 && stored <= 256 && (stored & (stored - 1)) == 0;
  if (is_alignment && !power) return kInvalidValue;
  preference->values[attribute] = stored;
  return kSuccess;
}
Status cublasLtMatmulPreferenceDestroy(Preference preference) { return delete preference, kSuccess; }

Status cublasLtMatmulAlgoGetHeuristic(Handle, Desc desc, Layout a, Layout b, Layout c, Layout d, Preference preference,
                                      int wanted, HeuristicResult* results, int* count) {
  const Sizes sizes = sizes_of(*desc, a, b, c, d);
  if (sizes.k < 0 || wanted < 1) return kInvalidValue;
  ++control.heuristics;
  *count = 0;
  const bool refused = refuses(*desc) && control.refuses != FakeCublasLt::at_run;
  if (refused && (control.refuses_all || control.refuses == FakeCublasLt::status)) return kNotSupported;
  if (refused && control.refuses == FakeCublasLt::no_algorithm) return kSuccess;
  for (; *count < wanted; ++*count)
    results[*count] = {
        algorithm_for(*count, *desc, sizes, a->type, *preference), 0, refused ? kNotSupported : kSuccess, 1, {}};
  return kSuccess;
}

Status cublasLtMatmul(Handle, Desc desc, const void* alpha, const void* a, Layout la, const void* b, Layout lb,
                      const void* beta, const void* c, Layout lc, void* d, Layout ld, const Algorithm* algorithm,
                      void* workspace, size_t workspace_bytes, void*) {
  const Sizes s = sizes_of(*desc, la, lb, lc, ld);
  if (s.k < 0 || !algorithm || (workspace_bytes && !workspace)) return kInvalidValue;
  Algorithm wanted = algorithm_for(int(algorithm->data[0]), *desc, s, la->type, {});
  if (wanted.data[6] != algorithm->data[6] || algorithm->data[5] > workspace_bytes) return kInvalidValue;
  const void* operands[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    if (!aligned(operands[i], algorithm->data[1 + i])) return kInvalidValue;
  if (refuses(*desc)) return kNotSupported;

  const int epilogue = desc->epilogue();
  const bool ta = desc->get(kTransA) == kTransposed, tb = desc->get(kTransB) == kTransposed;
  ++control.products;
  control.epilogues += epilogue != kDefault && epilogue != kBias;
  control.last_algorithm = static_cast<int>(algorithm->data[0]);
  control.milliseconds += 8 - static_cast<float>(algorithm->data[0]);
  const double scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  void* aux = const_cast<void*>(desc->pointer(kAuxPointer));
  const int64_t aux_ld = aux ? desc->values.at(kAuxLd) : 0;
  for (int64_t i = 0; i < s.m; ++i)
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = keep != 0 ? keep * element(c, lc->type, lc->ld, i, j) : 0;
      for (int64_t l = 0; l < s.k; ++l)
        sum += scale * (ta ? element(a, la->type, la->ld, l, i) : element(a, la->type, la->ld, i, l)) *
               (tb ? element(b, lb->type, lb->ld, j, l) : element(b, lb->type, lb->ld, l, j));
      if (desc->biased()) sum += element(desc->pointer(kBiasPointer), la->type, s.m, i, 0);
      if (epilogue == kDgelu) sum *= gelu_derivative(element(aux, la->type, aux_ld, i, j));
      if (epilogue == kGeluAux || epilogue == kGeluAuxBias) put(aux, la->type, aux_ld, i, j, sum);
      const bool activated = epilogue != kDefault && epilogue != kBias && epilogue != kDgelu;
      put(d, ld->type, ld->ld, i, j, activated ? gelu(sum) : sum);
    }
  return kSuccess;
}

}  // extern "C"
