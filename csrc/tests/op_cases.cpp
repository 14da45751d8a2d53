// The operations of ops.h as cases: linear layers, elementwise functions, norms, exchange of tokens, attention.
#include "op_case.h"

namespace flexdit::test {
namespace {

// Frames, odd sides, single tokens, a window that overlaps its neighbours (5 -> 3), a grid that stays as it is.
const Batch kRagged{
    "ragged", {{1, 4, 4}, {1, 5, 3}, {1, 1, 1}, {1, 2, 3}}, {{1, 2, 3}, {1, 3, 2}, {1, 1, 1}, {1, 2, 3}}};
const Batch kVideo{"video", {{3, 2, 3}, {2, 4, 2}}, {{2, 1, 2}, {1, 3, 2}}};
const Batch kOneSample{"one sample", {{1, 5, 4}}, {{1, 3, 3}}};
const Batch kOneToken{"one token", {{1, 1, 1}}, {{1, 1, 1}}};
// The same number of tokens in every sample, so that one position table fits all.
const Batch kSameCount{"same count", {{1, 3, 4}, {1, 4, 3}, {2, 3, 2}}, {{1, 2, 2}, {1, 1, 3}, {2, 2, 1}}};
// Grids of their own: tables behind one another, of which the third sample has none but a row of the first's.
const Batch kTables{"tables", kRagged.dense, kRagged.sparse, {6, 22, 9, 0}};

struct Size {
  Batch batch;
  int64_t c;
};
const Size kSizes[] = {{kRagged, 48}, {kVideo, 7}, {kOneSample, 72}, {kOneToken, 7}, {kRagged, 300}};

std::string label(const Size& s, const std::string& variant = "") {
  return std::string(s.batch.name) + " C=" + std::to_string(s.c) + (variant.empty() ? "" : " " + variant);
}

void copy(const Matrix& from, const Matrix& to) {
  for (int64_t i = 0; i < from.rows; ++i)
    std::memcpy(to.row_range(i, 1).data, from.row_range(i, 1).data, size_t(from.cols * size_of(from.dtype)));
}

// Poisoned memory for one call, whose canaries are looked at afterwards.
template <class Call>
void with_workspace(int64_t bytes, Call&& call) {
  GuardedBytes workspace(bytes);
  call(workspace.data());
  if (!workspace.intact()) throw std::runtime_error("wrote behind its workspace");
}

OpCase linear_case(int64_t m, int64_t n, int64_t k, bool bias, Activation activation, bool accumulate) {
  OpCase c{.op = "linear",
           .variant = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + (bias ? " bias" : "") +
                      (activation == Activation::none ? "" : " gelu") + (accumulate ? " accumulate" : ""),
           .inputs = {{"x", m, k, true, true}, {"weight", n, k}},
           .outputs = {{"y", m, n}}};
  if (bias) c.inputs.push_back({"bias", 1, n, true, false, true});
  // To test +=, the copy of x is an output too: its gradient is what grad_x holds before.
  if (accumulate) c.outputs.push_back({kCopy, m, k});
  c.naive = [=](const std::vector<Values>& in) {
    Values y = naive::linear(in[0], in[1], bias ? in[2] : Values());
    if (activation != Activation::none) y = naive::map(y, naive::gelu);
    return accumulate ? std::vector{y, in[0]} : std::vector{y};
  };
  c.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    if (accumulate) copy(in[0], out[1]);
    linear({.x = in[0], .weight = in[1], .bias = bias ? in[2] : Matrix{}, .y = out[0], .activation = activation}, exec);
  };
  if (activation != Activation::none) return c;
  c.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    if (accumulate) copy(grad_out[1], grad_in[0]);
    with_workspace(linear_backward_workspace(in[0].dtype, n, k), [&](void* workspace) {
      linear_backward({.x = in[0],
                       .weight = in[1],
                       .grad_y = grad_out[0],
                       .grad_x = grad_in[0],
                       .grad_weight = grad_in[1],
                       .grad_bias = bias ? grad_in[2] : Matrix{},
                       .accumulate_grad_x = accumulate,
                       .workspace = workspace},
                      exec);
    });
  };
  return c;
}

