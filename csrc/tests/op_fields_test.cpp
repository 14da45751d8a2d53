// That operations tell the arena checker which fields they read and which they write: the cases of op_cases.cpp.
#include <map>

#include "ops/trace.h"
#include "run_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

// What operations say, right away.
struct Listener : trace::Recorder {
  std::vector<trace::View> views;

  Listener() { trace::current = this; }
  ~Listener() override { trace::current = nullptr; }
  void operation(const char*, const std::vector<trace::View>& more) override {
    views.insert(views.end(), more.begin(), more.end());
  }
  void* piece(char* base, int64_t used, int64_t, bool) override { return base + used; }
  void allocated(void*, int64_t) override {}
  bool keeps(void*) override { return false; }

  // What is read, or written: where each stretch ends, by its beginning.
  std::map<uintptr_t, uintptr_t> stretches(bool written) const {
    std::map<uintptr_t, uintptr_t> rows, out;
    for (const trace::View& v : views)
      if (v.access == Access::update || (v.access == Access::write) == written)
        for (int64_t i = 0; i < v.rows; ++i) {
          const uintptr_t begin = reinterpret_cast<uintptr_t>(v.data) + uintptr_t(i * v.stride_bytes);
          rows[begin] = std::max(rows[begin], begin + uintptr_t(v.row_bytes));
        }
    for (const auto& [begin, end] : rows)
      if (!out.empty() && out.rbegin()->second >= begin)
        out.rbegin()->second = std::max(out.rbegin()->second, end);
      else
        out[begin] = end;
    return out;
  }
};

enum class Part { all, none };

void check_rows(const Listener& listener, bool written, std::vector<Tensor>& tensors, const std::vector<Field>& fields,
                bool differentiable, Part part, const std::string& name) {
  const auto stretches = listener.stretches(written);
  for (size_t f = 0; f < fields.size(); ++f) {
    if (!is_field(fields[f]) || (differentiable && !fields[f].differentiable)) continue;
    const Matrix m = tensors[f].view();
    for (int64_t i = 0; i < m.rows && m.cols > 0; ++i) {
      const auto begin = reinterpret_cast<uintptr_t>(m.row_range(i, 1).data);
      const uintptr_t end = begin + uintptr_t(m.cols * size_of(m.dtype));
      const auto after = stretches.lower_bound(end), last = after == stretches.begin() ? after : std::prev(after);
      const bool touched = after != stretches.begin() && last->second > begin;
      const bool whole = touched && last->first <= begin && last->second >= end;
      CHECK_NOTE(part == Part::all ? whole : !touched, name, ": row ", i, " of ", fields[f].name,
                 written ? ", written" : ", read");
    }
  }
}

// That an operation names the fields that it reads and those that it writes, all of them.
void check_fields(const OpCase& c, const Execution& exec) {
  const Inputs given = inputs_of(c);
  const std::string name = c.op + " " + c.variant;
  auto inputs = tensors_of(c.inputs, &given.in, DType::float32, true);
  auto outputs = tensors_of(c.outputs, nullptr, DType::float32, true);
  {
    Listener forward;
    c.forward(views_of(inputs, c.inputs, false), views_of(outputs, c.outputs, false), exec);
    check_rows(forward, true, outputs, c.outputs, false, Part::all, name);
    check_rows(forward, true, inputs, c.inputs, false, Part::none, name);
    check_rows(forward, false, inputs, c.inputs, false, Part::all, name);
  }
  if (c.backward) {
    auto grads_out = tensors_of(c.outputs, &given.grad_out, DType::float32, true);
    auto grads_in = tensors_of(c.inputs, nullptr, DType::float32, true);
    Listener backward;
    c.backward(views_of(inputs, c.inputs, false), views_of(grads_out, c.outputs, true),
               views_of(grads_in, c.inputs, true), exec);
    check_rows(backward, true, grads_in, c.inputs, true, Part::all, name + " backward");
    check_rows(backward, true, inputs, c.inputs, false, Part::none, name + " backward");
    if (!c.in_place) check_rows(backward, false, grads_out, c.outputs, true, Part::all, name + " backward");
  }
}

}  // namespace

TEST_CASE(operations_name_their_fields) {
  for (const auto& cases : {linear_cases(), elementwise_cases(), norm_cases(), exchange_cases(), attention_cases(),
                            end_cases(), empty_cases(), empty_token_cases()})
    for (const OpCase& c : cases) {
      check_fields(c, {.threads = 1});
      if (c.op != "attention")
        check_fields(c, {.device = Device::cuda});  // its heads have sizes that the kernels do not take
    }
}
