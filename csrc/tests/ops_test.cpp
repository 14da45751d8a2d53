// Every operation: forward against naive loops, backward against finite differences, both in float64; then float32
// and bfloat16 against float64. Outputs start as NaN, lie in guarded memory, contiguous and as columns of a wider
// matrix.
#include <cstdlib>

#include "check.h"
#include "cpu/kernels.h"
#include "op_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

// Largest allowed error, relative to the largest magnitude of the result (at least 1): float64 forward against the
// naive loops and backward against finite differences; then against float64. Behind each line the largest seen on
// an AMD EPYC (AVX-512, AVX2, baseline), 2026-11-22.
struct Tolerance {
  const char* op;
  double float64[2], float32[2], bfloat16[2];  // forward, backward
};
constexpr Tolerance kTolerances[] = {
    {"linear", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},  // 1.6e-16 3.0e-11, 1.5e-7 7.4e-8, 2.7e-3 2.4e-3
    {"gelu", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},    // 1.1e-16 3.1e-12, 7.1e-8 5.7e-8, 1.9e-3 1.9e-3
    {"silu", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},    // 1.1e-16 1.7e-12, 6.9e-8 8.2e-8, 1.8e-3 1.7e-3
    {"modulated_layer_norm",
     {1e-14, 3e-9},
     {1e-6, 1e-6},
     {8e-3, 8e-3}},                                                 // 6.4e-16 6.8e-10, 1.5e-7 1.6e-7, 2.9e-3 3.3e-3
    {"modulated_mean", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},  // 6.1e-16 1.4e-10, 1.3e-7 1.3e-7, 2.4e-3 3.3e-3
    {"gated_residual", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},  // 5.2e-16 1.6e-10, 2.1e-7 6.5e-8, 5.4e-3 3.1e-3
    {"pool_tokens", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},     // 5.6e-17 7.3e-11, 2.0e-8 6.2e-8, 2.0e-3 2.9e-3
    {"gather_sparse", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},   // 6.1e-16 5.6e-10, 1.6e-7 0, 5.1e-3 3.9e-3
    {"add_position", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},    // 0, 0, 2.3e-3
    {"attention", {1e-14, 3e-9}, {1e-6, 1e-6}, {8e-3, 8e-3}},       // 3.2e-16 3.2e-11, 1.1e-7 1.9e-7, 1.8e-3 2.0e-3
};

const Tolerance& tolerance_of(const std::string& op) {
  for (const Tolerance& t : kTolerances)
    if (op == t.op) return t;
  throw std::runtime_error(op + " is not in the table of tolerances");
}

struct Result {
  std::vector<Values> outputs, gradients;  // empty values where there is no gradient
};

std::vector<Tensor> tensors_of(const std::vector<Field>& fields, DType dtype, bool strided) {
  std::vector<Tensor> out;
  for (const Field& f : fields)
    out.emplace_back(f.rows, f.cols, f.accumulation ? accumulation_type(dtype) : dtype, strided);
  return out;
}

// Views of all tensors, empty ones for fields without a gradient when `differentiable`.
Views views_of(std::vector<Tensor>& tensors, const std::vector<Field>& fields, bool differentiable) {
  Views out;
  for (size_t i = 0; i < tensors.size(); ++i)
    out.push_back(differentiable && !fields[i].differentiable ? Matrix{} : tensors[i].view());
  return out;
}

void check_guards(const OpCase& c, const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) CHECK_NOTE(t.guards_intact(), c.op, " ", c.variant);
}

Result run(const OpCase& c, const std::vector<Values>& in, const std::vector<Values>& grad_out, DType dtype,
           bool strided, int threads) {
  const Execution exec{.threads = threads};
  std::vector<Tensor> inputs, outputs = tensors_of(c.outputs, dtype, strided), grads_out;
  std::vector<Tensor> grads_in = tensors_of(c.inputs, dtype, strided);
  for (const Values& v : in) inputs.emplace_back(v, dtype, strided);
  for (const Values& v : grad_out) grads_out.emplace_back(v, dtype, strided);

  Result result;
  c.forward(views_of(inputs, c.inputs, false), views_of(outputs, c.outputs, false), exec);
  for (Tensor& t : outputs) result.outputs.push_back(t.values());
  if (c.backward) {
    c.backward(views_of(inputs, c.inputs, false), views_of(grads_out, c.outputs, true),
               views_of(grads_in, c.inputs, true), exec);
    for (size_t i = 0; i < in.size(); ++i)
      result.gradients.push_back(c.inputs[i].differentiable ? grads_in[i].values() : Values());
  }
  for (const auto* tensors : {&inputs, &outputs, &grads_out, &grads_in}) check_guards(c, *tensors);
  for (size_t i = 0; i < in.size(); ++i)
    CHECK_NOTE(identical(inputs[i].values(), in[i]), c.op, " ", c.variant, " changed ", c.inputs[i].name);
  return result;
}

