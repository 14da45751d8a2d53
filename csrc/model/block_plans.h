// What a block keeps in its buffers: views carved out of the caller's context and workspace.
#pragma once

#include "flexdit/block.h"
#include "model/arena.h"

namespace flexdit {

constexpr bool is_cross(BlockKind kind) { return kind == BlockKind::generation || kind == BlockKind::recovery; }

// Calls add(name, outputs, inputs) for each linear layer of a block: its weight, then its bias are the parameters.
template <class Add>
constexpr void for_layers(BlockKind kind, int64_t hidden, int64_t mlp_hidden, BlockStyle style, Add&& add) {
  if (!style.shared_modulation) add("modulation", 6 * hidden, hidden);
  if (kind == BlockKind::recovery) add("from_sparse", hidden, hidden), add("from_dense", hidden, hidden);
  if (kind == BlockKind::pooling) add("attn.v", hidden, hidden);
  if (kind == BlockKind::dense) add("attn.qkv", 3 * hidden, hidden);
  if (is_cross(kind)) add("attn.q", hidden, hidden), add("attn.kv", 2 * hidden, hidden);
  add("attn.proj", hidden, hidden);
  if (style.caption)
    add("cross.q", hidden, hidden), add("cross.kv", 2 * hidden, hidden), add("cross.proj", hidden, hidden);
  add("mlp.fc1", mlp_hidden, hidden);
  add("mlp.fc2", hidden, mlp_hidden);
}
constexpr size_t block_parameter_count(BlockKind kind, BlockStyle style = {}) {
  size_t count = 0;
  for_layers(kind, 1, 1, style, [&](const char*, int64_t, int64_t) { count += 2; });
  return count;
}

// What forward writes and backward reads.
struct BlockContext {
  Matrix modulation;  // [B, 6C]
  Matrix pooled;      // pooling: [B, C], mean of the modulated tokens
  Matrix v;           // pooling: [B, C], W_v of it
  Matrix base;        // recovery: [R, C], m
  Matrix qkv;         // dense: [R, 3C]
  Matrix q, kv;       // generation, recovery: [R, C], [Ro, 2C]
  Matrix attended;    // [R, C], before the projection
  Matrix lse;         // [R, heads]
  Matrix y1;          // [R, C], pooling [B, C]: the first branch
  Matrix x1;          // [R, C], after the first residual
  Matrix cross_q, cross_kv, cross_attended, cross_lse;  // caption: [R, C], [Rc, 2C], [R, C], [R, heads]
  Matrix x2;          // [R, C], what the MLP's branch adds to: after the caption, or x1
  Matrix h;           // [R, 4C], before GELU
  Matrix y2;          // [R, C], the second branch
};

BlockContext plan_context(const BlockShape& s, Arena& arena);
// Without a backward to come, the same fields share memory wherever one is dead before the next is written.
BlockContext plan_inference(const BlockShape& s, const Matrix& out, Arena& arena);

struct BlockWorkspace {
  Matrix silu;           // [B, C]
  Matrix n;              // [R, C]
  Matrix n_other;        // [Ro, C]
  Matrix u;              // recovery: [Ro, C], W_1 of the sparse tokens
  Matrix act;            // with a context: [R, 4C], GELU of it, which backward computes again
  Matrix cross_y;        // caption: [R, C]
  void* mean = nullptr;  // pooling: of modulated_mean
};

BlockWorkspace plan_workspace(const BlockShape& s, bool keeps_context, Arena& arena);

struct BlockBackwardWorkspace {
  Matrix silu, grad_silu;            // [B, C]
  Matrix grad_modulation;            // [B, 6C]
  Matrix grad_y;                     // [R, C]
  Matrix n;                          // [R, C]: a modulated layer norm again
  Matrix grad_n;                     // [R, C]
  Matrix act, grad_h;                // [R, 4C]
  Matrix grad_qkv, grad_q, grad_kv;  // as in the context
  Matrix n_other, grad_n_other;      // [Ro, C]
  Matrix grad_base;                  // recovery: [R, C]
  Matrix grad_pooled, grad_v;        // pooling: [B, C]
  Matrix grad_cross_kv;              // caption: [Rc, 2C]
  void* statistics;                  // of norms, or of modulated_mean
  void* linear;
};

BlockBackwardWorkspace plan_backward(const BlockShape& s, Arena& arena);

}  // namespace flexdit
