// The operations of ops.h as cases: linear layers, elementwise functions, attention, and both ends of the model.
#include "case_parts.h"

namespace flexdit::test {
namespace {

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
    const CaseLayout layout_q = batch.layout(), layout_k = batch.sparse_layout();
    attention(call(in, out[0], out[1], layout_q.view(), layout_k.view()), exec);
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const CaseLayout layout_q = batch.layout(), layout_k = batch.sparse_layout();
    Tensor out(rows_q, c, in[0].dtype), lse(rows_q, num_heads, accumulation_type(in[0].dtype));
    AttentionBackward a;
    static_cast<Attention&>(a) = call(in, out.view(), lse.view(), layout_q.view(), layout_k.view());
    attention(a, exec);
    a.grad_out = grad_out[0], a.grad_q = grad_in[0], a.grad_k = grad_in[1], a.grad_v = grad_in[2];
    attention_backward(a, exec);
  };
  return o;
}

// Keys as they lie in slots: apart, in any order, and two samples' the same.
OpCase apart_case(int64_t c, int64_t num_heads) {
  const Batch batch = kRagged;
  OpCase o{.op = "attention",
           .variant = "keys apart C=" + std::to_string(c),
           .inputs = {{"q", batch.rows(), c, false, true}, {"k", 11, c, false}, {"v", 11, c, false}},
           .outputs = {{"out", batch.rows(), c, false}}};
  static const std::vector<LayoutRow> table = {
      {7, {1, 1, 3}}, {0, {1, 1, 2}}, {7, {1, 1, 3}}, {3, {1, 2, 2}}, {11, {0, 0, 0}}};
  o.naive = [=](const std::vector<Values>& in) {
    naive::Grids grids;
    Values k(0, c), v(0, c);
    for (size_t b = 0; b + 1 < table.size(); ++b) {
      grids.push_back(table[b].grid);
      for (auto [to, from] : {std::pair(&k, &in[1]), std::pair(&v, &in[2])}) {
        const Values rows = rows_of(*from, table[b].offset, table[b].grid.tokens());
        to->v.insert(to->v.end(), rows.v.begin(), rows.v.end()), to->rows += rows.rows;
      }
    }
    return std::vector{naive::attention(in[0], k, v, batch.dense, grids, num_heads)[0]};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const CaseLayout layout_q = batch.layout();
    Attention a{
        .q = in[0], .k = in[1], .v = in[2], .layout_q = layout_q.view(), .layout_k = {table.data(), batch.size()}};
    a.num_heads = num_heads, a.out = out[0];
    attention(a, exec);
  };
  return o;
}

OpCase patch_case(const Batch& batch, int64_t channels, int64_t patch, bool channels_last, bool to_rows) {
  const int64_t rows = batch.rows(), cols = channels * patch * patch;
  const Field image{"image", 1, rows * cols, false, true}, matrix{"rows", rows, cols, false, true};
  OpCase o{.op = to_rows ? "patchify" : "unpatchify",
           .variant = std::string(batch.name) + " " + std::to_string(channels) + "x" + std::to_string(patch) + "x" +
                      std::to_string(patch) + (channels_last ? " channels last" : ""),
           .inputs = {to_rows ? image : matrix},
           .outputs = {to_rows ? matrix : image}};
  o.in_place = true;
  o.naive = [=](const std::vector<Values>& in) {
    Values out = to_rows ? Values(rows, cols) : Values(1, rows * cols);
    naive::for_patches(batch.dense, channels, patch, channels_last, [&](int64_t r, int64_t column, int64_t pixel) {
      (to_rows ? out(r, column) : out(0, pixel)) = to_rows ? in[0](0, pixel) : in[0](r, column);
    });
    return std::vector{out};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const CaseLayout layout = batch.layout();
    (to_rows ? patchify : unpatchify)({.image = (to_rows ? in : out)[0].data,
                                       .rows = (to_rows ? out : in)[0],
                                       .layout = layout.view(),
                                       .channels = channels,
                                       .patch = patch,
                                       .channels_last = channels_last},
                                      exec);
  };
  return o;
}

