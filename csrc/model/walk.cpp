#include "model/walk.h"

#include <algorithm>

#include "model/block_plans.h"

namespace flexdit {

Walk::Walk(const ModelForward& p, bool keeps_context, const Execution* exec)
    : places(parameter_places(p.config)),
      p_(p),
      c_(p.config),
      exec_(exec),
      keeps_(keeps_context),
      kept_(p.context, exec != nullptr),
      scratch_(p.workspace),
      kinds_(model_blocks(p.config)),
      layout_(p.layout) {
  if (!layout_.table) layout_ = own_layout_.emplace(p.batch, c_.dense_grid()).view();
  rows_ = p.rows ? p.rows : layout_.total();
  sparse_rows_ = p.sparse_rows || !p.sparse_layout.table ? p.sparse_rows : p.sparse_layout.total();
  if (!keeps_) {
    for (int i = 0; i < 2; ++i) {
      buffers_[0][i] = scratch_.matrix(rows_, c_.hidden, p.dtype);
      buffers_[1][i] = scratch_.matrix(sparse_rows_, c_.hidden, p.dtype);
    }
    if (fuses_norms())
      for (int sparse = 0; sparse < 2; ++sparse)
        normed_[sparse] = scratch_.matrix(sparse ? sparse_rows_ : rows_, c_.hidden, p.dtype);
  }
  patches = store().matrix(rows_, c_.in_channels * c_.patch_size * c_.patch_size, p.dtype);
  features = store().matrix(p.batch, c_.timestep_features, p.dtype);
  condition = store().matrix(p.batch, c_.hidden, p.dtype);
  final_rows = scratch_.matrix(rows_, c_.out_channels * c_.patch_size * c_.patch_size, p.dtype);

  embed();
  for (int64_t i = 0; i < c_.num_pooling_blocks; ++i) add_time(), tokens = block(BlockKind::pooling, false, tokens);
  for (int64_t i = 0; i < c_.num_sdtm; ++i) add_time(), module();
  for (int64_t i = 0; i < c_.num_dense_blocks; ++i) add_time(), tokens = block(BlockKind::dense, false, tokens);
  final_parameter = next_parameter_;
  finish();
}

void Walk::add_time() {
  if (exec_ && time_place(c_) == calls.size())
    add_position({.x = tokens, .position = p_.times, .layout = layout_}, *exec_);
}

// A place for tokens: kept for backward, or the one of two buffers that does not hold `busy`.
Matrix Walk::place(bool sparse, const Matrix& busy) {
  if (keeps_) return kept_.matrix(sparse ? sparse_rows_ : rows_, c_.hidden, p_.dtype);
  const Matrix& other = buffers_[sparse][busy.data == buffers_[sparse][0].data ? 1 : 0];
  if (exec_) discard(other);
  return other;
}

void* Walk::temporary(int64_t bytes) {
  temporary_bytes_ = std::max(temporary_bytes_, bytes);
  return p_.workspace ? static_cast<char*>(p_.workspace) + scratch_.used() : nullptr;
}

PositionTable Walk::positions() const {
  return p_.positions ? p_.positions : PositionTable(p_.parameters[*places.position]);
}

// Of a block, or of the final layer behind the last.
Matrix Walk::modulation_of(size_t block) const {
  const auto first = static_cast<int64_t>(block) * 6 * c_.hidden;
  return p_.prepared.modulation.columns(first, (block < kinds_.size() ? 6 : 2) * c_.hidden);
}

// The norm that the reader of this block's tokens begins with. A pooling block has none, since it averages, nor has a
// recovery block behind another one, since W_2 comes before its norm, nor has what the temporal embedding is added to.
NextNorm Walk::next_norm(size_t block, bool sparse) const {
  const size_t next = block + 1;
  const bool last = next == kinds_.size();
  if (time_place(c_) == next) return {};
  if (!last && kinds_[next] == BlockKind::pooling) return {};
  if (!last && kinds_[next] == BlockKind::recovery && !sparse) return {};
  const Matrix modulation = modulation_of(next);
  return {modulation.columns(0, c_.hidden), modulation.columns(c_.hidden, c_.hidden), normed_[sparse]};
}

BlockPrepared Walk::prepared_for(const BlockCall& call) const {
  const ModelPrepared& all = p_.prepared;
  BlockPrepared out;
  if (!all.packed.empty()) out.packed = all.packed.subspan(call.first_parameter, call.num_parameters);
  const BlockKind kind = call.shape.kind;
  if (kind == BlockKind::pooling && !all.folded.empty())
    out.folded_weight = all.folded[2 * call.index], out.folded_bias = all.folded[2 * call.index + 1];
  if (!fuses_norms()) return out;
  out.modulation = modulation_of(call.index);
  out.next = next_norm(call.index, call.sparse);
  if (call.shape.style.caption) out.caption_kv = all.caption_kv[cross_index(c_, call.index)];
  // What the block before, or the pooling before a generation block, has left; the model's first block has none.
  const bool follows = call.index > 0 && time_place(c_) != call.index;
  const bool repeats = follows && kinds_[call.index - 1] == kind;
  if (kind == BlockKind::generation || (kind == BlockKind::dense && follows)) out.normed_x = normed_[call.sparse];
  if (kind == BlockKind::generation && follows && !repeats) out.normed_other = normed_[0];
  if (kind == BlockKind::recovery && !repeats) out.normed_other = normed_[1];
  return out;
}

void Walk::module() {
  Module m;
  m.dense = tokens;
  m.pooled = place(true, {});
  m.first = calls.size();
  if (exec_) {
    PoolTokens pool{.x = tokens,
                    .position = reinjected(),
                    .layout = layout_,
                    .sparse_layout = p_.sparse_layout,
                    .out = m.pooled};
    if (fuses_norms()) {  // the first generation block's queries
      const Matrix modulation = modulation_of(m.first);
      pool.shift = modulation.columns(0, c_.hidden), pool.scale = modulation.columns(c_.hidden, c_.hidden);
      pool.normed = normed_[1];
    }
    pool_tokens(pool, *exec_);
  }
  Matrix s = m.pooled;
  for (int64_t j = 0; j < c_.generation_blocks; ++j) s = block(BlockKind::generation, true, s, m.dense);
  for (int64_t j = 0; j < c_.sparse_blocks; ++j) s = block(BlockKind::dense, true, s);
  m.recovery = calls.size();
  for (int64_t j = 0; j < c_.recovery_blocks; ++j) tokens = block(BlockKind::recovery, false, tokens, s);
  m.end = calls.size();
  modules.push_back(m);
  for (int64_t j = 0; j < c_.dense_blocks; ++j) tokens = block(BlockKind::dense, false, tokens);
}

Matrix Walk::block(BlockKind kind, bool sparse, const Matrix& x, const Matrix& other) {
  BlockCall call{.shape = {.kind = kind,
                           .hidden = c_.hidden,
                           .mlp_hidden = c_.mlp_hidden,
                           .num_heads = c_.num_heads,
                           .batch = p_.batch,
                           .rows = x.rows,
                           .other_rows = other.rows,
                           .dtype = p_.dtype,
                           .style = style_of(c_, calls.size())},
                 .index = calls.size(),
                 .first_parameter = next_parameter_ + shares_modulation(c_),  // its table is in the modulation
                 .num_parameters = block_parameter_count(kind, style_of(c_, calls.size())),
                 .sparse = sparse,
                 .x = x,
                 .other = other,
                 .out = place(sparse, x),
                 .context = nullptr};
  next_parameter_ = call.first_parameter + call.num_parameters;
  if (keeps_) call.context = kept_.bytes(block_context_bytes(call.shape));
  void* workspace = temporary(block_workspace_bytes(call.shape, keeps_));
  if (exec_) block_forward(forward_of(call, workspace), *exec_);
  calls.push_back(call);
  return call.out;
}

void Walk::embed() {
  tokens = place(false, {});
  void* workspace = temporary(condition_workspace_bytes(p_.batch, c_.hidden, c_.timestep_features, p_.dtype));
  if (!exec_) return;
  if (!fuses_norms()) {
    if (!p_.timestep_features) timestep_embedding({.t = p_.t, .out = features, .shift = c_.timestep_shift}, *exec_);
    condition_forward({.parameters = parameters(places.timestep, 5),
                       .features = p_.timestep_features ? p_.timestep_features : features,
                       .labels = p_.labels,
                       .out = condition,
                       .workspace = workspace},
                      *exec_);
  }
  patch_embed_forward({.parameters = parameters(places.patch_embed, 2),
                       .image = image(const_cast<void*>(p_.x)),
                       .position = positions(),
                       .layout = layout_,
                       .out = tokens},
                      *exec_);
}

void Walk::finish() {
  void* workspace = temporary(final_layer_workspace_bytes(p_.batch, rows_, c_.hidden, final_rows.cols, p_.dtype));
  if (!exec_) return;
  const bool prepared = fuses_norms();
  // A shared modulation has no layer here, but a table, which is in the modulation.
  const auto own = shares_modulation(c_) ? parameters(final_parameter + 1, 2) : parameters(final_parameter, 4);
  const Matrix shared[] = {{}, {}, own[0], own[1]};
  final_layer_forward({.parameters = shares_modulation(c_) ? std::span<const Matrix>(shared) : own,
                       .layout = layout_,
                       .x = tokens,
                       .condition = condition,
                       .out = final_rows,
                       .workspace = workspace,
                       .modulation = prepared ? modulation_of(kinds_.size()) : Matrix{},
                       .normed = prepared && !kinds_.empty() ? normed_[0] : Matrix{}},
                      *exec_);
  unpatchify(final_image(p_.out), *exec_);
}

Patches Walk::image(void* data) const {
  return {.image = data, .rows = patches, .layout = layout_, .channels = c_.in_channels, .patch = c_.patch_size};
}

Patches Walk::final_image(void* data) const {
  return {.image = data,
          .rows = final_rows,
          .layout = layout_,
          .channels = c_.out_channels,
          .patch = c_.patch_size,
          .channels_last = true};
}

BlockForward Walk::forward_of(const BlockCall& call, void* workspace) const {
  const bool recovery = call.shape.kind == BlockKind::recovery, dense = call.shape.kind == BlockKind::dense;
  const bool within = dense && within_frames(c_, call.index), across = dense && across_frames(c_, call.index);
  return {.shape = call.shape,
          .parameters = parameters(call.first_parameter, call.num_parameters),
          .layout = call.sparse ? p_.sparse_layout : layout_,
          .other_layout = recovery ? p_.sparse_layout : layout_,
          .x = call.x,
          .other = call.other,
          .condition = condition,
          .position = recovery ? reinjected() : PositionTable{},
          .out = call.out,
          .context = call.context,
          .workspace = workspace,
          .prepared = keeps_ ? BlockPrepared{} : prepared_for(call),
          .mlp_norm_eps = c_.mlp_norm_eps,
          .attention_layout = within ? (call.sparse ? p_.sparse_frames : p_.frames) : TokenLayout{},
          .across_frames = across,
          .max_positions = across ? (call.sparse ? p_.max_sparse_positions : p_.max_positions) : 0,
          .caption_layout = call.shape.style.caption ? p_.prepared.caption_layout : TokenLayout{}};
}

}  // namespace flexdit
