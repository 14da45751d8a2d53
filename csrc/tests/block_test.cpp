// The four blocks: forward with and without a context, gradients, and what the results must not depend on: the
// other samples of the batch, the number of threads, and what the caller's buffers held before.
#include "flexdit/block.h"

#include "check.h"
#include "naive.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

constexpr BlockKind kKinds[] = {BlockKind::pooling, BlockKind::dense, BlockKind::generation, BlockKind::recovery};
const naive::Grids kDense = {{1, 4, 4}, {1, 3, 5}, {1, 1, 1}, {2, 2, 3}};
const naive::Grids kSparse = {{1, 2, 2}, {1, 2, 3}, {1, 1, 1}, {1, 2, 2}};
const naive::Grids kSameCount = {{1, 4, 3}, {1, 3, 4}}, kSameCountSparse = {{1, 2, 2}, {1, 1, 3}};

bool is_cross(BlockKind kind) { return kind == BlockKind::generation || kind == BlockKind::recovery; }

// Everything that goes into a block; `other` and `position` may be empty.
struct Inputs {
  BlockKind kind;
  int64_t c, mlp, heads;
  naive::Grids grids, other_grids;
  Values x, other, condition, position, grad_out;
  std::vector<Values> parameters;
  bool strided = true;  // tokens lie as columns of a wider matrix
  double mlp_norm_eps = kLayerNormEps;

  BlockShape shape(DType dtype) const {
    return {.kind = kind,
            .hidden = c,
            .mlp_hidden = mlp,
            .num_heads = heads,
            .batch = static_cast<int64_t>(grids.size()),
            .rows = x.rows,
            .other_rows = other.rows,
            .dtype = dtype};
  }
};

Inputs make(BlockKind kind, int64_t c, int64_t mlp, int64_t heads, bool with_position = false) {
  Random random(static_cast<uint64_t>(kind) + 1);
  const auto& dense = with_position ? kSameCount : kDense;
  const auto& sparse = with_position ? kSameCountSparse : kSparse;
  const bool on_sparse = kind == BlockKind::generation;
  Inputs in{.kind = kind, .c = c, .mlp = mlp, .heads = heads, .grids = on_sparse ? sparse : dense, .other_grids = {}};
  if (is_cross(kind)) in.other_grids = on_sparse ? dense : sparse;
  in.x = random_values(naive::total(in.grids), c, random);
  in.other = random_values(naive::total(in.other_grids), c, random);
  in.grad_out = random_values(in.x.rows, c, random);
  in.condition = random_values(static_cast<int64_t>(in.grids.size()), c, random);
  if (with_position) in.position = random_values(in.grids[0].tokens(), c, random);
  for (const ParameterSpec& spec : block_parameters(kind, c, mlp))
    in.parameters.push_back(
        random_values(spec.rows, spec.cols, random, spec.rows == 1 ? 0.5 : 2 / std::sqrt(spec.cols)));
  return in;
}

// The part of a batch that belongs to one sample.
Inputs sample_of(const Inputs& in, int64_t b) {
  const HostLayout layout(in.grids), other_layout(in.other_grids);
  const auto rows = [b](const Values& v, const TokenLayout& l) {
    return rows_of(v, l.offset(b), l.offset(b + 1) - l.offset(b));
  };
  Inputs one = in;
  one.grids = {in.grids[static_cast<size_t>(b)]};
  one.x = rows(in.x, layout.view()), one.grad_out = rows(in.grad_out, layout.view());
  one.condition = rows_of(in.condition, b, 1);
  if (is_cross(in.kind)) {
    one.other_grids = {in.other_grids[static_cast<size_t>(b)]};
    one.other = rows(in.other, other_layout.view());
  }
  return one;
}

// An input as the block sees it: rounded to the storage type, between guards.
struct Stored {
  HostLayout layout, other_layout;
  Tensor x, other, condition, position, out;
  std::vector<Tensor> parameters;
  std::vector<Matrix> parameter_views;