// One label often, one never.
OpCase label_case(int64_t c) {
  const std::vector<int64_t> labels = {2, 0, 2, 4, 2};
  OpCase o{.op = "label_embedding",
           .variant = "C=" + std::to_string(c),
           .inputs = {{kStart, 5, c, false}, {"table", 5, c, true, true}},
           .outputs = {{"x", 5, c}}};
  o.in_place = true;
  o.naive = [=](const std::vector<Values>& in) {
    Values x = in[0];
    for (int64_t b = 0; b < 5; ++b)
      for (int64_t i = 0; i < c; ++i) x(b, i) += in[1](labels[size_t(b)], i);
    return std::vector{x};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    copy(in[0], out[0]);
    label_embedding({.labels = labels.data(), .table = in[1], .x = out[0]}, exec);
  };
  o.backward = [=](const Views&, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    label_embedding_backward({.labels = labels.data(), .grad_out = grad_out[0], .grad_table = grad_in[1]}, exec);
  };
  return o;
}

OpCase tables_case(int64_t rows, int64_t width, int64_t count, bool own_tables) {
  OpCase o{.op = "add_tables",
           .variant = std::to_string(rows) + "x" + std::to_string(width) + "x" + std::to_string(count) +
                      (own_tables ? " own" : ""),
           .inputs = {{"x", rows, width, false, true}, {"table", own_tables ? rows * count : count, width, false}},
           .outputs = {{"out", rows, count * width, false}}};
  o.naive = [=](const std::vector<Values>& in) {
    Values out(rows, count * width);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t j = 0; j < width; ++j)
          out(b, k * width + j) = in[0](b, j) + in[1](own_tables ? b * count + k : k, j);
    return std::vector{out};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    add_tables({.x = in[0], .table = in[1], .out = out[0], .own_tables = own_tables}, exec);
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

std::vector<OpCase> end_cases() {
  std::vector<OpCase> cases;
  for (const bool last : {false, true})
    for (const bool to_rows : {true, false})
      cases.insert(cases.end(), {patch_case(kRagged, 4, 2, last, to_rows), patch_case(kVideo, 3, 1, last, to_rows),
                                 patch_case(kOneSample, 1, 3, last, to_rows)});
  for (const int64_t c : {7, 48, 1152}) cases.push_back(label_case(c));
  for (const bool own : {false, true})
    cases.insert(cases.end(), {tables_case(3, 48, 5, own), tables_case(2, 7, 3, own), tables_case(4, 72, 1, own)});
  return cases;
}

std::vector<OpCase> attention_cases() {
  // More queries and keys than one block or stretch of the kernels holds.
  const Batch long_rows{"long", {{1, 2, 130}, {1, 1, 3}}, {{1, 2, 131}, {1, 1, 1}}};
  std::vector<OpCase> cases = {attention_case(kRagged, 48, 2),
                               attention_case(kVideo, 72, 1),
                               attention_case(kOneSample, 7, 7),
                               attention_case(kOneToken, 9, 3),
                               attention_case({"self", kRagged.dense, kRagged.dense}, 36, 3),
                               apart_case(36, 3),
                               attention_case(long_rows, 7, 1)};
  cases.back().large = true;
  return cases;
}

std::vector<OpCase> empty_cases() {
  std::vector<OpCase> cases = empty_token_cases();
  cases.insert(
      cases.end(),
      {linear_case(0, 5, 7, true, Activation::none, false), linear_case(0, 8, 16, true, Activation::gelu_tanh, false),
       kept_case(0, 8, 16, true), gelu_input_case(0, 8, 16), gelu_case(0, 16, false), silu_case(0, 7, false),
       attention_case(kNone, 48, 2), patch_case(kNone, 4, 2, true, true), patch_case(kNone, 4, 2, true, false)});
  return cases;
}

}  // namespace flexdit::test
