// The blocks of FlexPixArt and FlexLatte: a modulation from outside, a caption between attention and MLP, attention
// within a frame or across frames; forward against the definition in plain loops, backward against differences.
#include <map>

#include "check.h"
#include "flexdit/block.h"
#include "message_of.h"
#include "naive.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

enum class Axis { all, space, time };

const naive::Grids kDense = {{3, 2, 2}, {1, 3, 2}, {2, 1, 3}}, kSparse = {{2, 1, 2}, {1, 2, 1}, {1, 1, 2}};
const naive::Grids kCaptions = {{1, 1, 4}, {1, 1, 1}, {1, 1, 3}};
constexpr int64_t kHidden = 12, kMlp = 20, kHeads = 3;

naive::Grids frames_of(const naive::Grids& grids) {
  naive::Grids frames;
  for (const Grid& g : grids)
    for (int32_t f = 0; f < g.frames; ++f) frames.push_back({1, g.height, g.width});
  return frames;
}

struct Inputs {
  BlockKind kind;
  bool caption;
  Axis axis = Axis::all;
  naive::Grids grids = {}, other_grids = {};
  Values x = {}, other = {}, modulation = {}, text = {}, grad_out = {};
  std::vector<Values> parameters = {};

  BlockStyle style() const { return {.shared_modulation = true, .caption = caption}; }
  std::string name() const {
    return check::text(name_of(kind), caption ? " with caption" : "",
                       axis == Axis::all     ? ""
                       : axis == Axis::space ? " space"
                                             : " time");
  }
  BlockShape shape(DType dtype) const {
    return {.kind = kind,
            .hidden = kHidden,
            .mlp_hidden = kMlp,
            .num_heads = kHeads,
            .batch = std::ssize(grids),
            .rows = x.rows,
            .other_rows = other.rows,
            .dtype = dtype,
            .style = style(),
            .caption_rows = text.rows};
  }
};

Inputs make(BlockKind kind, bool caption, Axis axis = Axis::all) {
  Random random(7 * static_cast<uint64_t>(kind) + caption + 1);
  Inputs in{.kind = kind, .caption = caption, .axis = axis};
  const bool generation = kind == BlockKind::generation, cross = generation || kind == BlockKind::recovery;
  in.grids = generation ? kSparse : kDense;
  if (cross) in.other_grids = generation ? kDense : kSparse;
  in.x = random_values(naive::total(in.grids), kHidden, random);
  in.other = random_values(naive::total(in.other_grids), kHidden, random);
  in.modulation = random_values(std::ssize(in.grids), 6 * kHidden, random);
  if (caption) in.text = random_values(naive::total(kCaptions), kHidden, random);
  in.grad_out = random_values(in.x.rows, kHidden, random);
  for (const ParameterSpec& spec : block_parameters(kind, kHidden, kMlp, in.style()))
    in.parameters.push_back(
        random_values(spec.rows, spec.cols, random, spec.rows == 1 ? 0.5 : 2 / std::sqrt(spec.cols)));
  return in;
}

std::vector<Inputs> all_inputs() {
  std::vector<Inputs> all;
  for (const bool caption : {false, true}) {
    for (const BlockKind kind : {BlockKind::pooling, BlockKind::dense, BlockKind::generation, BlockKind::recovery})
      all.push_back(make(kind, caption));
    all.push_back(make(BlockKind::dense, caption, Axis::space));
    all.push_back(make(BlockKind::dense, caption, Axis::time));
  }
  return all;
}

// ---- The definition.

Values columns(const Values& x, int64_t first, int64_t count = kHidden) {
  Values out(x.rows, count);
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < count; ++j) out(i, j) = x(i, first + j);
  return out;
}
Values sum(Values x, const Values& y) {
  for (size_t i = 0; i < x.v.size(); ++i) x.v[i] += y.v[i];
  return x;
}

class NaiveBlock {
 public:
  explicit NaiveBlock(const Inputs& in) : in_(in) {
    const auto specs = block_parameters(in.kind, kHidden, kMlp, in.style());
    for (size_t i = 0; i < specs.size(); ++i) parameters_[specs[i].name] = in.parameters[i];
  }

