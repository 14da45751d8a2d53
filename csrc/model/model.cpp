// The model from end to end. One walk over the blocks serves three purposes: it computes (forward), it measures
// buffers (null pointers, nothing computed), and it recalls where forward kept its activations (backward).
#include "flexdit/model.h"

#include <algorithm>
#include <optional>

#include "model/arena.h"

namespace flexdit {
namespace {

constexpr size_t kPosition = 0, kPatchEmbed = 1, kCondition = 3, kBlocks = 8;

struct BlockCall {
  BlockShape shape;
  size_t first_parameter, num_parameters;
  bool sparse;  // x are sparse tokens
  Matrix x, other, out;
  void* context;
};

struct Module {
  Matrix dense, pooled;         // the tokens that enter, and their pooled grid
  size_t first, recovery, end;  // block calls: [first, recovery) on sparse tokens, [recovery, end) recovery blocks
};

class Walk {
 public:
  // With `exec` the walk computes; without, it only lays the buffers out.
  Walk(const ModelForward& p, bool keeps_context, const Execution* exec)
      : p_(p),
        c_(p.config),
        exec_(exec),
        keeps_(keeps_context),
        kept_(p.context),
        scratch_(p.workspace),
        dense_layout_(p.batch, c_.dense_grid()) {
    rows_ = p.batch * c_.dense_grid().tokens();
    if (p.sparse_layout.table) sparse_rows_ = p.sparse_layout.total();
    if (!keeps_)
      for (int i = 0; i < 2; ++i) {
        buffers_[0][i] = scratch_.matrix(rows_, c_.hidden, p.dtype);
        buffers_[1][i] = scratch_.matrix(sparse_rows_, c_.hidden, p.dtype);
      }
    patches = store().matrix(rows_, c_.in_channels * c_.patch_size * c_.patch_size, p.dtype);
    features = store().matrix(p.batch, c_.timestep_features, p.dtype);
    condition = store().matrix(p.batch, c_.hidden, p.dtype);
    final_rows = scratch_.matrix(rows_, c_.out_channels * c_.patch_size * c_.patch_size, p.dtype);
    run();
  }

  Matrix patches, features, condition, final_rows, tokens;
  std::vector<BlockCall> calls;
  std::vector<Module> modules;
  size_t final_parameter = 0;
  // Bytes that blocks and ends take besides, one after another in the same place.
  int64_t temporary_bytes = 0;

  int64_t context_bytes() const { return kept_.used(); }
  int64_t workspace_bytes() const { return scratch_.used() + temporary_bytes; }
  TokenLayout dense_layout() const { return dense_layout_.view(); }

 private:
  Arena& store() { return keeps_ ? kept_ : scratch_; }

  // A place for tokens: kept for backward, or the one of two buffers that does not hold `busy`.
  Matrix place(bool sparse, const Matrix& busy) {
    if (keeps_) return kept_.matrix(sparse ? sparse_rows_ : rows_, c_.hidden, p_.dtype);
    return buffers_[sparse][busy.data == buffers_[sparse][0].data ? 1 : 0];
  }

  std::span<const Matrix> parameters(size_t first, size_t count) const { return p_.parameters.subspan(first, count); }
  void* temporary(int64_t bytes) {
    temporary_bytes = std::max(temporary_bytes, bytes);
    return p_.workspace ? static_cast<char*>(p_.workspace) + scratch_.used() : nullptr;
  }

  void run() {
    embed();
    for (int64_t i = 0; i < c_.num_pooling_blocks; ++i) tokens = block(BlockKind::pooling, false, tokens);
    for (int64_t i = 0; i < c_.num_sdtm; ++i) module();
    for (int64_t i = 0; i < c_.num_dense_blocks; ++i) tokens = block(BlockKind::dense, false, tokens);
    final_parameter = next_parameter_;
    finish();
  }

  void module() {
    Module m;
    m.dense = tokens;
    m.pooled = place(true, {});
    m.first = calls.size();
    if (exec_)
      pool_tokens({.x = tokens,
                   .position = position(),
                   .layout = dense_layout(),
                   .sparse_layout = p_.sparse_layout,
                   .out = m.pooled},
                  *exec_);
    Matrix s = m.pooled;
    for (int64_t j = 0; j < c_.generation_blocks; ++j) s = block(BlockKind::generation, true, s, m.dense);
    for (int64_t j = 0; j < c_.sparse_blocks; ++j) s = block(BlockKind::dense, true, s);
    m.recovery = calls.size();
    for (int64_t j = 0; j < c_.recovery_blocks; ++j) tokens = block(BlockKind::recovery, false, tokens, s);
    m.end = calls.size();
    modules.push_back(m);
    for (int64_t j = 0; j < c_.dense_blocks; ++j) tokens = block(BlockKind::dense, false, tokens);
  }