  Stored(const Inputs& in, DType dtype)
      : layout(in.grids),
        other_layout(in.other_grids),
        x(in.x, dtype, in.strided),
        other(in.other, dtype, in.strided),
        condition(in.condition, dtype, in.strided),
        position(in.position, dtype),
        out(in.x.rows, in.c, dtype, in.strided) {
    for (const Values& v : in.parameters) parameters.emplace_back(v, dtype);
    for (Tensor& t : parameters) parameter_views.push_back(t.view());
  }
  BlockForward call(const Inputs& in, DType dtype, void* context, void* workspace) {
    return {.shape = in.shape(dtype),
            .parameters = parameter_views,
            .layout = layout.view(),
            .other_layout = other_layout.view(),
            .x = x.view(),
            .other = in.other.rows ? other.view() : Matrix{},
            .condition = condition.view(),
            .position = in.position.rows ? position.view() : Matrix{},
            .out = out.view(),
            .context = context,
            .workspace = workspace,
            .mlp_norm_eps = in.mlp_norm_eps};
  }
};

Values forward(const Inputs& in, DType dtype, int threads, bool keeps_context) {
  Stored s(in, dtype);
  GuardedBytes context(keeps_context ? block_context_bytes(in.shape(dtype)) : 0);
  GuardedBytes workspace(block_workspace_bytes(in.shape(dtype), keeps_context));
  block_forward(s.call(in, dtype, keeps_context ? context.data() : nullptr, workspace.data()), {.threads = threads});
  CHECK_NOTE(context.intact() && workspace.intact() && s.out.guards_intact(), name_of(in.kind), " ", name_of(dtype));
  return s.out.values();
}

struct Gradients {
  Values x, other, condition;
  std::vector<Values> parameters;
};
struct BackwardOptions {
  bool accumulate = false;          // other and condition are added to what `before` holds
  bool without_parameters = false;  // no gradient of any parameter is asked for
  Gradients before = {};
};

Gradients backward(const Inputs& in, DType dtype, int threads, const BackwardOptions& options = {}) {
  Stored s(in, dtype);
  const BlockShape shape = in.shape(dtype);
  GuardedBytes context(block_context_bytes(shape)), workspace(block_workspace_bytes(shape, true));
  GuardedBytes backward_workspace(block_backward_workspace_bytes(shape));
  BlockBackward p;
  static_cast<BlockForward&>(p) = s.call(in, dtype, context.data(), workspace.data());
  block_forward(p, {.threads = threads});

  Tensor grad_out(in.grad_out, dtype, in.strided), grad_x(in.x.rows, in.c, dtype, in.strided);
  Tensor grad_other(in.other.rows, in.c, dtype, in.strided), grad_condition(in.condition.rows, in.c, dtype, in.strided);
  if (options.accumulate) {
    grad_other = Tensor(options.before.other, dtype, in.strided);
    grad_condition = Tensor(options.before.condition, dtype, in.strided);
  }
  std::vector<Tensor> grads;
  std::vector<Matrix> grad_views(in.parameters.size());
  for (const Values& v : in.parameters) grads.emplace_back(v.rows, v.cols, dtype);
  for (size_t i = 0; i < grads.size() && !options.without_parameters; ++i) grad_views[i] = grads[i].view();
  p.out = {}, p.workspace = backward_workspace.data(), p.grad_out = grad_out.view(), p.grad_x = grad_x.view();
  if (in.other.rows) p.grad_other = grad_other.view();
  p.grad_condition = grad_condition.view(), p.grad_parameters = grad_views;
  p.accumulate_other = p.accumulate_condition = options.accumulate;
  block_backward(p, {.threads = threads});

  CHECK_NOTE(context.intact() && workspace.intact() && backward_workspace.intact(), name_of(in.kind), " ",
             name_of(dtype));
  for (const Tensor* t : {&grad_x, &grad_other, &grad_condition}) CHECK(t->guards_intact());
  CHECK(identical(s.x.values(), in.x) && identical(s.other.values(), in.other));
  CHECK(identical(grad_out.values(), in.grad_out));
  Gradients out{grad_x.values(), grad_other.values(), grad_condition.values(), {}};
  for (Tensor& t : grads) {
    CHECK(t.guards_intact());
    out.parameters.push_back(t.values());
  }
  return out;
}

bool identical(const Gradients& a, const Gradients& b) {
  bool same = identical(a.x, b.x) && identical(a.other, b.other) && identical(a.condition, b.condition);
  for (size_t i = 0; i < a.parameters.size(); ++i) same = same && identical(a.parameters[i], b.parameters[i]);
  return same;
}

