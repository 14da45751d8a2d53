// The full model on tiny configurations: gradients, ragged batches, buffers, counts, and its dense special case.
#include "flexdit/model.h"

#include "check.h"
#include "naive.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

struct Inputs {
  Config config;
  naive::Grids sparse;  // per sample
  Values x, grad_out;   // a row per sample
  std::vector<double> t;
  std::vector<int64_t> labels;
  std::vector<Values> parameters;

  int64_t batch() const { return x.rows; }
};

Config tiny() {
  Config c;
  c.input_height = 6, c.input_width = 8, c.patch_size = 2, c.in_channels = 2, c.out_channels = 3;
  c.hidden = 12, c.mlp_hidden = 24, c.num_heads = 2, c.label_rows = 5, c.timestep_features = 8;
  c.num_pooling_blocks = 1, c.num_sdtm = 2, c.num_dense_blocks = 1;
  c.generation_blocks = c.sparse_blocks = c.recovery_blocks = c.dense_blocks = 1;
  return c;
}

// Several blocks of each part, and position tables added again.
Config many() {
  Config c = tiny();
  c.num_pooling_blocks = 0, c.num_sdtm = 2, c.num_dense_blocks = 0;
  c.generation_blocks = 2, c.sparse_blocks = 2, c.recovery_blocks = 3, c.dense_blocks = 0;
  c.reinject_position = true;
  return c;
}

Config dense() {
  Config c = tiny();
  c.num_pooling_blocks = 0, c.num_sdtm = 0, c.num_dense_blocks = 3;
  return c;
}

Inputs make(const Config& config, const naive::Grids& sparse) {
  Random random(17);
  const auto batch = static_cast<int64_t>(sparse.size());
  const int64_t pixels = config.input_height * config.input_width;
  Inputs in{.config = config,
            .sparse = sparse,
            .x = random_values(batch, config.in_channels * pixels, random),
            .grad_out = random_values(batch, config.out_channels * pixels, random)};
  for (int64_t b = 0; b < batch; ++b) {
    in.t.push_back(static_cast<double>(random.below(1001)) - (b % 2 ? 0.5 : 0));
    in.t.back() = std::max(0.0, in.t.back());
    in.labels.push_back(random.below(config.label_rows));
  }
  for (const ParameterSpec& spec : model_parameters(config))
    in.parameters.push_back(
        random_values(spec.rows, spec.cols, random, spec.rows == 1 ? 0.5 : 1.5 / std::sqrt(spec.cols)));
  return in;
}

const naive::Grids kRagged = {{1, 2, 2}, {1, 1, 1}, {1, 3, 4}, {1, 2, 3}};

std::vector<Inputs> all_inputs() {
  Config one_head = tiny();
  one_head.num_heads = 1, one_head.patch_size = 1, one_head.input_height = 3, one_head.input_width = 3;
  return {make(tiny(), kRagged), make(many(), kRagged), make(dense(), kRagged), make(tiny(), {{1, 2, 3}}),
          make(one_head, {{1, 2, 1}, {1, 1, 3}})};
}

// The model's arguments, in storage of one type and between guards.
struct Stored {
  Tensor x, out;
  HostLayout layout;
  std::vector<Tensor> parameters;
  std::vector<Matrix> views;
  ModelForward call;

  Stored(const Inputs& in, DType dtype) : x(in.x, dtype), out(in.x.rows, in.grad_out.cols, dtype), layout(in.sparse) {
    for (const Values& v : in.parameters) parameters.emplace_back(v, dtype);
    for (Tensor& t : parameters) views.push_back(t.view());
    call = {.config = in.config,
            .parameters = views,
            .dtype = dtype,
            .batch = in.batch(),
            .x = x.data(),
            .t = in.t.data(),
            .labels = in.labels.data(),
            .out = out.data()};
    if (in.config.num_sdtm > 0) call.sparse_layout = layout.view();
  }
};