  Matrix block(BlockKind kind, bool sparse, const Matrix& x, const Matrix& other = {}) {
    BlockCall call{.shape = {.kind = kind,
                             .hidden = c_.hidden,
                             .mlp_hidden = c_.mlp_hidden,
                             .num_heads = c_.num_heads,
                             .batch = p_.batch,
                             .rows = x.rows,
                             .other_rows = other.rows,
                             .dtype = p_.dtype},
                   .first_parameter = next_parameter_,
                   .num_parameters = block_parameters(kind, c_.hidden, c_.mlp_hidden).size(),
                   .sparse = sparse,
                   .x = x,
                   .other = other,
                   .out = place(sparse, x),
                   .context = nullptr};
    next_parameter_ += call.num_parameters;
    if (keeps_) call.context = kept_.bytes(block_context_bytes(call.shape));
    void* workspace = temporary(block_workspace_bytes(call.shape, keeps_));
    if (exec_) block_forward(forward_of(call, workspace), *exec_);
    calls.push_back(call);
    return call.out;
  }

  void embed() {
    tokens = place(false, {});
    void* workspace = temporary(condition_workspace_bytes(p_.batch, c_.hidden, c_.timestep_features, p_.dtype));
    if (!exec_) return;
    if (!p_.timestep_features) timestep_embedding({.t = p_.t, .out = features}, *exec_);
    condition_forward({.parameters = parameters(kCondition, 5),
                       .features = p_.timestep_features ? p_.timestep_features : features,
                       .labels = p_.labels,
                       .out = condition,
                       .workspace = workspace},
                      *exec_);
    patch_embed_forward({.parameters = parameters(kPatchEmbed, 2),
                         .image = image(const_cast<void*>(p_.x)),
                         .position = p_.parameters[kPosition],
                         .layout = dense_layout(),
                         .out = tokens},
                        *exec_);
  }

  void finish() {
    void* workspace = temporary(final_layer_workspace_bytes(p_.batch, rows_, c_.hidden, final_rows.cols, p_.dtype));
    if (!exec_) return;
    final_layer_forward({.parameters = parameters(final_parameter, 4),
                         .layout = dense_layout(),
                         .x = tokens,
                         .condition = condition,
                         .out = final_rows,
                         .workspace = workspace},
                        *exec_);
    unpatchify(final_image(p_.out), *exec_);
  }

 public:
  Patches image(void* data) const {
    return {.image = data,
            .rows = patches,
            .layout = dense_layout(),
            .channels = c_.in_channels,
            .patch = c_.patch_size};
  }
  Patches final_image(void* data) const {
    return {.image = data,
            .rows = final_rows,
            .layout = dense_layout(),
            .channels = c_.out_channels,
            .patch = c_.patch_size,
            .channels_last = true};
  }
  Matrix position() const { return c_.reinject_position && exec_ ? p_.parameters[kPosition] : Matrix{}; }
  BlockForward forward_of(const BlockCall& call, void* workspace) const {
    const bool recovery = call.shape.kind == BlockKind::recovery;
    return {.shape = call.shape,
            .parameters = parameters(call.first_parameter, call.num_parameters),
            .layout = call.sparse ? p_.sparse_layout : dense_layout(),
            .other_layout = recovery ? p_.sparse_layout : dense_layout(),
            .x = call.x,
            .other = call.other,
            .condition = condition,
            .position = recovery ? position() : Matrix{},
            .out = call.out,
            .context = call.context,
            .workspace = workspace};
  }

 private:
  const ModelForward& p_;
  const Config& c_;
  const Execution* exec_;
  bool keeps_;
  Arena kept_, scratch_;
  HostLayout dense_layout_;
  int64_t rows_ = 0, sparse_rows_ = 0;
  Matrix buffers_[2][2];  // without context: two for dense tokens, two for sparse ones
  size_t next_parameter_ = kBlocks;
};

// Gradients on their way back: two buffers each for dense and sparse tokens, one read while the other is written.
struct GradientBuffers {
  Matrix dense[2], sparse[2], condition;
  void* temporary;

  GradientBuffers(const ModelForward& p, Arena& arena) {
    const int64_t rows = p.batch * p.config.dense_grid().tokens();
    const int64_t sparse_rows = p.sparse_layout.table ? p.sparse_layout.total() : 0;
    for (int i = 0; i < 2; ++i) {
      dense[i] = arena.matrix(rows, p.config.hidden, p.dtype);
      sparse[i] = arena.matrix(sparse_rows, p.config.hidden, p.dtype);
    }
    condition = arena.matrix(p.batch, p.config.hidden, p.dtype);
    temporary = arena.bytes(0);
  }
};

class Backward {
 public:
  // `walk` was made without execution over forward's context, its final rows in p.workspace behind the gradients.
  Backward(const ModelBackward& p, const Walk& walk, GradientBuffers& grads, const Execution& exec)
      : p_(p), walk_(walk), grads_(grads), exec_(exec) {}