// GELU behind the product, with what comes before it kept.
OpCase kept_case(int64_t m, int64_t n, int64_t k, bool bias) {
  OpCase c = linear_case(m, n, k, bias, Activation::gelu_tanh, false);
  c.variant += " kept";
  c.outputs.push_back({"pre_activation", m, n, false, false, true});
  c.naive = [=](const std::vector<Values>& in) {
    const Values before = naive::linear(in[0], in[1], bias ? in[2] : Values());
    return std::vector{naive::map(before, naive::gelu), before};
  };
  c.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    linear({.x = in[0],
            .weight = in[1],
            .bias = bias ? in[2] : Matrix{},
            .y = out[0],
            .activation = Activation::gelu_tanh,
            .pre_activation = out[1]},
           exec);
  };
  return c;
}

// A product of GELU(h), whose backward reaches h.
OpCase gelu_input_case(int64_t m, int64_t n, int64_t k) {
  OpCase c{.op = "linear",
           .variant = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + " of gelu",
           .inputs = {{"gelu_input", m, k}, {"weight", n, k}, {"bias", 1, n}},
           .outputs = {{"y", m, n}}};
  c.in_place = true;
  c.naive = [=](const std::vector<Values>& in) {
    return std::vector{naive::linear(naive::map(in[0], naive::gelu), in[1], in[2])};
  };
  c.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    Tensor x(m, k, in[0].dtype);
    gelu({.x = in[0], .y = x.view()}, exec);
    linear({.x = x.view(), .weight = in[1], .bias = in[2], .y = out[0]}, exec);
  };
  c.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    Tensor x(m, k, in[0].dtype);
    gelu({.x = in[0], .y = x.view()}, exec);
    with_workspace(linear_backward_workspace(in[0].dtype, n, k), [&](void* workspace) {
      linear_backward({.x = x.view(),
                       .weight = in[1],
                       .grad_y = grad_out[0],
                       .grad_x = grad_in[0],
                       .grad_weight = grad_in[1],
                       .grad_bias = grad_in[2],
                       .gelu_input = in[0],
                       .workspace = workspace},
                      exec);
    });
  };
  return c;
}

using Function = void (*)(const Elementwise&, const Execution&);

OpCase function_case(const char* op, int64_t m, int64_t n, double (*naive_function)(double), Function function) {
  OpCase c{.op = op,
           .variant = std::to_string(m) + "x" + std::to_string(n),
           .inputs = {{"x", m, n, true, true}},
           .outputs = {{"y", m, n}}};
  c.naive = [=](const std::vector<Values>& in) { return std::vector{naive::map(in[0], naive_function)}; };
  c.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    function({.x = in[0], .y = out[0]}, exec);
  };
  return c;
}

OpCase gelu_case(int64_t m, int64_t n, bool in_place) {
  OpCase c = function_case("gelu", m, n, naive::gelu, gelu);
  c.variant += in_place ? " in place" : "";
  c.in_place = in_place;
  c.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    Tensor again(m, n, in[0].dtype), y(m, n, in[0].dtype);
    if (in_place) copy(grad_out[0], grad_in[0]);
    gelu_backward({.x = in[0], .grad_y = in_place ? grad_in[0] : grad_out[0], .y = again.view(), .grad_x = grad_in[0]},
                  exec);
    gelu({.x = in[0], .y = y.view()}, exec);
    if (!identical(again.values(), y.values())) throw std::runtime_error("gelu_backward's y is not GELU(x)");
  };
  return c;
}

