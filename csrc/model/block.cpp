// The blocks of method.md, composed of the operations of ops.h.
#include "flexdit/block.h"

#include "model/block_plans.h"
#include "ops/message.h"

namespace flexdit {
namespace {

// The modulation's six parts, in the order of its rows.
enum Part { kShift1, kScale1, kGate1, kShift2, kScale2, kGate2, kParts };

Matrix part(const Matrix& modulation, Part which) {
  const int64_t c = modulation.cols / kParts;
  return modulation.columns(which * c, c);
}

// A linear layer's weight and bias, or their gradients.
struct Layer {
  Matrix weight, bias;
  const PackedWeight* packed = nullptr;
};

// A block's parameters by role; the order is block_parameters'.
struct Roles {
  Layer modulation, v, q, kv, qkv, proj, cross_q, cross_kv, cross_proj, fc1, fc2, from_sparse, from_dense;

  Roles(const BlockShape& s, std::span<const Matrix> list, std::span<const PackedWeight* const> packed = {}) {
    size_t next = 0;
    const auto take = [&](Layer& layer) {
      layer = {list[next], list[next + 1], packed.empty() ? nullptr : packed[next]};
      next += 2;
    };
    const BlockKind kind = s.kind;
    if (!s.style.shared_modulation) take(modulation);
    if (kind == BlockKind::recovery) take(from_sparse), take(from_dense);
    if (kind == BlockKind::pooling) take(v);
    if (kind == BlockKind::dense) take(qkv);
    if (is_cross(kind)) take(q), take(kv);
    take(proj);
    if (s.style.caption) take(cross_q), take(cross_kv), take(cross_proj);
    take(fc1), take(fc2);
  }
};

void apply(const Layer& layer, const Matrix& x, const Matrix& y, const Execution& exec,
           Activation activation = Activation::none) {
  linear({.x = x,
          .weight = layer.weight,
          .bias = layer.bias,
          .y = y,
          .packed = layer.packed,
          .activation = activation},
         exec);
}

Attention attention_of(const BlockForward& p, const BlockContext& k) {
  const int64_t c = p.shape.hidden;
  Attention a;
  if (is_cross(p.shape.kind)) {
    a.q = k.q, a.k = k.kv.columns(0, c), a.v = k.kv.columns(c, c);
    a.layout_k = p.other_layout;
  } else {
    a.q = k.qkv.columns(0, c), a.k = k.qkv.columns(c, c), a.v = k.qkv.columns(2 * c, c);
    a.layout_k = p.attention_layout.table ? p.attention_layout : p.layout;
    a.across_frames = p.across_frames, a.max_positions = p.max_positions;
  }
  a.layout_q = is_cross(p.shape.kind) ? p.layout : a.layout_k;
  a.num_heads = p.shape.num_heads;
  a.out = k.attended;
  a.lse = k.lse;
  return a;
}

void normalize(const Matrix& x, const TokenLayout& layout, const Matrix& modulation, Part shift, const Matrix& y,
               const Execution& exec, double eps = kLayerNormEps) {
  modulated_layer_norm(
      {.x = x,
       .shift = part(modulation, shift),
       .scale = part(modulation, Part(shift + 1)),
       .layout = layout,
       .y = y,
       .eps = eps},
      exec);
}

// The tokens that the first residual adds to: x, or m in recovery.
Matrix base_of(const BlockForward& p, const BlockContext& k) {
  return p.shape.kind == BlockKind::recovery ? k.base : p.x;
}

void forward_attention(const BlockForward& p, const Roles& w, const BlockContext& k, const BlockWorkspace& ws,
                       const Execution& exec) {
  const auto& kind = p.shape.kind;
  if (kind == BlockKind::pooling) {  // identity 1: mean first, then W_v and W_o of one vector per sample
    modulated_mean({.x = p.x,
                    .shift = part(k.modulation, kShift1),
                    .scale = part(k.modulation, kScale1),
                    .layout = p.layout,
                    .mean = k.pooled,
                    .workspace = ws.mean},
                   exec);
    if (p.prepared.folded_weight)
      return apply({p.prepared.folded_weight, p.prepared.folded_bias}, k.pooled, k.y1, exec);
    apply(w.v, k.pooled, k.v, exec);
    apply(w.proj, k.v, k.y1, exec);
    return;
  }
  if (kind == BlockKind::recovery) {  // identity 2: W_1 before the gather
    apply(w.from_sparse, p.other, ws.u, exec);
    apply(w.from_dense, p.x, k.base, exec);
    gather_sparse({.s = ws.u,
                   .x = k.base,
                   .position = p.position,
                   .layout = p.layout,
                   .sparse_layout = p.other_layout,
                   .out = k.base,
                   .shift = part(k.modulation, kShift1),
                   .scale = part(k.modulation, kScale1),
                   .normed = ws.n},
                  exec);
  } else if (!p.prepared.normed_x) {
    normalize(p.x, p.layout, k.modulation, kShift1, ws.n, exec);
  }
  const Matrix& n = p.prepared.normed_x ? p.prepared.normed_x : ws.n;
  if (is_cross(kind)) {
    const Matrix& n_other = p.prepared.normed_other ? p.prepared.normed_other : ws.n_other;
    if (!p.prepared.normed_other) normalize(p.other, p.other_layout, k.modulation, kShift1, n_other, exec);
    apply(w.q, n, k.q, exec);
    apply(w.kv, n_other, k.kv, exec);
  } else {
    apply(w.qkv, n, k.qkv, exec);
  }
  attention(attention_of(p, k), exec);
  apply(w.proj, k.attended, k.y1, exec);
}

Attention cross_attention_of(const BlockForward& p, const BlockContext& k) {
  const int64_t c = p.shape.hidden;
  const Matrix& kv = p.prepared.caption_kv ? p.prepared.caption_kv : k.cross_kv;
  return {.q = k.cross_q,
          .k = kv.columns(0, c),
          .v = kv.columns(c, c),
          .layout_q = p.layout,
          .layout_k = p.caption_layout,
          .num_heads = p.shape.num_heads,
          .out = k.cross_attended,
          .lse = k.cross_lse};
}

// The first residual, the caption's branch if there is one, and the norm that the MLP begins with.
void forward_residuals(const BlockForward& p, const Roles& w, const BlockContext& k, const BlockWorkspace& ws,
                       const Execution& exec) {
  GatedResidual first{.x = base_of(p, k),
                      .y = k.y1,
                      .gate = part(k.modulation, kGate1),
                      .layout = p.layout,
                      .out = k.x1,
                      .y_per_sample = p.shape.kind == BlockKind::pooling};
  GatedResidual second{.x = k.x1, .y = ws.cross_y, .layout = p.layout, .out = k.x2};
  GatedResidual& last = p.shape.style.caption ? second : first;
  last.shift = part(k.modulation, kShift2), last.scale = part(k.modulation, kScale2);
  last.normed = ws.n, last.eps = p.mlp_norm_eps;
  gated_residual(first, exec);
  if (!p.shape.style.caption) return;
  apply(w.cross_q, k.x1, k.cross_q, exec);
  if (!p.prepared.caption_kv) apply(w.cross_kv, p.caption, k.cross_kv, exec);
  attention(cross_attention_of(p, k), exec);
  apply(w.cross_proj, k.cross_attended, ws.cross_y, exec);
  gated_residual(second, exec);
}

void check_lists(const BlockForward& p) {
  const size_t wanted = block_parameter_count(p.shape.kind, p.shape.style);
  const auto require = [&](bool holds, const auto&... parts) {
    if (!holds) refuse(name_of(p.shape.kind), " block: ", parts...);
  };
  require(p.parameters.size() == wanted, "parameters holds ", p.parameters.size(), " tensors, must hold ", wanted);
  const BlockPrepared& prepared = p.prepared;
  require(prepared.packed.empty() || prepared.packed.size() == wanted, "prepared.packed must be as long as parameters");
  const bool any = prepared.modulation || prepared.folded_weight || prepared.normed_x || prepared.normed_other ||
                   prepared.next.normed || prepared.caption_kv;
  require(!any || !p.context, "prepared is for inference, a context keeps what backward needs");
  require((!p.attention_layout.table && !p.across_frames) || p.shape.kind == BlockKind::dense,
          "attention within or across frames is for dense blocks");
  require(!p.shape.style.caption || p.caption_layout.batch == p.shape.batch,
          "caption_layout must have a caption for each sample");
  require(!prepared.normed_x || p.shape.kind == BlockKind::dense || p.shape.kind == BlockKind::generation,
          "prepared.normed_x is not what this block begins with");
}

// Gradients of a linear layer's weight and bias, and of its input unless grad_x is empty.
void apply_backward(const Layer& layer, const Layer& grad, const Matrix& x, const Matrix& grad_y, const Matrix& grad_x,
                    void* workspace, const Execution& exec, bool accumulate_grad_x = false) {
  linear_backward({.x = x,
                   .weight = layer.weight,
                   .grad_y = grad_y,
                   .grad_x = grad_x,
                   .grad_weight = grad.weight,
                   .grad_bias = grad.bias,
                   .accumulate_grad_x = accumulate_grad_x,
                   .workspace = workspace},
                  exec);
}

void backward_normalize(const Matrix& x, const TokenLayout& layout, const BlockContext& k,
                        const BlockBackwardWorkspace& w, Part shift, const Matrix& grad_y, const Matrix& residual,
                        const Matrix& grad_x, bool accumulate_modulation, const Execution& exec,
                        double eps = kLayerNormEps) {
  modulated_layer_norm_backward({.x = x,
                                 .scale = part(k.modulation, Part(shift + 1)),
                                 .layout = layout,
                                 .grad_y = grad_y,
                                 .grad_residual = residual,
                                 .grad_x = grad_x,
                                 .grad_shift = part(w.grad_modulation, shift),
                                 .grad_scale = part(w.grad_modulation, Part(shift + 1)),
                                 .accumulate_modulation = accumulate_modulation,
                                 .eps = eps,
                                 .workspace = w.statistics},
                                exec);
}

// From grad_out to the gradient of x2, which is left in grad_x.
void backward_mlp(const BlockBackward& p, const Roles& w, const Roles& grad, const BlockContext& k,
                  const BlockBackwardWorkspace& ws, const Execution& exec) {
  gated_residual_backward({.y = k.y2,
                           .gate = part(k.modulation, kGate2),
                           .layout = p.layout,
                           .grad_out = p.grad_out,
                           .grad_y = ws.grad_y,
                           .grad_gate = part(ws.grad_modulation, kGate2)},
                          exec);
  gelu({.x = k.h, .y = ws.act}, exec);
  linear_backward({.x = ws.act,
                   .weight = w.fc2.weight,
                   .grad_y = ws.grad_y,
                   .grad_x = ws.grad_h,
                   .grad_weight = grad.fc2.weight,
                   .grad_bias = grad.fc2.bias,
                   .gelu_input = k.h,
                   .workspace = ws.linear},
                  exec);
  normalize(k.x2, p.layout, k.modulation, kShift2, ws.n, exec, p.mlp_norm_eps);
  apply_backward(w.fc1, grad.fc1, ws.n, ws.grad_h, ws.grad_n, ws.linear, exec);
  backward_normalize(k.x2, p.layout, k, ws, kShift2, ws.grad_n, p.grad_out, p.grad_x, false, exec, p.mlp_norm_eps);
}

// grad_x holds the gradient of x2 and becomes that of x1; also writes grad_caption.
void backward_caption(const BlockBackward& p, const Roles& w, const Roles& grad, const BlockContext& k,
                      const BlockBackwardWorkspace& ws, const Execution& exec) {
  const int64_t c = p.shape.hidden;
  apply_backward(w.cross_proj, grad.cross_proj, k.cross_attended, p.grad_x, ws.grad_n, ws.linear, exec);
  AttentionBackward a;
  static_cast<Attention&>(a) = cross_attention_of(p, k);
  a.grad_out = ws.grad_n;
  a.grad_q = ws.grad_y, a.grad_k = ws.grad_cross_kv.columns(0, c), a.grad_v = ws.grad_cross_kv.columns(c, c);
  attention_backward(a, exec);
  apply_backward(w.cross_q, grad.cross_q, k.x1, ws.grad_y, p.grad_x, ws.linear, exec, true);
  apply_backward(w.cross_kv, grad.cross_kv, p.caption, ws.grad_cross_kv, p.grad_caption, ws.linear, exec,
                 p.accumulate_caption);
}

// grad_x holds the gradient of x1 and becomes that of x.
void backward_pooling(const BlockBackward& p, const Roles& w, const Roles& grad, const BlockContext& k,
                      const BlockBackwardWorkspace& ws, const Execution& exec) {
  const Matrix grad_y1 = ws.grad_silu;  // [B, C], free until the modulation's turn
  gated_residual_backward({.y = k.y1,
                           .gate = part(k.modulation, kGate1),
                           .layout = p.layout,
                           .grad_out = p.grad_x,
                           .grad_y = grad_y1,
                           .grad_gate = part(ws.grad_modulation, kGate1),
                           .y_per_sample = true},
                          exec);
  apply_backward(w.proj, grad.proj, k.v, grad_y1, ws.grad_v, ws.linear, exec);
  apply_backward(w.v, grad.v, k.pooled, ws.grad_v, ws.grad_pooled, ws.linear, exec);
  modulated_mean_backward({.x = p.x,
                           .scale = part(k.modulation, kScale1),
                           .layout = p.layout,
                           .grad_mean = ws.grad_pooled,
                           .grad_residual = p.grad_x,
                           .grad_x = p.grad_x,
                           .grad_shift = part(ws.grad_modulation, kShift1),
                           .grad_scale = part(ws.grad_modulation, kScale1),
                           .workspace = ws.statistics},
                          exec);
}

// As backward_pooling, for the blocks with attention; also writes grad_other.
void backward_attention(const BlockBackward& p, const Roles& w, const Roles& grad, const BlockContext& k,
                        const BlockBackwardWorkspace& ws, const Execution& exec) {
  const int64_t c = p.shape.hidden;
  const bool cross = is_cross(p.shape.kind);
  gated_residual_backward({.y = k.y1,
                           .gate = part(k.modulation, kGate1),
                           .layout = p.layout,
                           .grad_out = p.grad_x,
                           .grad_y = ws.grad_y,
                           .grad_gate = part(ws.grad_modulation, kGate1)},
                          exec);
  const Matrix grad_attended = ws.grad_n;
  apply_backward(w.proj, grad.proj, k.attended, ws.grad_y, grad_attended, ws.linear, exec);
  AttentionBackward a;
  static_cast<Attention&>(a) = attention_of(p, k);
  a.grad_out = grad_attended;
  a.grad_q = cross ? ws.grad_q : ws.grad_qkv.columns(0, c);
  a.grad_k = cross ? ws.grad_kv.columns(0, c) : ws.grad_qkv.columns(c, c);
  a.grad_v = cross ? ws.grad_kv.columns(c, c) : ws.grad_qkv.columns(2 * c, c);
  attention_backward(a, exec);
  const Matrix base = base_of(p, k);
  normalize(base, p.layout, k.modulation, kShift1, ws.n, exec);
  if (cross)
    apply_backward(w.q, grad.q, ws.n, ws.grad_q, ws.grad_n, ws.linear, exec);
  else
    apply_backward(w.qkv, grad.qkv, ws.n, ws.grad_qkv, ws.grad_n, ws.linear, exec);
  const Matrix grad_base = p.shape.kind == BlockKind::recovery ? ws.grad_base : p.grad_x;
  backward_normalize(base, p.layout, k, ws, kShift1, ws.grad_n, p.grad_x, grad_base, false, exec);
  if (!cross) return;
  normalize(p.other, p.other_layout, k.modulation, kShift1, ws.n_other, exec);
  apply_backward(w.kv, grad.kv, ws.n_other, ws.grad_kv, ws.grad_n_other, ws.linear, exec);
  backward_normalize(p.other, p.other_layout, k, ws, kShift1, ws.grad_n_other,
                     p.accumulate_other ? p.grad_other : Matrix{}, p.grad_other, true, exec);
  if (p.shape.kind != BlockKind::recovery) return;
  const Matrix grad_u = ws.n_other;  // free again
  gather_sparse_backward({.layout = p.layout, .sparse_layout = p.other_layout, .grad_out = grad_base, .grad_s = grad_u},
                         exec);
  apply_backward(w.from_sparse, grad.from_sparse, p.other, grad_u, p.grad_other, ws.linear, exec, true);
  apply_backward(w.from_dense, grad.from_dense, p.x, grad_base, p.grad_x, ws.linear, exec);
}

}  // namespace

void block_forward(const BlockForward& p, const Execution& exec) {
  check_lists(p);
  const Roles w(p.shape, p.parameters, p.prepared.packed);
  Arena context_arena(p.context), arena(p.workspace);
  const bool keeps_context = p.context != nullptr;
  BlockContext k = keeps_context ? plan_context(p.shape, context_arena) : plan_inference(p.shape, p.out, arena);
  const BlockWorkspace ws = plan_workspace(p.shape, keeps_context, arena);

  if (p.prepared.modulation) {
    k.modulation = p.prepared.modulation;
  } else if (p.shape.style.shared_modulation) {
    k.modulation = p.condition;
  } else {
    silu({.x = p.condition, .y = ws.silu}, exec);
    apply(w.modulation, ws.silu, k.modulation, exec);
  }
  forward_attention(p, w, k, ws, exec);
  discard(ws.n), discard(k.h);
  forward_residuals(p, w, k, ws, exec);
  discard(k.y2);
  if (keeps_context) {
    linear({.x = ws.n,
            .weight = w.fc1.weight,
            .bias = w.fc1.bias,
            .y = ws.act,
            .activation = Activation::gelu_tanh,
            .pre_activation = k.h},
           exec);
    apply(w.fc2, ws.act, k.y2, exec);
  } else {
    apply(w.fc1, ws.n, k.h, exec, Activation::gelu_tanh);
    apply(w.fc2, k.h, k.y2, exec);
  }
  discard(p.prepared.next.normed);
  gated_residual({.x = k.x2,
                  .y = k.y2,
                  .gate = part(k.modulation, kGate2),
                  .layout = p.layout,
                  .out = p.out,
                  .shift = p.prepared.next.shift,
                  .scale = p.prepared.next.scale,
                  .normed = p.prepared.next.normed},
                 exec);
}

void block_backward(const BlockBackward& p, const Execution& exec) {
  check_lists(p);
  if (p.grad_parameters.size() != p.parameters.size())
    throw ArgumentError("block: grad_parameters must hold as many tensors as parameters");
  const Roles w(p.shape, p.parameters), grad(p.shape, p.grad_parameters);
  Arena context_arena(p.context, false), arena(p.workspace);
  BlockContext k = plan_context(p.shape, context_arena);
  BlockBackwardWorkspace ws = plan_backward(p.shape, arena);
  const bool shared = p.shape.style.shared_modulation;
  if (shared && p.accumulate_condition) throw ArgumentError("block: accumulate_condition with a shared modulation");
  if (shared) k.modulation = p.condition, ws.grad_modulation = p.grad_condition;

  backward_mlp(p, w, grad, k, ws, exec);
  if (p.shape.style.caption) backward_caption(p, w, grad, k, ws, exec);
  if (p.shape.kind == BlockKind::pooling)
    backward_pooling(p, w, grad, k, ws, exec);
  else
    backward_attention(p, w, grad, k, ws, exec);

  if (shared) return;
  silu({.x = p.condition, .y = ws.silu}, exec);
  apply_backward(w.modulation, grad.modulation, ws.silu, ws.grad_modulation, ws.grad_silu, ws.linear, exec);
  silu_backward(
      {.x = p.condition, .grad_y = ws.grad_silu, .grad_x = p.grad_condition, .accumulate = p.accumulate_condition},
      exec);
}

}  // namespace flexdit