Values forward(const Inputs& in, DType dtype, int threads, bool keeps_context) {
  Stored s(in, dtype);
  GuardedBytes context(keeps_context ? model_context_bytes(s.call) : 0);
  GuardedBytes workspace(model_workspace_bytes(s.call, keeps_context));
  s.call.context = keeps_context ? context.data() : nullptr, s.call.workspace = workspace.data();
  model_forward(s.call, {.threads = threads});
  CHECK(context.intact() && workspace.intact() && s.out.guards_intact());
  CHECK(identical(s.x.values(), in.x));
  return s.out.values();
}

struct Gradients {
  Values x;
  std::vector<Values> parameters;
};

Gradients backward(const Inputs& in, DType dtype, int threads, bool all = true) {
  Stored s(in, dtype);
  Tensor grad_out(in.grad_out, dtype), grad_x(in.x.rows, in.x.cols, dtype);
  GuardedBytes context(model_context_bytes(s.call)), workspace(model_workspace_bytes(s.call, true));
  GuardedBytes backward_workspace(model_backward_workspace_bytes(s.call));
  ModelBackward p;
  static_cast<ModelForward&>(p) = s.call;
  p.context = context.data(), p.workspace = workspace.data();
  model_forward(p, {.threads = threads});
  std::vector<Tensor> grads;
  std::vector<Matrix> views(in.parameters.size());
  for (const Values& v : in.parameters) grads.emplace_back(v.rows, v.cols, dtype);
  for (size_t i = 1; i < grads.size() && all; ++i) views[i] = grads[i].view();  // 0 is pos_embed
  p.out = nullptr, p.workspace = backward_workspace.data();
  p.grad_out = grad_out.data(), p.grad_x = all ? grad_x.data() : nullptr, p.grad_parameters = views;
  model_backward(p, {.threads = threads});
  CHECK(context.intact() && workspace.intact() && backward_workspace.intact() && grad_x.guards_intact());
  Gradients out{grad_x.values(), {}};
  for (Tensor& t : grads) {
    CHECK(t.guards_intact());
    out.parameters.push_back(t.values());
  }
  return out;
}

double check_derivatives(Inputs in) {
  const Gradients gradients = backward(in, DType::float64, 1);
  const auto loss = [&] { return dot(forward(in, DType::float64, 1, false), in.grad_out); };
  Random random(19);
  double worst = 0;
  const auto along = [&](Values& x, const Values& gradient, int dense, int single, const std::string& name) {
    for (const Values& direction : directions(x, dense, single, random)) {
      const double wanted = derivative(x, direction, loss), got = dot(gradient, direction);
      const double error = std::abs(got - wanted) / std::max(1.0, std::abs(wanted));
      CHECK_NOTE(error <= 1e-8, name, ": ", got, ", must be ", wanted);
      worst = std::max(worst, error);
    }
  };
  along(in.x, gradients.x, 3, 8, "x");
  const auto specs = model_parameters(in.config);
  for (size_t i = 1; i < specs.size(); ++i) along(in.parameters[i], gradients.parameters[i], 1, 1, specs[i].name);
  return worst;
}

// Multiply-accumulates of one sample, counted weight by weight: how many rows meet each, then attention's scores.
int64_t brute_macs(const Config& c, Grid sparse) {
  const int64_t n = c.dense_grid().tokens(), m = sparse.tokens();
  const auto has = [](const std::string& name, const char* part) { return name.find(part) != std::string::npos; };
  int64_t sum = 0;
  for (const ParameterSpec& spec : model_parameters(c)) {
    const std::string& name = spec.name;
    if (!has(name, ".weight") || has(name, "label_embed")) continue;
    const bool generation = has(name, ".generation."), recovery = has(name, ".recovery."),
               small = has(name, ".sparse.");
    int64_t rows = generation || small ? m : n;
    if (has(name, "modulation") || has(name, "timestep_embed")) rows = 1;
    if (has(name, "pooling_blocks") && has(name, ".attn.")) rows = 1;
    if (has(name, ".attn.kv.")) rows = generation ? n : m;
    if (has(name, ".from_sparse.")) rows = m;
    sum += rows * spec.rows * spec.cols;
    if (has(name, ".attn.proj.") && !has(name, "pooling_blocks"))  // once per attention: q k^T and its product with v
      sum += 2 * c.hidden * (generation || recovery ? n * m : small ? m * m : n * n);
  }
  return sum;
}