OpCase silu_case(int64_t m, int64_t n, bool accumulate) {
  OpCase c = function_case("silu", m, n, naive::silu, silu);
  if (accumulate) {
    c.variant += " accumulate";
    c.outputs.push_back({kCopy, m, n});
    c.naive = [](const std::vector<Values>& in) { return std::vector{naive::map(in[0], naive::silu), in[0]}; };
    c.forward = [](const Views& in, const Views& out, const Execution& exec) {
      silu({.x = in[0], .y = out[0]}, exec);
      copy(in[0], out[1]);
    };
  }
  c.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    if (accumulate) copy(grad_out[1], grad_in[0]);
    silu_backward({.x = in[0], .grad_y = grad_out[0], .grad_x = grad_in[0], .accumulate = accumulate}, exec);
  };
  return c;
}

// With `residual` grad_x starts as the residual's gradient, in place, and the modulation's gradients are added to.
OpCase layer_norm_case(const Size& s, bool residual) {
  const int64_t rows = s.batch.rows(), b = s.batch.size(), c = s.c;
  OpCase o{.op = "modulated_layer_norm",
           .variant = label(s, residual ? "residual" : ""),
           .inputs = {{"x", rows, c, true, true}, {"shift", b, c}, {"scale", b, c}},
           .outputs = {{"y", rows, c}}};
  if (residual) o.outputs.insert(o.outputs.end(), {{kCopy, rows, c}, {kCopy, b, c}, {kCopy, b, c}});
  o.naive = [=](const std::vector<Values>& in) {
    const Values y = naive::modulated_layer_norm(in[0], in[1], in[2], s.batch.dense);
    return residual ? std::vector{y, in[0], in[1], in[2]} : std::vector{y};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    modulated_layer_norm({.x = in[0], .shift = in[1], .scale = in[2], .layout = layout.view(), .y = out[0]}, exec);
    for (size_t i = 0; residual && i < 3; ++i) copy(in[i], out[i + 1]);
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    for (size_t i = 0; residual && i < 3; ++i) copy(grad_out[i + 1], grad_in[i]);
    with_workspace(row_statistics_workspace(in[0].dtype, rows), [&](void* workspace) {
      modulated_layer_norm_backward({.x = in[0],
                                     .scale = in[2],
                                     .layout = layout.view(),
                                     .grad_y = grad_out[0],
                                     .grad_residual = residual ? grad_in[0] : Matrix{},
                                     .grad_x = grad_in[0],
                                     .grad_shift = grad_in[1],
                                     .grad_scale = grad_in[2],
                                     .accumulate_modulation = residual,
                                     .workspace = workspace},
                                    exec);
    });
  };
  return o;
}

OpCase mean_case(const Size& s, bool residual) {
  const int64_t rows = s.batch.rows(), b = s.batch.size(), c = s.c;
  OpCase o{.op = "modulated_mean",
           .variant = label(s, residual ? "residual" : ""),
           .inputs = {{"x", rows, c, true, true}, {"shift", b, c}, {"scale", b, c}},
           .outputs = {{"mean", b, c}}};
  if (residual) o.outputs.push_back({kCopy, rows, c});
  o.naive = [=](const std::vector<Values>& in) {
    const Values mean = naive::modulated_mean(in[0], in[1], in[2], s.batch.dense);
    return residual ? std::vector{mean, in[0]} : std::vector{mean};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    if (residual) copy(in[0], out[1]);
    with_workspace(row_statistics_workspace(in[0].dtype, rows), [&](void* workspace) {
      modulated_mean(
          {.x = in[0], .shift = in[1], .scale = in[2], .layout = layout.view(), .mean = out[0], .workspace = workspace},
          exec);
    });
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    if (residual) copy(grad_out[1], grad_in[0]);
    with_workspace(row_statistics_workspace(in[0].dtype, rows), [&](void* workspace) {
      modulated_mean_backward({.x = in[0],
                               .scale = in[2],
                               .layout = layout.view(),
                               .grad_mean = grad_out[0],
                               .grad_residual = residual ? grad_in[0] : Matrix{},
                               .grad_x = grad_in[0],
                               .grad_shift = grad_in[1],
                               .grad_scale = grad_in[2],
                               .workspace = workspace},
                              exec);
    });
  };
  return o;
}