  void run() {
    finish();
    size_t call = walk_.calls.size();
    for (size_t m = walk_.modules.size(); m-- > 0;) {
      while (call > walk_.modules[m].end) block(--call, grads_.dense);
      module(walk_.modules[m]);
      call = walk_.modules[m].first;
    }
    while (call > 0) block(--call, grads_.dense);
    embed();
  }

 private:
  std::span<const Matrix> gradients(size_t first, size_t count) const {
    return p_.grad_parameters.subspan(first, count);
  }

  void finish() {
    patchify(walk_.final_image(const_cast<void*>(p_.grad_out)), exec_);
    FinalLayerBackward b;
    b.parameters = p_.parameters.subspan(walk_.final_parameter, 4);
    b.layout = walk_.dense_layout();
    b.x = walk_.tokens, b.condition = walk_.condition, b.workspace = grads_.temporary;
    b.grad_out = walk_.final_rows, b.grad_x = grads_.dense[0], b.grad_condition = grads_.condition;
    b.grad_parameters = gradients(walk_.final_parameter, 4);
    final_layer_backward(b, exec_);
  }

  // The gradient moves from buffers[0] to buffers[1]; then they change places.
  void block(size_t index, Matrix (&buffers)[2], const Matrix& grad_other = {}, bool accumulate_other = false) {
    const BlockCall& call = walk_.calls[index];
    BlockBackward b;
    static_cast<BlockForward&>(b) = walk_.forward_of(call, grads_.temporary);
    b.grad_out = buffers[0], b.grad_x = buffers[1];
    b.grad_other = grad_other, b.accumulate_other = accumulate_other;
    b.grad_condition = grads_.condition, b.accumulate_condition = true;
    b.grad_parameters = gradients(call.first_parameter, call.num_parameters);
    block_backward(b, exec_);
    std::swap(buffers[0], buffers[1]);
  }

  void module(const Module& m) {
    for (size_t i = m.end; i-- > m.recovery;) block(i, grads_.dense, grads_.sparse[0], i + 1 < m.end);
    for (size_t i = m.recovery; i-- > m.first;) {
      const bool generation = walk_.calls[i].shape.kind == BlockKind::generation;
      block(i, grads_.sparse, generation ? grads_.dense[0] : Matrix{}, true);
    }
    pool_tokens_backward({.layout = walk_.dense_layout(),
                          .sparse_layout = p_.sparse_layout,
                          .grad_out = grads_.sparse[0],
                          .grad_x = grads_.dense[0],
                          .accumulate = true},
                         exec_);
  }

  void embed() {
    PatchEmbedBackward patch;
    patch.parameters = p_.parameters.subspan(kPatchEmbed, 2);
    patch.image = walk_.image(p_.grad_x);
    patch.layout = walk_.dense_layout();
    patch.grad_out = grads_.dense[0];
    patch.grad_parameters = gradients(kPatchEmbed, 2);
    patch.workspace = grads_.temporary;
    patch_embed_backward(patch, exec_);
    ConditionBackward condition;
    condition.parameters = p_.parameters.subspan(kCondition, 5);
    condition.features = p_.timestep_features ? p_.timestep_features : walk_.features;
    condition.labels = p_.labels;
    condition.workspace = grads_.temporary;
    condition.grad_out = grads_.condition;
    condition.grad_parameters = gradients(kCondition, 5);
    condition_backward(condition, exec_);
  }