size_t index_of(const Config& config, const std::string& name) {
  const auto specs = model_parameters(config);
  for (size_t i = 0; i < specs.size(); ++i)
    if (specs[i].name == name) return i;
  throw std::runtime_error("no parameter " + name);
}

}  // namespace

TEST_CASE(forward_with_context_equals_without) {
  for (const Inputs& in : all_inputs()) {
    CHECK(identical(forward(in, DType::float64, 1, true), forward(in, DType::float64, 1, false)));
    CHECK_NEAR(error(forward(in, DType::float32, 1, true), forward(in, DType::float32, 1, false)), 0.0, 1e-5);
  }
}

TEST_CASE(gradients_are_derivatives) {
  double worst = 0;
  for (const Inputs& in : all_inputs()) worst = std::max(worst, check_derivatives(in));
  std::printf("  largest error against finite differences %.1e\n", worst);
}

TEST_CASE(other_types_are_close) {
  double worst[4] = {};
  for (Inputs in : all_inputs()) {
    for (Values& v : in.parameters) v = Tensor(v, DType::bfloat16).values();
    const Values out = forward(in, DType::float64, 1, false);
    const Values grad_x = backward(in, DType::float64, 1).x;
    for (int i = 0; i < 2; ++i) {
      const DType dtype = i ? DType::bfloat16 : DType::float32;
      worst[2 * i] = std::max(worst[2 * i], error(forward(in, dtype, 1, false), out));
      worst[2 * i + 1] = std::max(worst[2 * i + 1], error(backward(in, dtype, 1).x, grad_x));
    }
  }
  std::printf("  float32 %.1e %.1e  bfloat16 %.1e %.1e\n", worst[0], worst[1], worst[2], worst[3]);
  for (int i = 0; i < 2; ++i) CHECK_NEAR(worst[i], 0.0, 1e-5);
  for (int i = 2; i < 4; ++i) CHECK_NEAR(worst[i], 0.0, 1e-1);
}

TEST_CASE(ragged_batch_equals_one_by_one) {
  for (const Inputs& in : all_inputs())
    for (DType dtype : {DType::float64, DType::float32}) {
      const Values out = forward(in, dtype, 1, false), grad_x = backward(in, dtype, 1).x;
      for (int64_t b = 0; b < in.batch(); ++b) {
        const auto i = static_cast<size_t>(b);
        Inputs one = in;
        one.x = rows_of(in.x, b, 1), one.grad_out = rows_of(in.grad_out, b, 1);
        one.sparse = {in.sparse[i]}, one.t = {in.t[i]}, one.labels = {in.labels[i]};
        CHECK_NOTE(identical(forward(one, dtype, 1, false), rows_of(out, b, 1)), name_of(dtype), ", sample ", b);
        CHECK_NOTE(identical(backward(one, dtype, 1).x, rows_of(grad_x, b, 1)), name_of(dtype), ", sample ", b);
      }
    }
}

TEST_CASE(threads_do_not_change_a_bit) {
  for (const Inputs& in : all_inputs())
    for (DType dtype : {DType::float64, DType::float32}) {
      const Gradients alone = backward(in, dtype, 1), together = backward(in, dtype, 3);
      CHECK(identical(forward(in, dtype, 1, false), forward(in, dtype, 3, false)));
      CHECK(identical(alone.x, together.x));
      for (size_t i = 1; i < alone.parameters.size(); ++i)
        CHECK(identical(alone.parameters[i], together.parameters[i]));
    }
}

TEST_CASE(gradients_can_be_left_out) {
  const Gradients none = backward(make(tiny(), kRagged), DType::float64, 1, false);
  CHECK(std::isnan(none.x.v[0]));
  for (const Values& v : none.parameters) CHECK(std::isnan(v.v[0]));
}

TEST_CASE(own_timestep_features) {
  const Inputs in = make(tiny(), kRagged);
  Stored s(in, DType::float64);
  Tensor features(in.batch(), in.config.timestep_features, DType::float64);
  timestep_embedding({.t = in.t.data(), .out = features.view()}, {});
  s.call.t = nullptr, s.call.timestep_features = features.view();
  GuardedBytes workspace(model_workspace_bytes(s.call, false));
  s.call.workspace = workspace.data();
  model_forward(s.call, {});
  CHECK(identical(s.out.values(), forward(in, DType::float64, 1, false)));
}