OpCase residual_case(const Size& s, bool y_per_sample) {
  const int64_t rows = s.batch.rows(), b = s.batch.size(), c = s.c;
  OpCase o{.op = "gated_residual",
           .variant = label(s, y_per_sample ? "y per sample" : ""),
           .inputs = {{"x", rows, c, false, true}, {"y", y_per_sample ? b : rows, c}, {"gate", b, c, true, true}},
           .outputs = {{"out", rows, c}}};
  o.naive = [=](const std::vector<Values>& in) {
    return std::vector{naive::gated_residual(in[0], in[1], in[2], s.batch.dense, y_per_sample)};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    gated_residual(
        {.x = in[0], .y = in[1], .gate = in[2], .layout = layout.view(), .out = out[0], .y_per_sample = y_per_sample},
        exec);
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    gated_residual_backward({.y = in[1],
                             .gate = in[2],
                             .layout = layout.view(),
                             .grad_out = grad_out[0],
                             .grad_y = grad_in[1],
                             .grad_gate = grad_in[2],
                             .y_per_sample = y_per_sample},
                            exec);
  };
  return o;
}

// In place, with the norm behind it. No backward of its own.
OpCase residual_norm_case(const Size& s) {
  const int64_t rows = s.batch.rows(), b = s.batch.size(), c = s.c;
  OpCase o{.op = "gated_residual",
           .variant = label(s, "normed"),
           .inputs = {{kStart, rows, c}, {"y", rows, c}, {"gate", b, c}, {"shift", b, c}, {"scale", b, c}},
           .outputs = {{"x", rows, c, true, true}, {"normed", rows, c}}};
  o.naive = [=](const std::vector<Values>& in) {
    const Values out = naive::gated_residual(in[0], in[1], in[2], s.batch.dense, false);
    return std::vector{out, naive::modulated_layer_norm(out, in[3], in[4], s.batch.dense)};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    if (out[0]) copy(in[0].columns(0, out[0].cols), out[0]);
    gated_residual({.x = out[0],
                    .y = in[1],
                    .gate = in[2],
                    .layout = layout.view(),
                    .out = out[0],
                    .shift = in[3],
                    .scale = in[4],
                    .normed = out[1]},
                   exec);
  };
  return o;
}

// The norm behind an exchange: its shift and scale are the last two inputs, its result is the last output.
void add_norm(OpCase& o, const Size& s, int64_t rows) {
  o.inputs.insert(o.inputs.end(), {{"shift", s.batch.size(), s.c, false}, {"scale", s.batch.size(), s.c, false}});
  o.outputs.push_back({"normed", rows, s.c, false});
}
std::vector<Values> with_norm(const Values& out, const std::vector<Values>& in, const naive::Grids& grids) {
  return {out, naive::modulated_layer_norm(out, in[in.size() - 2], in[in.size() - 1], grids)};
}

OpCase pool_case(const Size& s, bool position, bool accumulate, bool normed = false) {
  const int64_t rows = s.batch.rows(), sparse_rows = s.batch.sparse_rows();
  OpCase o{.op = "pool_tokens",
           .variant = label(s, std::string(position ? "position" : "") + (accumulate ? "accumulate" : "") +
                                   (normed ? " normed" : "")),
           .inputs = {{"x", rows, s.c, true, true}},
           .outputs = {{"out", sparse_rows, s.c, true, true}}};
  if (position) o.inputs.push_back({"position", s.batch.position_rows(), s.c, false, false, true});
  if (accumulate) o.outputs.push_back({kCopy, rows, s.c});
  if (normed) add_norm(o, s, sparse_rows);
  o.naive = [=](const std::vector<Values>& in) {
    const naive::Position table{position ? in[1] : Values(), s.batch.position_offset};
    const Values out = naive::pool_tokens(in[0], table, s.batch.dense, s.batch.sparse);
    if (normed) return with_norm(out, in, s.batch.sparse);
    return accumulate ? std::vector{out, in[0]} : std::vector{out};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
    if (accumulate) copy(in[0], out[1]);
    pool_tokens({.x = in[0],
                 .position = s.batch.positions(position ? in[1] : Matrix{}),
                 .layout = layout.view(),
                 .sparse_layout = sparse_layout.view(),
                 .out = out[0],
                 .shift = normed ? in[in.size() - 2] : Matrix{},
                 .scale = normed ? in[in.size() - 1] : Matrix{},
                 .normed = normed ? out[1] : Matrix{}},
                exec);
  };
  o.backward = [=](const Views&, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const HostLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
    if (accumulate) copy(grad_out[1], grad_in[0]);
    pool_tokens_backward({.layout = layout.view(),
                          .sparse_layout = sparse_layout.view(),
                          .grad_out = grad_out[0],
                          .grad_x = grad_in[0],
                          .accumulate = accumulate},
                         exec);
  };
  return o;
}