double error(const Gradients& a, const Gradients& b) {
  double worst = std::max({error(a.x, b.x), error(a.other, b.other), error(a.condition, b.condition)});
  for (size_t i = 0; i < a.parameters.size(); ++i) worst = std::max(worst, error(a.parameters[i], b.parameters[i]));
  return worst;
}

double check_derivatives(Inputs in) {
  const Gradients gradients = backward(in, DType::float64, 1);
  const auto loss = [&] { return dot(forward(in, DType::float64, 1, false), in.grad_out); };
  Random random(11);
  double worst = 0;
  const auto along = [&](Values& x, const Values& gradient, int single, const std::string& name) {
    for (const Values& direction : directions(x, 2, single, random)) {
      const double wanted = derivative(x, direction, loss), got = dot(gradient, direction);
      CHECK_NOTE(std::abs(got - wanted) <= 2e-9 * std::max(1.0, std::abs(wanted)), name_of(in.kind), " block, ", name,
                 ": ", got, ", must be ", wanted);
      worst = std::max(worst, std::abs(got - wanted) / std::max(1.0, std::abs(wanted)));
    }
  };
  along(in.x, gradients.x, 8, "x");
  if (in.other.rows) along(in.other, gradients.other, 8, "other");
  along(in.condition, gradients.condition, 8, "condition");
  const auto specs = block_parameters(in.kind, in.c, in.mlp);
  for (size_t i = 0; i < specs.size(); ++i) along(in.parameters[i], gradients.parameters[i], 3, specs[i].name);
  return worst;
}

void check_one_by_one(const Inputs& in, DType dtype) {
  const HostLayout layout(in.grids), other_layout(in.other_grids);
  const Values out = forward(in, dtype, 1, false), kept = forward(in, dtype, 1, true);
  const Gradients all = backward(in, dtype, 1);
  for (int64_t b = 0; b < layout.view().batch; ++b) {
    const Inputs one = sample_of(in, b);
    const std::string where = check::text(name_of(in.kind), " ", name_of(dtype), ", sample ", b);
    const auto same = [&](const Values& alone, const Values& whole, int64_t first) {
      return identical(alone, rows_of(whole, first, alone.rows));
    };
    const int64_t first = layout.view().offset(b);
    const Gradients alone = backward(one, dtype, 1);
    CHECK_NOTE(same(forward(one, dtype, 1, false), out, first), where);
    CHECK_NOTE(same(forward(one, dtype, 1, true), kept, first), where);
    CHECK_NOTE(same(alone.x, all.x, first), where);
    CHECK_NOTE(same(alone.condition, all.condition, b), where);
    CHECK_NOTE(!is_cross(in.kind) || same(alone.other, all.other, other_layout.view().offset(b)), where);
  }
}

// All kinds, recovery also with the position table, and an MLP narrower than queries, keys and values together.
std::vector<Inputs> small_inputs() {
  std::vector<Inputs> all;
  for (BlockKind kind : kKinds) all.push_back(make(kind, 12, 48, 3));
  all.push_back(make(BlockKind::recovery, 12, 48, 2, true));
  all.push_back(make(BlockKind::dense, 15, 24, 1));
  all.back().mlp_norm_eps = 0.1;
  return all;
}
std::vector<Inputs> wide_inputs() {
  std::vector<Inputs> all;
  for (BlockKind kind : kKinds) all.push_back(make(kind, 144, 576, 2));
  all.push_back(make(BlockKind::recovery, 48, 192, 2, true));
  all.push_back(make(BlockKind::dense, 48, 64, 3));
  return all;
}

}  // namespace

TEST_CASE(forward_with_context_equals_without) {
  for (const auto& inputs : {small_inputs(), wide_inputs()})
    for (const Inputs& in : inputs) {
      CHECK_NOTE(identical(forward(in, DType::float64, 1, true), forward(in, DType::float64, 1, false)),
                 name_of(in.kind));
      CHECK_NEAR(error(forward(in, DType::float32, 1, true), forward(in, DType::float32, 1, false)), 0.0, 1e-5);
      CHECK_NEAR(error(forward(in, DType::bfloat16, 1, true), forward(in, DType::bfloat16, 1, false)), 0.0, 1.0 / 64);
    }
}