// Without modules and pooling blocks: embeddings, dense blocks and the final layer one after another.
TEST_CASE(no_modules_is_a_dense_transformer) {
  const Inputs in = make(dense(), kRagged);
  const Config& c = in.config;
  Stored s(in, DType::float64);
  const std::span<const Matrix> all = s.views;
  const int64_t batch = in.batch(), rows = batch * c.dense_grid().tokens(), p2 = c.patch_size * c.patch_size;
  const HostLayout layout(batch, c.dense_grid());
  const auto tensor = [](int64_t r, int64_t k) { return Tensor(r, k, DType::float64); };
  GuardedBytes workspace(1 << 20);
  Tensor features = tensor(batch, c.timestep_features), condition = tensor(batch, c.hidden);
  timestep_embedding({.t = in.t.data(), .out = features.view()}, {});
  condition_forward({.parameters = all.subspan(3, 5),
                     .features = features.view(),
                     .labels = in.labels.data(),
                     .out = condition.view(),
                     .workspace = workspace.data()},
                    {});
  Tensor patches = tensor(rows, c.in_channels * p2), a = tensor(rows, c.hidden), b = tensor(rows, c.hidden);
  Patches image{.image = s.x.data(),
                .rows = patches.view(),
                .layout = layout.view(),
                .channels = c.in_channels,
                .patch = c.patch_size};
  patch_embed_forward(
      {.parameters = all.subspan(1, 2), .image = image, .position = all[0], .layout = layout.view(), .out = a.view()},
      {});
  const size_t per_block = block_parameters(BlockKind::dense, c.hidden, c.mlp_hidden).size();
  for (size_t i = 0; i < 3; ++i) {
    block_forward({.shape = {.kind = BlockKind::dense,
                             .hidden = c.hidden,
                             .mlp_hidden = c.mlp_hidden,
                             .num_heads = c.num_heads,
                             .batch = batch,
                             .rows = rows,
                             .dtype = DType::float64},
                   .parameters = all.subspan(8 + i * per_block, per_block),
                   .layout = layout.view(),
                   .x = a.view(),
                   .condition = condition.view(),
                   .out = b.view(),
                   .workspace = workspace.data()},
                  {});
    std::swap(a, b);
  }
  Tensor out_rows = tensor(rows, c.out_channels * p2), out = tensor(in.grad_out.rows, in.grad_out.cols);
  final_layer_forward({.parameters = all.subspan(all.size() - 4),
                       .layout = layout.view(),
                       .x = a.view(),
                       .condition = condition.view(),
                       .out = out_rows.view(),
                       .workspace = workspace.data()},
                      {});
  image.image = out.data(), image.rows = out_rows.view(), image.channels = c.out_channels, image.channels_last = true;
  unpatchify(image, {});
  CHECK_NEAR(error(forward(in, DType::float64, 1, false), out.values()), 0.0, 1e-14);
}

// method.md, Initialising: W_1 = 0 and W_2 = I let the dense tokens through; with closed gates a module does nothing.
TEST_CASE(a_module_that_starts_as_identity) {
  Config with = dense();
  with.num_sdtm = 2, with.dense_blocks = 0, with.sparse_blocks = 2;
  const Inputs without = make(dense(), kRagged);
  Inputs in = make(with, kRagged);
  const auto specs = model_parameters(with);
  for (size_t i = 0; i < specs.size(); ++i) {
    const std::string& name = specs[i].name;
    Values& v = in.parameters[i];
    if (name.rfind("sdtm.", 0) != 0) {
      v = without.parameters[index_of(without.config, name)];
    } else if (name.find("modulation") != std::string::npos || name.find("from_") != std::string::npos) {
      std::fill(v.v.begin(), v.v.end(), 0.0);
      if (name.find("from_dense.weight") != std::string::npos)
        for (int64_t j = 0; j < v.rows; ++j) v(j, j) = 1;
    }
  }
  in.x = without.x, in.t = without.t, in.labels = without.labels;
  CHECK_NEAR(error(forward(in, DType::float64, 1, false), forward(without, DType::float64, 1, false)), 0.0, 1e-14);
}

