// The two ends of the model: condition and patch embedding before the blocks, the final layer behind them.
#include <algorithm>

#include "flexdit/block.h"
#include "model/arena.h"

namespace flexdit {
namespace {

void require(bool holds, const char* message) {
  if (!holds) throw ArgumentError(message);
}

struct FinalWorkspace {
  Matrix silu, grad_silu;              // [B, C]
  Matrix modulation, grad_modulation;  // [B, 2C]: shift, scale
  Matrix n, grad_n;                    // [R, C]
  void *statistics, *linear;
};

FinalWorkspace plan_final(int64_t batch, int64_t rows, int64_t c, int64_t patch_values, DType dtype, Arena& arena) {
  FinalWorkspace w;
  w.silu = arena.matrix(batch, c, dtype), w.grad_silu = arena.matrix(batch, c, dtype);
  w.modulation = arena.matrix(batch, 2 * c, dtype), w.grad_modulation = arena.matrix(batch, 2 * c, dtype);
  w.n = arena.matrix(rows, c, dtype), w.grad_n = arena.matrix(rows, c, dtype);
  w.statistics = arena.bytes(row_statistics_workspace(dtype, rows));
  w.linear = arena.bytes(
      std::max(linear_backward_workspace(dtype, 2 * c, c), linear_backward_workspace(dtype, patch_values, c)));
  return w;
}

FinalWorkspace plan_final(const FinalLayerForward& p) {
  require(p.parameters.size() == 4, "final layer: parameters must hold 4 tensors");
  Arena arena(p.workspace);
  return plan_final(p.layout.batch, p.x.rows, p.x.cols, p.parameters[2].rows, p.x.dtype, arena);
}

// Modulation and modulated layer norm, in forward and again in backward.
void normalize_final(const FinalLayerForward& p, const FinalWorkspace& w, const Execution& exec) {
  const int64_t c = p.x.cols;
  const Matrix modulation = p.modulation ? p.modulation : w.modulation;
  if (!p.modulation) {
    silu({.x = p.condition, .y = w.silu}, exec);
    linear({.x = w.silu, .weight = p.parameters[0], .bias = p.parameters[1], .y = w.modulation}, exec);
  }
  modulated_layer_norm({.x = p.x,
                        .shift = modulation.columns(0, c),
                        .scale = modulation.columns(c, c),
                        .layout = p.layout,
                        .y = w.n},
                       exec);
}

struct ConditionWorkspace {
  Matrix hidden, activated, grad_activated;  // [B, C]
  void* linear;
};

ConditionWorkspace plan_condition(int64_t batch, int64_t c, int64_t features, DType dtype, Arena& arena) {
  ConditionWorkspace w;
  w.hidden = arena.matrix(batch, c, dtype);
  w.activated = arena.matrix(batch, c, dtype);
  w.grad_activated = arena.matrix(batch, c, dtype);
  w.linear = arena.bytes(linear_backward_workspace(dtype, c, std::max(c, features)));
  return w;
}

// The first layer and its activation, in forward and again in backward.
ConditionWorkspace embed_timestep(const ConditionForward& p, const Execution& exec) {
  Arena arena(p.workspace);
  const auto w = plan_condition(p.features.rows, p.parameters[0].rows, p.features.cols, p.features.dtype, arena);
  linear({.x = p.features, .weight = p.parameters[0], .bias = p.parameters[1], .y = w.hidden}, exec);
  silu({.x = w.hidden, .y = w.activated}, exec);
  return w;
}

}  // namespace

int64_t final_layer_workspace_bytes(int64_t batch, int64_t rows, int64_t hidden, int64_t patch_values, DType dtype) {
  Arena arena;
  plan_final(batch, rows, hidden, patch_values, dtype, arena);
  return arena.used();
}

void final_layer_forward(const FinalLayerForward& p, const Execution& exec) {
  const FinalWorkspace w = plan_final(p);
  if (!p.normed) normalize_final(p, w, exec);
  linear({.x = p.normed ? p.normed : w.n, .weight = p.parameters[2], .bias = p.parameters[3], .y = p.out}, exec);
}

void final_layer_backward(const FinalLayerBackward& p, const Execution& exec) {
  const FinalWorkspace w = plan_final(p);
  require(p.grad_parameters.size() == 4, "final layer: grad_parameters must hold 4 tensors");
  const int64_t c = p.x.cols;
  normalize_final(p, w, exec);
  linear_backward({.x = w.n,
                   .weight = p.parameters[2],
                   .grad_y = p.grad_out,
                   .grad_x = w.grad_n,
                   .grad_weight = p.grad_parameters[2],
                   .grad_bias = p.grad_parameters[3],
                   .workspace = w.linear},
                  exec);
  modulated_layer_norm_backward({.x = p.x,
                                 .scale = w.modulation.columns(c, c),
                                 .layout = p.layout,
                                 .grad_y = w.grad_n,
                                 .grad_residual = {},
                                 .grad_x = p.grad_x,
                                 .grad_shift = w.grad_modulation.columns(0, c),
                                 .grad_scale = w.grad_modulation.columns(c, c),
                                 .workspace = w.statistics},
                                exec);
  linear_backward({.x = w.silu,
                   .weight = p.parameters[0],
                   .grad_y = w.grad_modulation,
                   .grad_x = w.grad_silu,
                   .grad_weight = p.grad_parameters[0],
                   .grad_bias = p.grad_parameters[1],
                   .workspace = w.linear},
                  exec);
  silu_backward({.x = p.condition, .grad_y = w.grad_silu, .grad_x = p.grad_condition}, exec);
}

int64_t condition_workspace_bytes(int64_t batch, int64_t hidden, int64_t features, DType dtype) {
  Arena arena;
  plan_condition(batch, hidden, features, dtype, arena);
  return arena.used();
}

void condition_forward(const ConditionForward& p, const Execution& exec) {
  const bool labels = p.parameters.size() == 5;
  require(labels || p.parameters.size() == 4, "condition: parameters must hold 5 tensors, or 4 without labels");
  const ConditionWorkspace w = embed_timestep(p, exec);
  linear({.x = w.activated, .weight = p.parameters[2], .bias = p.parameters[3], .y = p.out}, exec);
  if (labels) label_embedding({.labels = p.labels, .table = p.parameters[4], .x = p.out}, exec);
}

void condition_backward(const ConditionBackward& p, const Execution& exec) {
  require(p.parameters.size() == 5, "condition: parameters must hold 5 tensors");
  const ConditionWorkspace w = embed_timestep(p, exec);
  require(p.grad_parameters.size() == 5, "condition: grad_parameters must hold 5 tensors");
  linear_backward({.x = w.activated,
                   .weight = p.parameters[2],
                   .grad_y = p.grad_out,
                   .grad_x = w.grad_activated,
                   .grad_weight = p.grad_parameters[2],
                   .grad_bias = p.grad_parameters[3],
                   .workspace = w.linear},
                  exec);
  silu_backward({.x = w.hidden, .grad_y = w.grad_activated, .grad_x = w.grad_activated}, exec);
  linear_backward({.x = p.features,
                   .weight = p.parameters[0],
                   .grad_y = w.grad_activated,
                   .grad_x = {},
                   .grad_weight = p.grad_parameters[0],
                   .grad_bias = p.grad_parameters[1],
                   .workspace = w.linear},
                  exec);
  if (p.grad_parameters[4])
    label_embedding_backward({.labels = p.labels, .grad_out = p.grad_out, .grad_table = p.grad_parameters[4]}, exec);
}

int64_t patch_embed_backward_workspace_bytes(int64_t rows, int64_t hidden, int64_t patch_values, DType dtype) {
  Arena arena;
  arena.matrix(rows, patch_values, dtype);
  arena.bytes(linear_backward_workspace(dtype, hidden, patch_values));
  return arena.used();
}

void patch_embed_forward(const PatchEmbedForward& p, const Execution& exec) {
  require(p.parameters.size() == 2, "patch embedding: parameters must hold 2 tensors");
  patchify(p.image, exec);
  linear({.x = p.image.rows, .weight = p.parameters[0], .bias = p.parameters[1], .y = p.out}, exec);
  add_position({.x = p.out, .position = p.position, .layout = p.layout}, exec);
}

void patch_embed_backward(const PatchEmbedBackward& p, const Execution& exec) {
  require(p.parameters.size() == 2 && p.grad_parameters.size() == 2,
          "patch embedding: parameters and grad_parameters must hold 2 tensors");
  Arena arena(p.workspace);
  const Matrix& rows = p.image.rows;
  const Matrix grad_rows = arena.matrix(rows.rows, rows.cols, rows.dtype);
  void* workspace = arena.bytes(linear_backward_workspace(rows.dtype, p.grad_out.cols, rows.cols));
  linear_backward({.x = rows,
                   .weight = p.parameters[0],
                   .grad_y = p.grad_out,
                   .grad_x = p.image.image ? grad_rows : Matrix{},
                   .grad_weight = p.grad_parameters[0],
                   .grad_bias = p.grad_parameters[1],
                   .workspace = workspace},
                  exec);
  if (!p.image.image) return;
  Patches image = p.image;
  image.rows = grad_rows;
  unpatchify(image, exec);
}

}  // namespace flexdit