  const ModelBackward& p_;
  const Walk& walk_;
  GradientBuffers& grads_;
  const Execution& exec_;
};

void check(const ModelForward& p) {
  const Config& c = p.config;
  const size_t wanted = model_parameters(c).size();
  const auto require = [](bool holds, const std::string& message) {
    if (!holds) throw ArgumentError("model: " + message);
  };
  require(p.parameters.size() == wanted,
          "parameters holds " + std::to_string(p.parameters.size()) + " tensors, must hold " + std::to_string(wanted));
  require(c.num_sdtm == 0 || (c.generation_blocks >= 1 && c.recovery_blocks >= 1),
          "config has modules without a generation or a recovery block");
  require(
      c.num_sdtm == 0 || p.sparse_layout.batch == p.batch,
      "sparse_layout has " + std::to_string(p.sparse_layout.batch) + " samples, must have " + std::to_string(p.batch));
  require(p.t || p.timestep_features, "t and timestep_features are both missing");
}

// The gradients and the temporaries of backward; the walk's own few rows come first in the workspace.
int64_t backward_bytes(const ModelForward& p, const Walk& walk) {
  Arena arena;
  GradientBuffers grads(p, arena);
  const auto& c = p.config;
  const int64_t rows = p.batch * c.dense_grid().tokens();
  const int64_t values = c.patch_size * c.patch_size;
  int64_t temporary =
      std::max({patch_embed_backward_workspace_bytes(rows, c.hidden, c.in_channels * values, p.dtype),
                condition_workspace_bytes(p.batch, c.hidden, c.timestep_features, p.dtype),
                final_layer_workspace_bytes(p.batch, rows, c.hidden, c.out_channels * values, p.dtype)});
  for (const BlockCall& call : walk.calls) temporary = std::max(temporary, block_backward_workspace_bytes(call.shape));
  return arena.used() + temporary;
}

}  // namespace

std::vector<ParameterSpec> model_parameters(const Config& c) {
  const int64_t values = c.patch_size * c.patch_size, h = c.hidden;
  std::vector<ParameterSpec> specs = {
      {"pos_embed", c.dense_grid().tokens(), h},
      {"patch_embed.weight", h, c.in_channels * values},
      {"patch_embed.bias", 1, h},
      {"timestep_embed.fc1.weight", h, c.timestep_features},
      {"timestep_embed.fc1.bias", 1, h},
      {"timestep_embed.fc2.weight", h, h},
      {"timestep_embed.fc2.bias", 1, h},
      {"label_embed.weight", c.label_rows, h},
  };
  const auto add = [&](const std::string& prefix, int64_t count, BlockKind kind) {
    for (int64_t i = 0; i < count; ++i)
      for (auto& spec : block_parameters(kind, h, c.mlp_hidden))
        specs.push_back({prefix + "." + std::to_string(i) + "." + spec.name, spec.rows, spec.cols});
  };
  add("pooling_blocks", c.num_pooling_blocks, BlockKind::pooling);
  for (int64_t i = 0; i < c.num_sdtm; ++i) {
    const std::string module = "sdtm." + std::to_string(i);
    add(module + ".generation", c.generation_blocks, BlockKind::generation);
    add(module + ".sparse", c.sparse_blocks, BlockKind::dense);
    add(module + ".recovery", c.recovery_blocks, BlockKind::recovery);
    add(module + ".dense", c.dense_blocks, BlockKind::dense);
  }
  add("dense_blocks", c.num_dense_blocks, BlockKind::dense);
  specs.push_back({"final_layer.modulation.weight", 2 * h, h});
  specs.push_back({"final_layer.modulation.bias", 1, 2 * h});
  specs.push_back({"final_layer.linear.weight", c.out_channels * values, h});
  specs.push_back({"final_layer.linear.bias", 1, c.out_channels * values});
  return specs;
}

int64_t model_macs(const Config& c, Grid sparse) {
  const int64_t n = c.dense_grid().tokens(), m = sparse.tokens(), h = c.hidden, values = c.patch_size * c.patch_size;
  const auto mlp = [&](int64_t tokens) { return 2 * tokens * h * c.mlp_hidden + 6 * h * h; };  // and its modulation
  const auto self = [&](int64_t tokens) { return 4 * tokens * h * h + 2 * tokens * tokens * h + mlp(tokens); };
  const int64_t pooling = 2 * h * h + mlp(n);
  const int64_t cross = 2 * n * m * h;
  const int64_t generation = (2 * m + 2 * n) * h * h + cross + mlp(m);
  const int64_t recovery = (m + n) * h * h + (2 * n + 2 * m) * h * h + cross + mlp(n);
  const int64_t module = c.generation_blocks * generation + c.sparse_blocks * self(m) + c.recovery_blocks * recovery +
                         c.dense_blocks * self(n);
  const int64_t ends = n * h * values * (c.in_channels + c.out_channels) + 2 * h * h + (c.timestep_features + h) * h;
  return ends + c.num_pooling_blocks * pooling + c.num_sdtm * module + c.num_dense_blocks * self(n);
}

int64_t model_context_bytes(const ModelForward& p) { return Walk(p, true, nullptr).context_bytes(); }

int64_t model_workspace_bytes(const ModelForward& p, bool keeps_context) {
  return Walk(p, keeps_context, nullptr).workspace_bytes();
}

int64_t model_backward_workspace_bytes(const ModelForward& p) {
  const Walk walk(p, true, nullptr);
  return walk.workspace_bytes() + backward_bytes(p, walk);
}

void model_forward(const ModelForward& p, const Execution& exec) {
  check(p);
  Walk(p, p.context != nullptr, &exec);
}

void model_backward(const ModelBackward& p, const Execution& exec) {
  check(p);
  if (p.grad_parameters.size() != p.parameters.size())
    throw ArgumentError("model: grad_parameters must hold as many tensors as parameters");
  const Walk walk(p, true, nullptr);
  Arena arena(static_cast<char*>(p.workspace) + walk.workspace_bytes());
  GradientBuffers grads(p, arena);
  Backward(p, walk, grads, exec).run();
}

}  // namespace flexdit