OpCase gather_case(const Size& s, bool position, bool normed) {
  const int64_t rows = s.batch.rows(), c = s.c;
  OpCase o{.op = "gather_sparse",
           .variant = label(s, std::string(position ? "position" : "") + (normed ? " normed" : "")),
           .inputs = {{"s", s.batch.sparse_rows(), c}, {"x", rows, c, false, true}},
           .outputs = {{"out", rows, c, true, true}}};
  if (position) o.inputs.push_back({"position", s.batch.position_rows(), c, false, false, true});
  if (normed) add_norm(o, s, rows);
  o.naive = [=](const std::vector<Values>& in) {
    const naive::Position table{position ? in[2] : Values(), s.batch.position_offset};
    const Values out = naive::gather_sparse(in[0], in[1], table, s.batch.dense, s.batch.sparse);
    return normed ? with_norm(out, in, s.batch.dense) : std::vector{out};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
    gather_sparse({.s = in[0],
                   .x = in[1],
                   .position = s.batch.positions(position ? in[2] : Matrix{}),
                   .layout = layout.view(),
                   .sparse_layout = sparse_layout.view(),
                   .out = out[0],
                   .shift = normed ? in[in.size() - 2] : Matrix{},
                   .scale = normed ? in[in.size() - 1] : Matrix{},
                   .normed = normed ? out[1] : Matrix{}},
                  exec);
  };
  o.backward = [=](const Views&, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const HostLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
    gather_sparse_backward(
        {.layout = layout.view(), .sparse_layout = sparse_layout.view(), .grad_out = grad_out[0], .grad_s = grad_in[0]},
        exec);
  };
  return o;
}

OpCase position_case(const Size& s) {
  const int64_t rows = s.batch.rows();
  OpCase o{.op = "add_position",
           .variant = label(s),
           .inputs = {{kStart, rows, s.c}, {"position", s.batch.position_rows(), s.c}},
           .outputs = {{"x", rows, s.c, true, true}}};
  o.naive = [=](const std::vector<Values>& in) {
    return std::vector{naive::add_position(in[0], {in[1], s.batch.position_offset}, s.batch.dense)};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout = s.batch.layout();
    if (out[0]) copy(in[0].columns(0, out[0].cols), out[0]);
    add_position({.x = out[0], .position = s.batch.positions(in[1]), .layout = layout.view()}, exec);
  };
  return o;
}

