// The model's sizes, forward and backward.
#include "flexdit/model.h"

#include <algorithm>

#include "model/walk.h"
#include "ops/message.h"

namespace flexdit {
namespace {

// Gradients on their way back: two buffers each for dense and sparse tokens, one read while the other is written.
struct GradientBuffers {
  Matrix dense[2], sparse[2], condition;
  void* temporary;

  GradientBuffers(const ModelForward& p, const Walk& walk, Arena& arena) {
    for (int i = 0; i < 2; ++i) {
      dense[i] = arena.matrix(walk.rows(), p.config.hidden, p.dtype);
      sparse[i] = arena.matrix(walk.sparse_rows(), p.config.hidden, p.dtype);
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
    b.layout = walk_.layout();
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
    pool_tokens_backward({.layout = walk_.layout(),
                          .sparse_layout = p_.sparse_layout,
                          .grad_out = grads_.sparse[0],
                          .grad_x = grads_.dense[0],
                          .accumulate = true},
                         exec_);
  }

  void embed() {
    PatchEmbedBackward patch;
    patch.parameters = p_.parameters.subspan(walk_.places.patch_embed, 2);
    patch.image = walk_.image(p_.grad_x);
    patch.layout = walk_.layout();
    patch.grad_out = grads_.dense[0];
    patch.grad_parameters = gradients(walk_.places.patch_embed, 2);
    patch.workspace = grads_.temporary;
    patch_embed_backward(patch, exec_);
    ConditionBackward condition;
    condition.parameters = p_.parameters.subspan(walk_.places.timestep, 5);
    condition.features = p_.timestep_features ? p_.timestep_features : walk_.features;
    condition.labels = p_.labels;
    condition.workspace = grads_.temporary;
    condition.grad_out = grads_.condition;
    condition.grad_parameters = gradients(walk_.places.timestep, 5);
    condition_backward(condition, exec_);
  }

  const ModelBackward& p_;
  const Walk& walk_;
  GradientBuffers& grads_;
  const Execution& exec_;
};

// Of model_parameters, without its names: this runs before every pass.
size_t parameter_count(const Config& c) {
  size_t count = parameter_places(c).first_block + final_parameters(c);
  const auto kinds = model_blocks(c);
  for (size_t k = 0; k < kinds.size(); ++k) count += model_block_parameters(c, kinds[k], k);
  return count;
}

void require_trained_here(const Config& c) {
  if (shares_modulation(c))
    throw ArgumentError("model: config.family is FlexPixArt or FlexLatte, whose gradients Python's block ops compute");
}

// What a model with a shared modulation needs besides.
void check_shared(const ModelForward& p) {
  const Config& c = p.config;
  const auto require = [](bool holds, const auto&... parts) {
    if (!holds) refuse("model: ", parts...);
  };
  require(!p.context, "context is for backward, which FlexPixArt and FlexLatte do not have here");
  require(bool(p.prepared.modulation), "prepared.modulation is missing, FlexPixArt and FlexLatte need it");
  require(bool(p.positions), "positions is missing, FlexPixArt and FlexLatte need it");
  require(std::ssize(p.prepared.caption_kv) == cross_blocks(c), "prepared.caption_kv holds ",
          p.prepared.caption_kv.size(), " matrices, must hold ", cross_blocks(c));
  require(p.prepared.caption_kv.empty() || p.prepared.caption_layout.batch == p.batch, "prepared.caption_layout has ",
          p.prepared.caption_layout.batch, " samples, must have ", p.batch);
  if (c.family != ModelFamily::latte) return;
  require(p.frames.table && (p.sparse_frames.table || c.num_sdtm == 0), "frames or sparse_frames is missing");
  require(p.times || !time_place(c), "times is missing");
}

void check(const ModelForward& p, const Execution& exec) {
  const Config& c = p.config;
  const size_t wanted = parameter_count(c);
  const auto require = [](bool holds, const auto&... parts) {
    if (!holds) refuse("model: ", parts...);
  };
  require(p.parameters.size() == wanted, "parameters holds ", p.parameters.size(), " tensors, must hold ", wanted);
  require(c.num_sdtm == 0 || (c.generation_blocks >= 1 && c.recovery_blocks >= 1),
          "config has modules without a generation or a recovery block");
  require(c.num_sdtm == 0 || p.sparse_layout.batch == p.batch, "sparse_layout has ", p.sparse_layout.batch,
          " samples, must have ", p.batch);
  require(shares_modulation(c) || p.t || p.timestep_features || p.prepared.modulation,
          "t and timestep_features are both missing");
  require(p.layout.table || exec.device == Device::cpu, "layout is missing");
  require(!p.layout.table || p.layout.batch == p.batch, "layout has ", p.layout.batch, " samples, must have ", p.batch);
  const ModelPrepared& prepared = p.prepared;
  require(prepared.packed.empty() || prepared.packed.size() == wanted, "prepared.packed must be as long as parameters");
  require(prepared.folded.empty() || prepared.folded.size() == 2 * static_cast<size_t>(c.num_pooling_blocks),
          "prepared.folded must hold a weight and a bias for each pooling block");
  require(!prepared.modulation ||
              (prepared.modulation.rows == p.batch && prepared.modulation.cols == model_modulation_columns(c)),
          "prepared.modulation is ", Shape{prepared.modulation.rows, prepared.modulation.cols}, ", must be ",
          Shape{p.batch, model_modulation_columns(c)});
  const bool any = prepared.modulation || !prepared.packed.empty() || !prepared.folded.empty();
  require(!any || !p.context, "prepared is for inference, a context keeps what backward needs");
  if (shares_modulation(c)) check_shared(p);
}

// For measuring: nothing is carved.
ModelForward without_memory(ModelForward p) {
  p.context = p.workspace = nullptr;
  return p;
}

// The gradients and the temporaries of backward; the walk's own few rows come first in the workspace.
int64_t backward_bytes(const ModelForward& p, const Walk& walk) {
  Arena arena;
  GradientBuffers grads(p, walk, arena);
  const auto& c = p.config;
  const int64_t rows = walk.rows();
  const int64_t values = c.patch_size * c.patch_size;
  int64_t temporary =
      std::max({patch_embed_backward_workspace_bytes(rows, c.hidden, c.in_channels * values, p.dtype),
                condition_workspace_bytes(p.batch, c.hidden, c.timestep_features, p.dtype),
                final_layer_workspace_bytes(p.batch, rows, c.hidden, c.out_channels * values, p.dtype)});
  for (const BlockCall& call : walk.calls) temporary = std::max(temporary, block_backward_workspace_bytes(call.shape));
  return arena.used() + temporary;
}

}  // namespace

int64_t model_context_bytes(const ModelForward& p) {
  require_trained_here(p.config);
  return Walk(without_memory(p), true, nullptr).context_bytes();
}

int64_t model_workspace_bytes(const ModelForward& p, bool keeps_context) {
  return Walk(without_memory(p), keeps_context, nullptr).workspace_bytes();
}

int64_t model_backward_workspace_bytes(const ModelForward& p) {
  require_trained_here(p.config);
  const ModelForward measured = without_memory(p);
  const Walk walk(measured, true, nullptr);
  return walk.workspace_bytes() + backward_bytes(measured, walk);
}

void model_forward(const ModelForward& p, const Execution& exec) {
  check(p, exec);
  Walk(p, p.context != nullptr, &exec);
}

void model_backward(const ModelBackward& p, const Execution& exec) {
  require_trained_here(p.config);
  check(p, exec);
  if (p.grad_parameters.size() != p.parameters.size())
    throw ArgumentError("model: grad_parameters must hold as many tensors as parameters");
  const Walk walk(p, true, nullptr);
  Arena arena(static_cast<char*>(p.workspace) + walk.workspace_bytes());
  GradientBuffers grads(p, walk, arena);
  Backward(p, walk, grads, exec).run();
}

}  // namespace flexdit