TEST_CASE(gradients_are_derivatives) {
  double worst = 0;
  for (const Inputs& in : small_inputs()) worst = std::max(worst, check_derivatives(in));
  std::printf("  largest error against finite differences %.1e\n", worst);
}

TEST_CASE(other_types_are_close) {
  double worst[4] = {};  // float32 forward, backward; bfloat16 forward, backward
  for (Inputs in : wide_inputs()) {
    for (Values& v : in.parameters) v = Tensor(v, DType::bfloat16).values();
    const Values out = forward(in, DType::float64, 1, false);
    const Gradients gradients = backward(in, DType::float64, 1);
    worst[0] = std::max(worst[0], error(forward(in, DType::float32, 1, false), out));
    worst[1] = std::max(worst[1], error(backward(in, DType::float32, 1), gradients));
    worst[2] = std::max(worst[2], error(forward(in, DType::bfloat16, 1, false), out));
    worst[3] = std::max(worst[3], error(backward(in, DType::bfloat16, 1), gradients));
  }
  std::printf("  float32 %.1e %.1e  bfloat16 %.1e %.1e\n", worst[0], worst[1], worst[2], worst[3]);
  CHECK_NEAR(worst[0], 0.0, 4e-6);
  CHECK_NEAR(worst[1], 0.0, 4e-6);
  CHECK_NEAR(worst[2], 0.0, 4e-2);
  CHECK_NEAR(worst[3], 0.0, 4e-2);
}

// Tokens are contiguous here: on strided ones oneDNN's float32 product rounds otherwise below 16 rows.
TEST_CASE(ragged_batch_equals_one_by_one) {
  for (Inputs in : wide_inputs()) {
    in.strided = false;
    for (DType dtype : {DType::float64, DType::float32, DType::bfloat16}) check_one_by_one(in, dtype);
  }
}

TEST_CASE(threads_do_not_change_a_bit) {
  for (const Inputs& in : wide_inputs())
    for (DType dtype : {DType::float64, DType::float32, DType::bfloat16}) {
      const Values out = forward(in, dtype, 1, false);
      const Gradients gradients = backward(in, dtype, 1);
      for (int threads : {2, 3}) {
        CHECK_NOTE(identical(forward(in, dtype, threads, false), out), name_of(in.kind), " ", name_of(dtype));
        CHECK_NOTE(identical(backward(in, dtype, threads), gradients), name_of(in.kind), " ", name_of(dtype));
      }
    }
}

TEST_CASE(gradients_can_be_added_or_left_out) {
  for (const Inputs& in : small_inputs()) {
    const Gradients plain = backward(in, DType::float64, 1);
    Random random(13);
    BackwardOptions options{.accumulate = true};
    options.before.other = random_values(in.other.rows, in.c, random);
    options.before.condition = random_values(in.condition.rows, in.c, random);
    Gradients added = backward(in, DType::float64, 1, options);
    for (size_t i = 0; i < added.other.v.size(); ++i) added.other.v[i] -= options.before.other.v[i];
    for (size_t i = 0; i < added.condition.v.size(); ++i) added.condition.v[i] -= options.before.condition.v[i];
    CHECK_NEAR(error(added, plain), 0.0, 1e-13);
    const Gradients fewer = backward(in, DType::float64, 1, {.without_parameters = true});
    CHECK(identical(fewer.x, plain.x) && identical(fewer.other, plain.other) &&
          identical(fewer.condition, plain.condition));
    for (const Values& v : fewer.parameters)  // nobody has written to them
      CHECK(std::all_of(v.v.begin(), v.v.end(), [](double g) { return std::isnan(g); }));
  }
}

TEST_CASE(lists_of_a_wrong_length_throw) {
  for (BlockKind kind : kKinds) {
    Inputs in = make(kind, 12, 48, 3);
    in.parameters.pop_back();
    const auto message = argument_error([&] { forward(in, DType::float32, 1, false); });
    CHECK_NOTE(message.find(name_of(kind)) == 0 && message.find("parameters holds") != std::string::npos, message);
  }
}