double worst(const std::vector<Values>& a, const std::vector<Values>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, error(a[i], b[i]));
  return largest;
}

// The largest error of the gradients along some directions.
double gradient_error(const OpCase& c, std::vector<Values> in, const std::vector<Values>& grad_out,
                      const std::vector<Values>& gradients, Random& random) {
  const auto loss = [&] {
    const std::vector<Values> out = c.naive(in);
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i)
      if (c.outputs[i].differentiable) sum += dot(out[i], grad_out[i]);
    return sum;
  };
  double largest = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!c.inputs[i].differentiable) continue;
    for (const Values& along : directions(in[i], c.large ? 1 : 4, c.large ? 1 : 12, random)) {
      const double wanted = derivative(in[i], along, loss), got = dot(gradients[i], along);
      const double relative = std::abs(got - wanted) / std::max(1.0, std::abs(wanted));
      largest = std::isnan(relative) ? INFINITY : std::max(largest, relative);
    }
  }
  return largest;
}

struct Errors {
  double float64[2] = {}, float32[2] = {}, bfloat16[2] = {};
};

void raise(double& largest, double value, double allowed, const OpCase& c, const char* what) {
  CHECK_NOTE(value <= allowed, c.op, " ", c.variant, ": ", what, " error ", value, ", allowed ", allowed);
  largest = std::max(largest, value);
}

void check_case(const OpCase& c, Errors& seen) {
  uint64_t seed = 0;
  for (char letter : c.op + c.variant) seed = 31 * seed + static_cast<unsigned char>(letter);
  Random random(seed);
  std::vector<Values> in, grad_out;
  for (const Field& f : c.inputs) in.push_back(random_values(f.rows, f.cols, random));
  for (const Field& f : c.outputs) grad_out.push_back(random_values(f.rows, f.cols, random));
  const Tolerance& allowed = tolerance_of(c.op);

  const Result exact = run(c, in, grad_out, DType::float64, false, 1);
  raise(seen.float64[0], worst(exact.outputs, c.naive(in)), allowed.float64[0], c, "float64 forward");
  if (c.backward)
    raise(seen.float64[1], gradient_error(c, in, grad_out, exact.gradients, random), allowed.float64[1], c,
          "float64 backward");
  const Result strided = run(c, in, grad_out, DType::float64, true, 2);
  for (size_t i = 0; i < exact.outputs.size(); ++i)
    CHECK_NOTE(identical(strided.outputs[i], exact.outputs[i]), c.op, " ", c.variant, " output ", i);
  for (size_t i = 0; i < exact.gradients.size(); ++i)
    CHECK_NOTE(identical(strided.gradients[i], exact.gradients[i]), c.op, " ", c.variant, " gradient ", i);

  for (bool wide : {false, true}) {
    const Result single = run(c, in, grad_out, DType::float32, wide, wide ? 2 : 1);
    raise(seen.float32[0], worst(single.outputs, exact.outputs), allowed.float32[0], c, "float32 forward");
    raise(seen.float32[1], worst(single.gradients, exact.gradients), allowed.float32[1], c, "float32 backward");
    const Result half = run(c, in, grad_out, DType::bfloat16, wide, wide ? 2 : 1);
    raise(seen.bfloat16[0], worst(half.outputs, exact.outputs), allowed.bfloat16[0], c, "bfloat16 forward");
    raise(seen.bfloat16[1], worst(half.gradients, exact.gradients), allowed.bfloat16[1], c, "bfloat16 backward");
  }
}

