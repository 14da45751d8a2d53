// The parameters of a block and the sizes of its buffers.
#include "model/block_plans.h"

#include <algorithm>

namespace flexdit {

BlockContext plan_context(const BlockShape& s, Arena& arena) {
  const int64_t c = s.hidden;
  const auto rows = [&](int64_t cols) { return arena.matrix(s.rows, cols, s.dtype); };
  const auto samples = [&](int64_t cols) { return arena.matrix(s.batch, cols, s.dtype); };
  BlockContext k;
  if (!s.style.shared_modulation) k.modulation = samples(6 * c);
  if (s.kind == BlockKind::pooling) k.pooled = samples(c), k.v = samples(c), k.y1 = samples(c);
  if (s.kind == BlockKind::recovery) k.base = rows(c);
  if (s.kind == BlockKind::dense) k.qkv = rows(3 * c);
  if (is_cross(s.kind)) k.q = rows(c), k.kv = arena.matrix(s.other_rows, 2 * c, s.dtype);
  if (s.kind != BlockKind::pooling) {
    k.attended = rows(c);
    k.lse = arena.matrix(s.rows, s.num_heads, accumulation_type(s.dtype));
    k.y1 = rows(c);
  }
  k.x1 = k.x2 = rows(c);
  if (s.style.caption) {
    k.cross_q = rows(c), k.cross_kv = arena.matrix(s.caption_rows, 2 * c, s.dtype), k.cross_attended = rows(c);
    k.cross_lse = arena.matrix(s.rows, s.num_heads, accumulation_type(s.dtype));
    k.x2 = rows(c);
  }
  k.h = rows(s.mlp_hidden);
  k.y2 = rows(c);
  return k;
}

BlockContext plan_inference(const BlockShape& s, const Matrix& out, Arena& arena) {
  const int64_t c = s.hidden;
  BlockContext k;
  if (!s.style.shared_modulation) k.modulation = arena.matrix(s.batch, 6 * c, s.dtype);
  k.x1 = k.x2 = out;
  k.h = arena.matrix(s.rows, s.mlp_hidden, s.dtype);
  if (s.style.caption) {
    k.cross_q = arena.matrix(s.rows, c, s.dtype), k.cross_attended = arena.matrix(s.rows, c, s.dtype);
    k.cross_kv = arena.matrix(s.caption_rows, 2 * c, s.dtype);
  }
  if (s.kind == BlockKind::pooling) {
    k.pooled = arena.matrix(s.batch, c, s.dtype);
    k.v = arena.matrix(s.batch, c, s.dtype);
    k.y1 = arena.matrix(s.batch, c, s.dtype);
    k.y2 = arena.matrix(s.rows, c, s.dtype);
    return k;
  }
  if (s.kind == BlockKind::recovery) k.base = out;
  if (s.kind == BlockKind::dense) {  // queries, keys and values are dead before h is written
    const bool fits = s.mlp_hidden >= 3 * c;
    k.qkv = fits ? Matrix{k.h.data, s.rows, 3 * c, 3 * c, s.dtype} : arena.matrix(s.rows, 3 * c, s.dtype);
  }
  if (is_cross(s.kind)) k.q = arena.matrix(s.rows, c, s.dtype), k.kv = arena.matrix(s.other_rows, 2 * c, s.dtype);
  k.attended = arena.matrix(s.rows, c, s.dtype);
  k.y1 = arena.matrix(s.rows, c, s.dtype);
  k.y2 = k.y1;
  return k;
}

BlockWorkspace plan_workspace(const BlockShape& s, bool keeps_context, Arena& arena) {
  BlockWorkspace w;
  w.silu = arena.matrix(s.batch, s.hidden, s.dtype);
  w.n = arena.matrix(s.rows, s.hidden, s.dtype);
  if (is_cross(s.kind)) w.n_other = arena.matrix(s.other_rows, s.hidden, s.dtype);
  if (s.kind == BlockKind::recovery) w.u = arena.matrix(s.other_rows, s.hidden, s.dtype);
  if (keeps_context) w.act = arena.matrix(s.rows, s.mlp_hidden, s.dtype);
  if (s.style.caption) w.cross_y = arena.matrix(s.rows, s.hidden, s.dtype);
  if (s.kind == BlockKind::pooling) w.mean = arena.bytes(modulated_mean_workspace(s.dtype, s.batch, s.rows, s.hidden));
  return w;
}

BlockBackwardWorkspace plan_backward(const BlockShape& s, Arena& arena) {
  const int64_t c = s.hidden;
  const auto rows = [&](int64_t cols) { return arena.matrix(s.rows, cols, s.dtype); };
  const auto other_rows = [&](int64_t cols) { return arena.matrix(s.other_rows, cols, s.dtype); };
  const auto samples = [&](int64_t cols) { return arena.matrix(s.batch, cols, s.dtype); };
  BlockBackwardWorkspace w;
  w.silu = samples(c), w.grad_silu = samples(c);
  if (!s.style.shared_modulation) w.grad_modulation = samples(6 * c);
  w.grad_y = rows(c), w.n = rows(c), w.grad_n = rows(c);
  w.act = rows(s.mlp_hidden), w.grad_h = rows(s.mlp_hidden);
  if (s.kind == BlockKind::pooling) w.grad_pooled = samples(c), w.grad_v = samples(c);
  if (s.kind == BlockKind::dense) w.grad_qkv = rows(3 * c);
  if (is_cross(s.kind)) {
    w.grad_q = rows(c), w.grad_kv = other_rows(2 * c);
    w.n_other = other_rows(c), w.grad_n_other = other_rows(c);
  }
  if (s.kind == BlockKind::recovery) w.grad_base = rows(c);
  if (s.style.caption) w.grad_cross_kv = arena.matrix(s.caption_rows, 2 * c, s.dtype);
  int64_t statistics = row_statistics_workspace(s.dtype, std::max(s.rows, s.other_rows));
  if (s.kind == BlockKind::pooling)
    statistics = std::max(statistics, modulated_mean_workspace(s.dtype, s.batch, s.rows, s.hidden));
  w.statistics = arena.bytes(statistics);
  int64_t linear_bytes = 0;
  for_layers(s.kind, s.hidden, s.mlp_hidden, s.style, [&](const char*, int64_t out, int64_t in) {
    linear_bytes = std::max(linear_bytes, linear_backward_workspace(s.dtype, out, in));
  });
  w.linear = arena.bytes(linear_bytes);
  return w;
}

const char* name_of(BlockKind kind) {
  switch (kind) {
    case BlockKind::pooling:
      return "pooling";
    case BlockKind::dense:
      return "dense";
    case BlockKind::generation:
      return "generation";
    case BlockKind::recovery:
      return "recovery";
  }
  return "unknown";
}

std::vector<ParameterSpec> block_parameters(BlockKind kind, int64_t hidden, int64_t mlp_hidden, BlockStyle style) {
  std::vector<ParameterSpec> specs;
  for_layers(kind, hidden, mlp_hidden, style, [&](const std::string& layer, int64_t out, int64_t in) {
    specs.push_back({layer + ".weight", out, in});
    specs.push_back({layer + ".bias", 1, out});
  });
  return specs;
}

int64_t block_context_bytes(const BlockShape& shape) {
  Arena arena;
  plan_context(shape, arena);
  return arena.used();
}

int64_t block_workspace_bytes(const BlockShape& shape, bool keeps_context) {
  Arena arena;
  if (!keeps_context) plan_inference(shape, {}, arena);
  plan_workspace(shape, keeps_context, arena);
  return arena.used();
}

int64_t block_backward_workspace_bytes(const BlockShape& shape) {
  Arena arena;
  plan_backward(shape, arena);
  return arena.used();
}

}  // namespace flexdit