  Values run() const {
    Values x = in_.x;
    if (in_.kind == BlockKind::recovery)
      x = naive::gather_sparse(apply("from_sparse", in_.other), apply("from_dense", x), {}, in_.grids, in_.other_grids);
    const bool pools = in_.kind == BlockKind::pooling;
    x = naive::gated_residual(x, apply("attn.proj", pools ? pooled(x) : attended(x)), part(2), in_.grids, pools);
    if (in_.caption) x = sum(x, apply("cross.proj", read_caption(x)));
    const Values n = naive::modulated_layer_norm(x, part(3), part(4), in_.grids);
    const Values y = apply("mlp.fc2", naive::map(apply("mlp.fc1", n), naive::gelu));
    return naive::gated_residual(x, y, part(5), in_.grids, false);
  }

 private:
  Values part(int64_t which) const { return columns(in_.modulation, which * kHidden); }
  Values apply(const std::string& layer, const Values& x) const {
    return naive::linear(x, parameters_.at(layer + ".weight"), parameters_.at(layer + ".bias"));
  }
  Values pooled(const Values& x) const {
    return apply("attn.v", naive::modulated_mean(x, part(0), part(1), in_.grids));
  }
  Values attended(const Values& x) const {
    const Values n = naive::modulated_layer_norm(x, part(0), part(1), in_.grids);
    if (in_.kind != BlockKind::dense) {
      const Values kv = apply("attn.kv", naive::modulated_layer_norm(in_.other, part(0), part(1), in_.other_grids));
      return attention(apply("attn.q", n), kv, in_.grids, in_.other_grids);
    }
    const Values qkv = apply("attn.qkv", n), q = columns(qkv, 0), kv = columns(qkv, kHidden, 2 * kHidden);
    if (in_.axis == Axis::time) return across_frames(q, kv);
    const naive::Grids grids = in_.axis == Axis::space ? frames_of(in_.grids) : in_.grids;
    return attention(q, kv, grids, grids);
  }
  Values read_caption(const Values& x) const {
    return attention(apply("cross.q", x), apply("cross.kv", in_.text), in_.grids, kCaptions);
  }
  static Values attention(const Values& q, const Values& kv, const naive::Grids& grids, const naive::Grids& keys) {
    return naive::attention(q, columns(kv, 0), columns(kv, kHidden), grids, keys, kHeads)[0];
  }
  // With the frames of each position beside one another.
  Values across_frames(const Values& q, const Values& kv) const {
    std::vector<int64_t> order;
    naive::Grids sequences;
    naive::for_samples(in_.grids, [&](int64_t b, int64_t first) {
      const Grid& g = in_.grids[size_t(b)];
      for (int64_t at = 0; at < g.height * g.width; ++at) {
        sequences.push_back({1, 1, g.frames});
        for (int64_t f = 0; f < g.frames; ++f) order.push_back(first + f * g.height * g.width + at);
      }
    });
    Values sorted_q = q, sorted_kv = kv, out = q;
    for (size_t i = 0; i < order.size(); ++i) {
      for (int64_t j = 0; j < q.cols; ++j) sorted_q(int64_t(i), j) = q(order[i], j);
      for (int64_t j = 0; j < kv.cols; ++j) sorted_kv(int64_t(i), j) = kv(order[i], j);
    }
    const Values sorted = attention(sorted_q, sorted_kv, sequences, sequences);
    for (size_t i = 0; i < order.size(); ++i)
      for (int64_t j = 0; j < q.cols; ++j) out(order[i], j) = sorted(int64_t(i), j);
    return out;
  }

  const Inputs& in_;
  std::map<std::string, Values> parameters_;
};

// ---- The library's.

struct Stored {
  HostLayout layout, other_layout, frames, captions;
  Tensor x, other, modulation, text, out;
  std::vector<Tensor> parameters;
  std::vector<Matrix> views;

  Stored(const Inputs& in, DType dtype)
      : layout(in.grids),
        other_layout(in.other_grids),
        frames(frames_of(in.grids)),
        captions(kCaptions),
        x(in.x, dtype, true),
        other(in.other, dtype, true),
        modulation(in.modulation, dtype, true),
        text(in.text, dtype, true),
        out(in.x.rows, kHidden, dtype, true) {
    for (const Values& v : in.parameters) parameters.emplace_back(v, dtype);
    for (Tensor& t : parameters) views.push_back(t.view());
  }
  BlockForward call(const Inputs& in, DType dtype, void* context, void* workspace) {
    BlockForward p{.shape = in.shape(dtype), .parameters = views, .layout = layout.view()};
    p.other_layout = other_layout.view(), p.x = x.view(), p.condition = modulation.view(), p.out = out.view();
    if (in.other.rows) p.other = other.view();
    if (in.axis == Axis::space) p.attention_layout = frames.view();
    p.across_frames = in.axis == Axis::time;
    if (in.caption) p.caption = text.view(), p.caption_layout = captions.view();
    p.context = context, p.workspace = workspace;
    return p;
  }
};