void check_cases(const std::vector<OpCase>& cases) {
  for (size_t first = 0; first < cases.size();) {
    Errors seen;
    const std::string op = cases[first].op;
    for (const OpCase& c : cases)
      if (c.op == op) check_case(c, seen);
    std::printf("  %-21s float64 %.1e %.1e  float32 %.1e %.1e  bfloat16 %.1e %.1e\n", op.c_str(), seen.float64[0],
                seen.float64[1], seen.float32[0], seen.float32[1], seen.bfloat16[0], seen.bfloat16[1]);
    const auto done = [&](size_t i) {
      for (size_t j = 0; j < i; ++j)
        if (cases[j].op == cases[i].op) return true;
      return false;
    };
    for (++first; first < cases.size() && done(first);) ++first;
  }
}

// With one field cut by a column, or missing, the error names the operation and, where the field does not itself
// say what the sizes are, the field.
void check_field(const OpCase& c, const std::string& op, const Field& field, const std::string& name, Matrix& view,
                 const std::function<void()>& call) {
  const Matrix whole = view;
  view.cols -= 1;
  const std::string cut = argument_error(call);
  CHECK_NOTE(cut.rfind(op + ": ", 0) == 0, op, " ", c.variant, ", ", name, " cut: ", cut);
  CHECK_NOTE(field.sizes || cut.rfind(op + ": " + name + " is [", 0) == 0, op, ", ", name, " cut: ", cut);
  view = Matrix{nullptr, whole.rows, whole.cols, whole.stride, whole.dtype};
  if (!field.optional) {
    const std::string missing = argument_error(call);
    CHECK_NOTE(missing == op + ": " + name + " is missing", op, ", no ", name, ": ", missing);
  }
  view = whole;
}

void check_arguments(const OpCase& c) {
  const auto real = [](const std::vector<Field>& fields) {
    return std::all_of(fields.begin(), fields.end(), is_field);
  };
  if (!real(c.outputs) || c.in_place) return;
  Random random(1);
  std::vector<Tensor> inputs, outputs = tensors_of(c.outputs, DType::float32, true);
  for (const Field& f : c.inputs) inputs.emplace_back(random_values(f.rows, f.cols, random), DType::float32, true);
  Views in = views_of(inputs, c.inputs, false), out = views_of(outputs, c.outputs, false);
  const auto forward = [&] { c.forward(in, out, {}); };
  for (size_t i = 0; i < in.size(); ++i)
    if (is_field(c.inputs[i])) check_field(c, c.op, c.inputs[i], c.inputs[i].name, in[i], forward);
  for (size_t i = 0; i < out.size(); ++i) check_field(c, c.op, c.outputs[i], c.outputs[i].name, out[i], forward);
  if (!c.backward) return;
  std::vector<Tensor> grads = tensors_of(c.inputs, DType::float32, true);
  Views grad_out = views_of(outputs, c.outputs, true), grad_in = views_of(grads, c.inputs, true);
  const auto backward = [&] { c.backward(in, grad_out, grad_in, {}); };
  const auto check_gradient = [&](const Field& field, Matrix& view, bool optional) {
    if (!view) return;
    Field named = field;
    named.optional = optional;
    check_field(c, c.op + "_backward", named, std::string("grad_") + field.name, view, backward);
  };
  for (size_t i = 0; i < grad_out.size(); ++i) check_gradient(c.outputs[i], grad_out[i], false);
  for (size_t i = 0; i < grad_in.size(); ++i) check_gradient(c.inputs[i], grad_in[i], c.op == "linear");
}

}  // namespace

// First, so that the log says what the numbers belong to.
TEST_CASE(instruction_set_is_the_one_asked_for) {
  const char* wanted = std::getenv("FLEXDIT_ISA");
  std::printf("  instruction set %s\n", cpu::instruction_set());
  check::skipped = wanted && std::string(wanted) != cpu::instruction_set();
}

TEST_CASE(linear_layers) { check_cases(linear_cases()); }
TEST_CASE(elementwise) { check_cases(elementwise_cases()); }
TEST_CASE(norms_and_residuals) { check_cases(norm_cases()); }
TEST_CASE(token_exchange) { check_cases(exchange_cases()); }
TEST_CASE(attentions) { check_cases(attention_cases()); }

TEST_CASE(arguments) {
  for (const auto& cases : {linear_cases(), elementwise_cases(), norm_cases(), exchange_cases(), attention_cases()})
    for (const OpCase& c : cases)
      if (!c.large) check_arguments(c);
}
