// Runs a case of op_cases.cpp: on a device, in a storage type, contiguous or as columns of a wider matrix, perhaps with
// spare rows behind the tokens. Outputs start as NaN and lie in guarded memory.
#pragma once

#include "check.h"
#include "op_case.h"

namespace flexdit::test {

// The largest error that any operation is allowed, relative to the largest magnitude of the result (at least 1): of
// float64 against naive loops, of the other types against float64. Beside it the worst seen on the CPU (AMD EPYC;
// AVX-512, AVX2 and baseline) and on the emulator, 2026-11-25.
struct Bound {
  DType dtype;
  double error;
};
constexpr Bound kBounds[] = {{DType::float64, 1e-14},  // 6.4e-16
                             {DType::float32, 5e-7},   // 2.1e-7, 2.8e-7
                             {DType::bfloat16, 8e-3},  // 5.4e-3, 5.5e-3
                             {DType::float16, 1e-3}};  // none,   7.1e-4
constexpr double kDerivativeBound = 3e-9;              // of float64 against finite differences: 9.3e-10

inline double bound(DType dtype) {
  for (const Bound& b : kBounds)
    if (b.dtype == dtype) return b.error;
  throw std::runtime_error("no bound for this storage type");
}

struct Inputs {
  std::vector<Values> in, grad_out;
};
// The same values for every device and storage type.
inline Inputs inputs_of(const OpCase& c) {
  uint64_t seed = 0;
  for (char letter : c.op + c.variant) seed = 31 * seed + static_cast<unsigned char>(letter);
  Random random(seed);
  Inputs out;
  for (const Field& f : c.inputs) out.in.push_back(random_values(f.rows, f.cols, random));
  for (const Field& f : c.outputs) out.grad_out.push_back(random_values(f.rows, f.cols, random));
  return out;
}

// Fields that get spare rows: those of tokens, which have more rows than any batch has samples.
inline bool has_tokens(const Field& f) { return f.rows > 9; }

inline std::vector<Tensor> tensors_of(const std::vector<Field>& fields, const std::vector<Values>* values, DType dtype,
                                      bool strided, int64_t spare = 0) {
  std::vector<Tensor> out;
  for (size_t i = 0; i < fields.size(); ++i) {
    const Field& f = fields[i];
    const DType type = f.accumulation ? accumulation_type(dtype) : dtype;
    out.emplace_back(f.rows + (has_tokens(f) ? spare : 0), f.cols, type, strided);
    if (values) out.back().fill((*values)[i]);
  }
  return out;
}

// Views of all tensors, empty ones for fields without a gradient when `differentiable`.
inline Views views_of(std::vector<Tensor>& tensors, const std::vector<Field>& fields, bool differentiable) {
  Views out;
  for (size_t i = 0; i < tensors.size(); ++i)
    out.push_back(differentiable && !fields[i].differentiable ? Matrix{} : tensors[i].view());
  return out;
}

struct Result {
  std::vector<Values> outputs, gradients;  // empty values where there is no gradient
};

inline Result run(const OpCase& c, const Inputs& given, DType dtype, bool strided, const Execution& exec,
                  int64_t spare = 0) {
  auto inputs = tensors_of(c.inputs, &given.in, dtype, strided, spare);
  auto outputs = tensors_of(c.outputs, nullptr, dtype, strided, spare);
  auto grads_out = tensors_of(c.outputs, &given.grad_out, dtype, strided, spare);
  auto grads_in = tensors_of(c.inputs, nullptr, dtype, strided, spare);
  Result result;
  c.forward(views_of(inputs, c.inputs, false), views_of(outputs, c.outputs, false), exec);
  for (Tensor& t : outputs) result.outputs.push_back(t.values());
  if (c.backward) {
    c.backward(views_of(inputs, c.inputs, false), views_of(grads_out, c.outputs, true),
               views_of(grads_in, c.inputs, true), exec);
    for (size_t i = 0; i < c.inputs.size(); ++i)
      result.gradients.push_back(c.inputs[i].differentiable ? grads_in[i].values() : Values());
  }
  for (const auto* tensors : {&inputs, &outputs, &grads_out, &grads_in})
    for (const Tensor& t : *tensors) CHECK_NOTE(t.guards_intact(), c.op, " ", c.variant);
  for (size_t i = 0; i < c.inputs.size(); ++i)
    CHECK_NOTE(identical(rows_of(inputs[i].values(), 0, c.inputs[i].rows), given.in[i]), c.op, " ", c.variant,
               " changed ", c.inputs[i].name);
  return result;
}

inline void check_identical(const std::vector<Values>& a, const std::vector<Values>& b, const std::string& what) {
  for (size_t i = 0; i < a.size(); ++i) CHECK_NOTE(identical(a[i], b[i]), what, " ", i);
}

// The largest error seen by each test case and storage type, printed at the end.
struct Worst {
  double seen[4] = {};
  ~Worst() { std::printf("  largest errors: float32 %.1e, bfloat16 %.1e, float16 %.1e\n", seen[0], seen[1], seen[2]); }
  void compare(const Values& got, const Values& wanted, DType dtype, const std::string& what) {
    const double e = error(got, wanted);
    seen[static_cast<int>(dtype)] = std::max(seen[static_cast<int>(dtype)], e);
    CHECK_NOTE(e <= bound(dtype), what, " in ", name_of(dtype), ": error ", e);
  }
  void compare(const Result& got, const Result& wanted, DType dtype, const OpCase& c) {
    const std::string name = c.op + " " + c.variant;
    for (size_t i = 0; i < got.outputs.size(); ++i)
      compare(got.outputs[i], wanted.outputs[i], dtype, name + " output " + c.outputs[i].name);
    for (size_t i = 0; i < got.gradients.size(); ++i)
      compare(got.gradients[i], wanted.gradients[i], dtype, name + " gradient of " + c.inputs[i].name);
  }
};

}  // namespace flexdit::test