TEST_CASE(multiply_accumulates) {
  for (const Config& c : {tiny(), many(), dense(), Config{}})
    for (const Grid& sparse : {Grid{1, 1, 1}, Grid{1, 2, 3}, Grid{1, 3, 4}})
      CHECK_EQ(model_macs(c, sparse), brute_macs(c, sparse));
}

// method.md, Layouts and counts: XL/2 at 256 and 512.
TEST_CASE(published_parameter_counts) {
  const auto count = [](const Config& config) {
    int64_t sum = 0;
    for (const ParameterSpec& spec : model_parameters(config)) sum += spec.rows * spec.cols;
    return sum;
  };
  Config large;
  CHECK_EQ(count(large), 680442656);
  large.num_pooling_blocks = 1, large.num_dense_blocks = 3;
  CHECK_EQ(count(large), 683099168);
  large = {};
  large.input_height = large.input_width = 64;
  CHECK_EQ(count(large), 681327392);
}

TEST_CASE(arguments) {
  const Inputs in = make(tiny(), kRagged);
  const auto message = [&](auto change) {
    Stored s(in, DType::float32);
    GuardedBytes workspace(model_workspace_bytes(s.call, false));
    s.call.workspace = workspace.data();
    change(s);
    return argument_error([&] { model_forward(s.call, {}); });
  };
  const auto says = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(message([](Stored&) {}).empty());
  CHECK(says(message([](Stored& s) { s.call.parameters = s.call.parameters.first(9); }), "parameters holds 9"));
  CHECK(says(message([](Stored& s) { s.call.sparse_layout.batch = 3; }), "sparse_layout has 3 samples"));
  CHECK(says(message([](Stored& s) { s.call.t = nullptr; }), "t and timestep_features"));
  const std::vector<int64_t> labels = {0, 1, 5, 0};
  CHECK(says(message([&](Stored& s) { s.call.labels = labels.data(); }), "labels[2] is 5"));
}

namespace {

// Everything that inference can bring along, made from the parameters with naive loops.
struct Prepared {
  Values weight, bias, modulation;
  std::vector<Values> folded;
  std::vector<Tensor> tensors;
  std::vector<Matrix> folded_views;
  std::vector<PackedWeightPointer> packed;
  std::vector<const PackedWeight*> packed_views;

  Prepared(const Inputs& in, Stored& s, DType dtype) {
    const int64_t c = in.config.hidden;
    const auto specs = model_parameters(in.config);
    weight = Values(model_modulation_columns(in.config), c), bias = Values(1, weight.rows);
    int64_t row = 0;
    for (size_t i = 0; i < specs.size(); ++i) {
      const Values& v = in.parameters[i];
      if (specs[i].name.ends_with("modulation.weight")) {
        std::copy(v.v.begin(), v.v.end(), weight.v.begin() + row * c);
        std::copy(in.parameters[i + 1].v.begin(), in.parameters[i + 1].v.end(), bias.v.begin() + row);
        row += v.rows;
      }
      if (specs[i].name.ends_with("attn.v.weight")) {  // then its bias, proj's weight and bias
        Values folded_weight(c, c), folded_bias = in.parameters[i + 3];
        const Values &w_v = v, &w_o = in.parameters[i + 2];
        for (int64_t a = 0; a < c; ++a)
          for (int64_t k = 0; k < c; ++k) {
            folded_bias(0, a) += w_o(a, k) * in.parameters[i + 1](0, k);
            for (int64_t b = 0; b < c; ++b) folded_weight(a, b) += w_o(a, k) * w_v(k, b);
          }
        folded.push_back(folded_weight), folded.push_back(folded_bias);
      }
      packed.push_back(specs[i].rows > 1 ? pack_weight(s.views[i], {}) : nullptr);
      packed_views.push_back(packed.back().get());
    }
    CHECK_EQ(row, weight.rows);
    tensors.emplace_back(weight, dtype), tensors.emplace_back(bias, dtype);
    tensors.emplace_back(in.batch(), weight.rows, dtype);
    for (const Values& v : folded) tensors.emplace_back(v, dtype);
    for (size_t i = 3; i < tensors.size(); ++i) folded_views.push_back(tensors[i].view());
    GuardedBytes workspace(model_modulation_workspace_bytes(in.config, in.batch(), dtype));
    model_modulation({.config = in.config,
                      .parameters = s.views,
                      .weight = tensors[0].view(),
                      .bias = tensors[1].view(),
                      .t = in.t.data(),
                      .labels = in.labels.data(),
                      .out = tensors[2].view(),
                      .workspace = workspace.data()},
                     {});
    CHECK(workspace.intact());
  }
};

}  // namespace

