// The operations of ops.h as cases: norms, residuals, and the exchange of tokens.
#include "case_parts.h"

namespace flexdit::test {
namespace {

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
    const CaseLayout layout = s.batch.layout();
    modulated_layer_norm({.x = in[0], .shift = in[1], .scale = in[2], .layout = layout.view(), .y = out[0]}, exec);
    for (size_t i = 0; residual && i < 3; ++i) copy(in[i], out[i + 1]);
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const CaseLayout layout = s.batch.layout();
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
    const CaseLayout layout = s.batch.layout();
    if (residual) copy(in[0], out[1]);
    with_workspace(modulated_mean_workspace(in[0].dtype, b, rows, c), [&](void* workspace) {
      modulated_mean(
          {.x = in[0], .shift = in[1], .scale = in[2], .layout = layout.view(), .mean = out[0], .workspace = workspace},
          exec);
    });
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const CaseLayout layout = s.batch.layout();
    if (residual) copy(grad_out[1], grad_in[0]);
    with_workspace(modulated_mean_workspace(in[0].dtype, b, rows, c), [&](void* workspace) {
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
           .inputs = {{"x", rows, c, false, true}, {"y", y_per_sample ? b : rows, c}, {"gate", b, c, true, true, true}},
           .outputs = {{"out", rows, c}}};
  o.naive = [=](const std::vector<Values>& in) {
    return std::vector{naive::gated_residual(in[0], in[1], in[2], s.batch.dense, y_per_sample)};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const CaseLayout layout = s.batch.layout();
    gated_residual(
        {.x = in[0], .y = in[1], .gate = in[2], .layout = layout.view(), .out = out[0], .y_per_sample = y_per_sample},
        exec);
  };
  o.backward = [=](const Views& in, const Views& grad_out, const Views& grad_in, const Execution& exec) {
    const CaseLayout layout = s.batch.layout();
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
           .inputs =
               {{kStart, rows, c}, {"y", rows, c}, {"gate", b, c, true, false, true}, {"shift", b, c}, {"scale", b, c}},
           .outputs = {{"x", rows, c, true, true}, {"normed", rows, c}}};
  o.naive = [=](const std::vector<Values>& in) {
    const Values out = naive::gated_residual(in[0], in[1], in[2], s.batch.dense, false);
    return std::vector{out, naive::modulated_layer_norm(out, in[3], in[4], s.batch.dense)};
  };
  o.forward = [=](const Views& in, const Views& out, const Execution& exec) {
    const CaseLayout layout = s.batch.layout();
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
    const CaseLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
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
    const CaseLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
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
    const CaseLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
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
    const CaseLayout layout = s.batch.layout(), sparse_layout = s.batch.sparse_layout();
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
    const CaseLayout layout = s.batch.layout();
    if (out[0]) copy(in[0].columns(0, out[0].cols), out[0]);
    add_position({.x = out[0], .position = s.batch.positions(in[1]), .layout = layout.view()}, exec);
  };
  return o;
}

}  // namespace

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

// Hidden sizes as models have them, and one that cannot be read 16 bytes at a time; then many tokens.
std::vector<OpCase> model_size_cases() {
  const Batch few{"few", {{1, 3, 3}, {1, 1, 1}, {1, 5, 7}}, {{1, 2, 2}, {1, 1, 1}, {1, 3, 4}}};
  const Batch many{"many", {{1, 64, 64}, {1, 1, 1}, {1, 3, 11}}, {{1, 20, 20}, {1, 1, 1}, {1, 2, 5}}};
  std::vector<Size> sizes = {{many, 64}};
  for (const int64_t c : {64, 384, 768, 1152, 1535, 1536}) sizes.push_back({few, c});
  std::vector<OpCase> cases;
  for (const Size& s : sizes)
    cases.insert(cases.end(), {layer_norm_case(s, true), mean_case(s, true), residual_case(s, false),
                               residual_case(s, true), residual_norm_case(s), pool_case(s, false, true),
                               pool_case(s, false, false, true), gather_case(s, false, true)});
  return cases;
}

std::vector<OpCase> empty_token_cases() {
  const Size s{kNone, 48};
  return {layer_norm_case(s, false), layer_norm_case(s, true),         mean_case(s, false),
          residual_case(s, false),   residual_case(s, true),           residual_norm_case(s),
          pool_case(s, false, true), pool_case(s, false, false, true), gather_case(s, false, true)};
}

}  // namespace flexdit::test
