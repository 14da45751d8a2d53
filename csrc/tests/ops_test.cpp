// Every operation on the CPU: forward against naive loops, backward against finite differences, both in float64; then
// float32 and bfloat16 against float64, contiguous and strided, on one thread and on two.
#include <cstdlib>

#include "cpu/kernels.h"
#include "run_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

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
  double float64[2] = {}, float32[2] = {}, bfloat16[2] = {};  // forward, backward
};

void raise(double& largest, double value, double allowed, const OpCase& c, const char* what) {
  CHECK_NOTE(value <= allowed, c.op, " ", c.variant, ": ", what, " error ", value, ", allowed ", allowed);
  largest = std::max(largest, value);
}

void check_case(const OpCase& c, Errors& seen) {
  const Inputs given = inputs_of(c);
  const Result exact = run(c, given, DType::float64, false, {.threads = 1});
  raise(seen.float64[0], worst(exact.outputs, c.naive(given.in)), bound(DType::float64), c, "float64 forward");
  Random random(1);
  if (c.backward)
    raise(seen.float64[1], gradient_error(c, given.in, given.grad_out, exact.gradients, random), kDerivativeBound, c,
          "float64 backward");
  const Result strided = run(c, given, DType::float64, true, {.threads = 2});
  check_identical(strided.outputs, exact.outputs, c.op + " " + c.variant + " output");
  check_identical(strided.gradients, exact.gradients, c.op + " " + c.variant + " gradient");

  for (bool wide : {false, true})
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      const Result got = run(c, given, dtype, wide, {.threads = wide ? 2 : 1});
      double* largest = dtype == DType::float32 ? seen.float32 : seen.bfloat16;
      raise(largest[0], worst(got.outputs, exact.outputs), bound(dtype), c, "forward");
      raise(largest[1], worst(got.gradients, exact.gradients), bound(dtype), c, "backward");
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
  std::vector<Tensor> inputs, outputs = tensors_of(c.outputs, nullptr, DType::float32, true);
  for (const Field& f : c.inputs) inputs.emplace_back(random_values(f.rows, f.cols, random), DType::float32, true);
  Views in = views_of(inputs, c.inputs, false), out = views_of(outputs, c.outputs, false);
  const auto forward = [&] { c.forward(in, out, {}); };
  for (size_t i = 0; i < in.size(); ++i)
    if (is_field(c.inputs[i])) check_field(c, c.op, c.inputs[i], c.inputs[i].name, in[i], forward);
  for (size_t i = 0; i < out.size(); ++i) check_field(c, c.op, c.outputs[i], c.outputs[i].name, out[i], forward);
  if (!c.backward) return;
  std::vector<Tensor> grads = tensors_of(c.inputs, nullptr, DType::float32, true);
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
TEST_CASE(ends_of_the_model) { check_cases(end_cases()); }
TEST_CASE(attentions) { check_cases(attention_cases()); }

TEST_CASE(nothing_to_do) {
  for (const OpCase& c : empty_cases()) {
    const Inputs given = inputs_of(c);
    for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16}) {
      const Result got = run(c, given, dtype, false, {});
      check_identical(got.outputs, c.naive(given.in), c.op + " " + c.variant);
      for (const Values& gradient : got.gradients) CHECK(identical(gradient, Values(gradient.rows, gradient.cols)));
    }
  }
}

TEST_CASE(row_maps_and_searches) {
  for (const auto& cases : {norm_cases(), exchange_cases(), end_cases()})
    for (const OpCase& c : cases) {
      const Inputs given = inputs_of(c);
      const Result mapped = run(c, given, DType::float32, false, {});
      row_maps = false;
      const Result searched = run(c, given, DType::float32, false, {});
      row_maps = true;
      check_identical(searched.outputs, mapped.outputs, c.op + " " + c.variant + " output");
      check_identical(searched.gradients, mapped.gradients, c.op + " " + c.variant + " gradient");
    }
}

TEST_CASE(arguments) {
  for (const auto& cases : {linear_cases(), elementwise_cases(), norm_cases(), exchange_cases(), attention_cases()})
    for (const OpCase& c : cases)
      if (!c.large) check_arguments(c);
}