// Modulations, folded and packed weights, and norms fused with the block before change nothing but the rounding.
TEST_CASE(prepared_inference) {
  for (const DType dtype : {DType::float64, DType::float32})
    for (const Inputs& in : all_inputs()) {
      const Values exact = forward(in, DType::float64, 1, false);
      Stored s(in, dtype);
      Prepared prepared(in, s, dtype);
      s.call.prepared = {prepared.tensors[2].view(), prepared.folded_views, prepared.packed_views};
      s.call.t = nullptr, s.call.labels = nullptr;
      GuardedBytes workspace(model_workspace_bytes(s.call, false));
      s.call.workspace = workspace.data();
      model_forward(s.call, {});
      CHECK(workspace.intact() && s.out.guards_intact());
      CHECK_NEAR(error(s.out.values(), exact), 0.0, dtype == DType::float64 ? 1e-13 : 2e-5);
      s.call.context = workspace.data();
      CHECK(argument_error([&] { model_forward(s.call, {}); }).find("prepared") != std::string::npos);
    }
}

// Images of two sizes, each with its own position table, in one batch and alone.
TEST_CASE(images_of_several_sizes) {
  const Inputs small = make(tiny(), {{1, 2, 2}});
  Config wide = tiny();
  wide.input_height = 4, wide.input_width = 10;
  Inputs large = make(wide, {{1, 1, 3}});
  const Values positions = large.parameters[0];
  std::copy(small.parameters.begin() + 1, small.parameters.end(), large.parameters.begin() + 1);
  const Values a = forward(small, DType::float64, 1, false), b = forward(large, DType::float64, 1, false);

  Values x(1, small.x.cols + large.x.cols), table(small.parameters[0].rows + positions.rows, tiny().hidden);
  std::copy(small.x.v.begin(), small.x.v.end(), x.v.begin());
  std::copy(large.x.v.begin(), large.x.v.end(), x.v.begin() + small.x.cols);
  std::copy(positions.v.begin(), positions.v.end(), table.v.begin());  // the larger image's table first
  std::copy(small.parameters[0].v.begin(), small.parameters[0].v.end(), table.v.begin() + positions.v.size());
  Stored s(small, DType::float64);
  Tensor images(x, DType::float64), out(1, a.cols + b.cols, DType::float64), tables(table, DType::float64);
  const std::vector<Grid> dense = {small.config.dense_grid(), wide.dense_grid()}, sparse = {{1, 2, 2}, {1, 1, 3}};
  const HostLayout layout(dense), sparse_layout(sparse);
  const std::vector<double> t = {small.t[0], large.t[0]};
  const std::vector<int64_t> labels = {small.labels[0], large.labels[0]};
  const std::vector<int32_t> offsets = {static_cast<int32_t>(positions.rows), 0};
  s.call.batch = 2, s.call.x = images.data(), s.call.out = out.data(), s.call.t = t.data();
  s.call.labels = labels.data(), s.call.layout = layout.view(), s.call.sparse_layout = sparse_layout.view();
  s.call.positions = {tables.view(), offsets.data()};
  GuardedBytes workspace(model_workspace_bytes(s.call, false));
  s.call.workspace = workspace.data();
  model_forward(s.call, {});
  CHECK(workspace.intact() && out.guards_intact());
  Values expected(1, a.cols + b.cols);
  std::copy(a.v.begin(), a.v.end(), expected.v.begin());
  std::copy(b.v.begin(), b.v.end(), expected.v.begin() + a.cols);
  CHECK_NEAR(error(out.values(), expected), 0.0, 1e-14);
}