template <class Change>
Values forward(const Inputs& in, DType dtype, bool keeps_context, Change&& change) {
  Stored s(in, dtype);
  GuardedBytes context(keeps_context ? block_context_bytes(in.shape(dtype)) : 0);
  GuardedBytes workspace(block_workspace_bytes(in.shape(dtype), keeps_context));
  BlockForward p = s.call(in, dtype, keeps_context ? context.data() : nullptr, workspace.data());
  change(p);
  block_forward(p, {.threads = 2});
  CHECK_NOTE(context.intact() && workspace.intact() && s.out.guards_intact(), in.name());
  return s.out.values();
}
Values forward(const Inputs& in, DType dtype, bool keeps_context) {
  return forward(in, dtype, keeps_context, [](BlockForward&) {});
}

struct Gradients {
  Values x, other, modulation, text;
  std::vector<Values> parameters;
};
// With `before` the caption's gradient is added to it.
Gradients backward(const Inputs& in, DType dtype, const Values* before = nullptr) {
  Stored s(in, dtype);
  const BlockShape shape = in.shape(dtype);
  GuardedBytes context(block_context_bytes(shape)), workspace(block_workspace_bytes(shape, true));
  GuardedBytes backward_workspace(block_backward_workspace_bytes(shape));
  BlockBackward p;
  static_cast<BlockForward&>(p) = s.call(in, dtype, context.data(), workspace.data());
  block_forward(p, {.threads = 2});
  Tensor grad_out(in.grad_out, dtype), x(in.x.rows, kHidden, dtype), other(in.other.rows, kHidden, dtype),
      modulation(in.modulation.rows, 6 * kHidden, dtype), text(in.text.rows, kHidden, dtype);
  if (before) text = Tensor(*before, dtype);
  std::vector<Tensor> grads;
  std::vector<Matrix> views;
  for (const Values& v : in.parameters) grads.emplace_back(v.rows, v.cols, dtype);
  for (Tensor& t : grads) views.push_back(t.view());
  p.out = {}, p.workspace = backward_workspace.data(), p.grad_out = grad_out.view(), p.grad_x = x.view();
  if (in.other.rows) p.grad_other = other.view();
  if (in.caption) p.grad_caption = text.view(), p.accumulate_caption = before != nullptr;
  p.grad_condition = modulation.view(), p.grad_parameters = views;
  block_backward(p, {.threads = 2});
  CHECK_NOTE(context.intact() && workspace.intact() && backward_workspace.intact(), in.name());
  Gradients out{x.values(), other.values(), modulation.values(), text.values(), {}};
  for (Tensor& t : grads) out.parameters.push_back(t.values());
  return out;
}

}  // namespace

TEST_CASE(forward_is_the_definition) {
  double worst[3] = {};  // float64, float32, bfloat16
  for (const Inputs& in : all_inputs()) {
    const Values wanted = NaiveBlock(in).run();
    for (const bool keeps : {false, true}) {
      worst[0] = std::max(worst[0], error(forward(in, DType::float64, keeps), wanted));
      worst[1] = std::max(worst[1], error(forward(in, DType::float32, keeps), wanted));
      worst[2] = std::max(worst[2], error(forward(in, DType::bfloat16, keeps), wanted));
    }
  }
  std::printf("  float64 %.1e  float32 %.1e  bfloat16 %.1e\n", worst[0], worst[1], worst[2]);
  CHECK_NEAR(worst[0], 0.0, 1e-14);
  CHECK_NEAR(worst[1], 0.0, 4e-6);
  CHECK_NEAR(worst[2], 0.0, 4e-2);
}