// Queries on the batch's dense grids, keys on its sparse ones.
OpCase attention_case(const Batch& batch, int64_t c, int64_t num_heads) {
  const int64_t rows_q = batch.rows(), rows_k = batch.sparse_rows();
  OpCase o{.op = "attention",
           .variant = label({batch, c}, std::to_string(num_heads) + " heads"),
           .inputs = {{"q", rows_q, c, true, true}, {"k", rows_k, c}, {"v", rows_k, c}},
           .outputs = {{"out", rows_q, c}, {"lse", rows_q, num_heads, false, false, true, true}}};
  const auto call = [=](const Views& in, const Matrix& out, const Matrix& lse, const TokenLayout& layout_q,
                        const TokenLayout& layout_k) {
    Attention a{.q = in[0], .k = in[1], .v = in[2], .layout_q = layout_q, .layout_k = layout_k};
    a.num_heads = num_heads, a.out = out, a.lse = lse;
    return a;
  };
  o.naive = [=](const std::vector<Values>& in) {
    return naive::attention(in[0], in[1], in[2], batch.dense, batch.sparse, num_heads);
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const HostLayout layout_q = batch.layout(), layout_k = batch.sparse_layout();
    attention(call(in, out[0], out[1], layout_q.view(), layout_k.view()), exec);
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const HostLayout layout_q = batch.layout(), layout_k = batch.sparse_layout();
    Tensor out(rows_q, c, in[0].dtype), lse(rows_q, num_heads, accumulation_type(in[0].dtype));
    AttentionBackward a;
    static_cast<Attention&>(a) = call(in, out.view(), lse.view(), layout_q.view(), layout_k.view());
    attention(a, exec);
    a.grad_out = grad_out[0], a.grad_q = grad_in[0], a.grad_k = grad_in[1], a.grad_v = grad_in[2];
    attention_backward(a, exec);
  };
  return o;
}

}  // namespace

std::vector<OpCase> linear_cases() {
  constexpr auto none = Activation::none, gelu = Activation::gelu_tanh;
  return {linear_case(19, 24, 72, true, none, false),
          linear_case(1, 48, 7, true, none, false),
          linear_case(5, 7, 48, false, none, true),
          linear_case(33, 72, 48, true, gelu, false),
          linear_case(3, 1, 5, true, none, false),
          linear_case(4, 6, 1, true, none, true),
          kept_case(33, 72, 48, true),
          kept_case(5, 16, 24, false),
          kept_case(4, 7, 9, true),
          kept_case(1, 6, 3, false),
          gelu_input_case(33, 48, 72),
          gelu_input_case(6, 9, 16),
          gelu_input_case(5, 8, 7),
          gelu_input_case(1, 3, 6)};
}

std::vector<OpCase> elementwise_cases() {
  return {gelu_case(5, 72, false), gelu_case(3, 7, true), silu_case(5, 72, false), silu_case(3, 7, true),
          silu_case(1, 1, false)};
}

std::vector<OpCase> norm_cases() {
  std::vector<OpCase> cases;
  for (const Size& s : kSizes)
    for (bool flag : {false, true})
      cases.insert(cases.end(), {layer_norm_case(s, flag), mean_case(s, flag), residual_case(s, flag)});
  for (const Size& s : kSizes) cases.push_back(residual_norm_case(s));
  return cases;
}

std::vector<OpCase> exchange_cases() {
  std::vector<OpCase> cases;
  for (const Size& s : kSizes)
    for (bool flag : {false, true}) cases.insert(cases.end(), {pool_case(s, false, flag), gather_case(s, false, flag)});
  for (const Size& s : kSizes) cases.push_back(pool_case(s, false, false, true));
  for (const Size& s : {Size{kSameCount, 48}, Size{kOneSample, 7}, Size{kTables, 48}, Size{kTables, 7}})
    cases.insert(cases.end(), {pool_case(s, true, false), pool_case(s, true, false, true), gather_case(s, true, false),
                               gather_case(s, true, true), position_case(s)});
  return cases;
}

std::vector<OpCase> attention_cases() {
  // More queries and keys than one block or stretch of the kernels holds.
  const Batch long_rows{"long", {{1, 2, 123}, {1, 1, 3}}, {{1, 2, 131}, {1, 1, 1}}};
  std::vector<OpCase> cases = {attention_case(kRagged, 48, 2),
                               attention_case(kVideo, 72, 1),
                               attention_case(kOneSample, 7, 7),
                               attention_case(kOneToken, 9, 3),
                               attention_case({"self", kRagged.dense, kRagged.dense}, 36, 3),
                               attention_case(long_rows, 7, 1)};
  cases.back().large = true;
  return cases;
}

}  // namespace flexdit::test