TEST_CASE(gradients_are_derivatives) {
  double worst = 0;
  for (Inputs in : all_inputs()) {
    const Gradients gradients = backward(in, DType::float64);
    const auto loss = [&] { return dot(NaiveBlock(in).run(), in.grad_out); };
    Random random(11);
    const auto along = [&](Values& x, const Values& gradient, int single, const std::string& name) {
      if (x.rows == 0) return;
      for (const Values& direction : directions(x, 1, single, random)) {
        const double wanted = derivative(x, direction, loss), got = dot(gradient, direction);
        const double error = std::abs(got - wanted) / std::max(1.0, std::abs(wanted));
        CHECK_NOTE(error <= 2e-9, in.name(), ", ", name, ": ", got, ", must be ", wanted);
        worst = std::max(worst, error);
      }
    };
    along(in.x, gradients.x, 4, "x"), along(in.other, gradients.other, 4, "other");
    along(in.modulation, gradients.modulation, 6, "modulation"), along(in.text, gradients.text, 4, "caption");
    const auto specs = block_parameters(in.kind, kHidden, kMlp, in.style());
    for (size_t i = 0; i < specs.size(); ++i) along(in.parameters[i], gradients.parameters[i], 2, specs[i].name);
  }
  std::printf("  largest error against finite differences %.1e\n", worst);
}

TEST_CASE(other_types_have_close_gradients) {
  for (Inputs in : all_inputs()) {
    for (Values& v : in.parameters) v = Tensor(v, DType::bfloat16).values();
    const Gradients exact = backward(in, DType::float64);
    for (const auto& [dtype, most] : {std::pair(DType::float32, 4e-6), std::pair(DType::bfloat16, 5e-2)}) {
      const Gradients got = backward(in, dtype);
      double worst = std::max({error(got.x, exact.x), error(got.other, exact.other),
                               error(got.modulation, exact.modulation), error(got.text, exact.text)});
      for (size_t i = 0; i < got.parameters.size(); ++i)
        worst = std::max(worst, error(got.parameters[i], exact.parameters[i]));
      CHECK_NOTE(worst <= most, in.name(), " in ", name_of(dtype), ": ", worst);
    }
  }
}

TEST_CASE(gradients_of_a_caption_can_be_added) {
  const Inputs in = make(BlockKind::dense, true);
  Random random(3);
  const Values before = random_values(in.text.rows, kHidden, random);
  CHECK_NEAR(error(backward(in, DType::float64, &before).text, sum(backward(in, DType::float64).text, before)), 0.0,
             1e-14);
}

// Keys and values that lie in slots, some of which nobody reads, and the modulation brought along.
TEST_CASE(prepared_captions) {
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16}) {
    const Inputs in = make(BlockKind::recovery, true);
    Stored s(in, dtype);
    Tensor kv(in.text.rows, 2 * kHidden, dtype), slots(20, 2 * kHidden, dtype);
    linear({.x = s.text.view(), .weight = s.views[12], .bias = s.views[13], .y = kv.view()}, {.threads = 1});
    CHECK_EQ(block_parameters(in.kind, kHidden, kMlp, in.style())[12].name, "cross.kv.weight");
    const LayoutRow table[] = {{12, {1, 1, 4}}, {0, {1, 1, 1}}, {6, {1, 1, 3}}, {20, {0, 0, 0}}};
    Values places(20, 2 * kHidden), packed = kv.values();
    for (int64_t b = 0, row = 0; b < 3; ++b)
      for (int64_t i = 0; i < table[b].grid.width; ++i, ++row)
        for (int64_t j = 0; j < packed.cols; ++j) places(table[b].offset + i, j) = packed(row, j);
    slots.fill(places);
    const Values got = forward(in, dtype, false, [&](BlockForward& p) {
      p.prepared.modulation = p.condition, p.prepared.caption_kv = slots.view();
      p.condition = p.caption = {}, p.shape.caption_rows = 0, p.caption_layout = {table, 3};
    });
    CHECK_NOTE(identical(got, forward(in, dtype, false)), name_of(dtype));
  }
}

TEST_CASE(what_blocks_refuse) {
  const auto message = [](auto&& body) { return message_of<ArgumentError>(body); };
  Inputs in = make(BlockKind::generation, true);
  CHECK_EQ(message([&] { forward(in, DType::float32, false, [](auto& p) { p.caption_layout = {}; }); }),
           "generation block: caption_layout must have a caption for each sample");
  CHECK_EQ(message([&] { forward(in, DType::float32, false, [](auto& p) { p.across_frames = true; }); }),
           "generation block: attention within or across frames is for dense blocks");
  Matrix kv = {&in, 1, 2 * kHidden, 2 * kHidden, DType::float32};
  CHECK_EQ(message([&] { forward(in, DType::float32, true, [&](auto& p) { p.prepared.caption_kv = kv; }); }),
           "generation block: prepared is for inference, a context keeps what backward needs");
  in.parameters.pop_back();
  CHECK_EQ(message([&] { forward(in, DType::float32, false); }),
           "generation block: parameters holds 15 tensors, must hold 16");
}
