// Every operation but those of sampling.cpp: check the views, then switch to the device.
#include "flexdit/ops.h"

#include <algorithm>

#include "ops/checker.h"

namespace flexdit {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::float64:
      return "float64";
  }
  return "unknown";
}

namespace {

void check_norm_fields(Checker& check, const Matrix& shift, const Matrix& scale, const Matrix& normed, int64_t batch,
                       int64_t rows, int64_t cols) {
  if (!shift && !scale && !normed) return;
  check.matrix("shift", shift, batch, cols);
  check.matrix("scale", scale, batch, cols);
  check.tokens("normed", normed, rows, cols, Access::write);
}

void check_exchange(Checker& check, const TokenLayout& dense, const TokenLayout& sparse,
                    const PositionTable& position) {
  check.layout("layout", dense, dense.batch);
  check.layout("sparse_layout", sparse, dense.batch);
  if (position.offset) check.array("position.offset", position.offset, dense.batch);
  for (int64_t b = 0; check.on_cpu() && b < dense.batch; ++b) {
    const Grid &g = dense.grid(b), &s = sparse.grid(b);
    check.holds(s.frames <= g.frames && s.height <= g.height && s.width <= g.width, "sparse grid of sample ", b,
                " is larger than its dense grid");
    if (!position) continue;
    const int64_t rows = position.rows.rows, first = position.first(b);
    const bool fits = position.offset ? first >= 0 && first + g.tokens() <= rows : g.tokens() == rows;
    check.holds(fits, "position has ", rows, " rows, sample ", b, " has ", g.tokens(), " tokens from row ", first,
                " on");
  }
}

// Linear layers are oneDNN's, but for float64, which it does not have. What must be kept before GELU, or taken through
// its derivative, is a pass of its own.
void linear_on_cpu(const Linear& p, int threads) {
  Linear product = p;
  if (p.pre_activation) product.y = p.pre_activation, product.activation = Activation::none;
  (p.x.dtype == DType::float64 ? cpu::kernels().linear_float64 : cpu::linear)(product, threads);
  if (p.pre_activation) cpu::kernels().gelu({.x = p.pre_activation, .y = p.y}, threads);
}
void linear_backward_on_cpu(const LinearBackward& p, int threads) {
  (p.x.dtype == DType::float64 ? cpu::kernels().linear_float64_backward : cpu::linear_backward)(p, threads);
  if (p.gelu_input)
    cpu::kernels().gelu_backward({.x = p.gelu_input, .grad_y = p.grad_x, .y = {}, .grad_x = p.grad_x}, threads);
}

void select_tokens_on_cpu(const SelectTokens& p, int) {
  std::vector<Grid> grids(static_cast<size_t>(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) grids[static_cast<size_t>(b)] = p.schedule->grid(p.t[b]);
  fill_layout(grids, p.table);
  if (!p.row_map) return;
  const TokenLayout layout{p.table, p.batch};
  if (p.rows < layout.total())
    refuse("select_tokens: rows is ", p.rows, ", must be at least the ", layout.total(), " tokens of the layout");
  fill_row_map(layout, {p.row_map, static_cast<size_t>(p.rows)});
}

}  // namespace

int64_t linear_backward_workspace(DType dtype, int64_t n, int64_t k) {
  return dtype == DType::bfloat16 || dtype == DType::float16 ? n * k * size_of(DType::float32) : 0;
}

int64_t row_statistics_workspace(DType dtype, int64_t rows) { return 2 * rows * size_of(accumulation_type(dtype)); }

int64_t modulated_mean_workspace(DType dtype, int64_t batch, int64_t rows, int64_t cols) {
  return std::max(row_statistics_workspace(dtype, rows),
                  cuda::mean_parts(batch, rows) * cols * size_of(DType::float32));
}

void linear(const Linear& p, const Execution& exec) {
  Checker check("linear", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols);
  Matrix weight = p.weight;
  if (p.packed) weight.data = p.x.data;  // its own is not read, and may be gone
  check.matrix("weight", weight, p.weight.rows, p.x.cols, p.packed ? Access::none : Access::read);
  check.optional("bias", p.bias, 1, p.weight.rows);
  check.matrix("y", p.y, p.x.rows, p.weight.rows, Access::write);
  check.holds(p.weight.rows >= 1 && p.weight.cols >= 1, "weight is ", Shape{p.weight.rows, p.weight.cols},
              ", must have at least one row and one column");
  check.optional("pre_activation", p.pre_activation, p.x.rows, p.weight.rows, Access::write);
  check.holds(!p.pre_activation || p.activation != Activation::none,
              "pre_activation needs an activation: without one it is y");
  FLEXDIT_RUN(linear_on_cpu, cuda::linear);
}

PackedWeightPointer pack_weight(const Matrix& weight, const Execution& exec) {
  Checker check("pack_weight", exec);
  check.matrix("weight", weight, weight.rows, weight.cols);
  if (!check.on_cpu() || weight.dtype == DType::float64 || weight.rows == 0 || weight.cols == 0) return nullptr;
  return cpu::pack_weight(weight, threads_of(exec));
}

void linear_backward(const LinearBackward& p, const Execution& exec) {
  Checker check("linear_backward", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols, p.grad_weight ? Access::read : Access::none);
  check.matrix("weight", p.weight, p.weight.rows, p.x.cols, p.grad_x ? Access::read : Access::none);
  check.matrix("grad_y", p.grad_y, p.x.rows, p.weight.rows);
  check.optional("grad_x", p.grad_x, p.x.rows, p.x.cols, written(p.accumulate_grad_x));
  check.optional("grad_weight", p.grad_weight, p.weight.rows, p.x.cols, Access::write);
  check.optional("grad_bias", p.grad_bias, 1, p.weight.rows, Access::write);
  check.holds(p.weight.rows >= 1 && p.weight.cols >= 1, "weight is ", Shape{p.weight.rows, p.weight.cols},
              ", must have at least one row and one column");
  check.optional("gelu_input", p.gelu_input, p.x.rows, p.x.cols);
  check.holds(!p.gelu_input || p.grad_x, "gelu_input needs grad_x");
  check.holds(!p.gelu_input || !p.accumulate_grad_x, "gelu_input does not go with accumulate_grad_x");
  if (p.workspace || p.grad_weight)
    check.bytes("workspace", p.workspace, linear_backward_workspace(p.x.dtype, p.weight.rows, p.x.cols),
                Access::scratch);
  FLEXDIT_RUN(linear_backward_on_cpu, cuda::linear_backward);
}

void modulated_layer_norm(const ModulatedLayerNorm& p, const Execution& exec) {
  Checker check("modulated_layer_norm", exec);
  check.columns(p.x.cols);
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t rows = check.rows(p.layout, p.x);
  check.tokens("x", p.x, rows, p.x.cols);
  check.matrix("shift", p.shift, p.layout.batch, p.x.cols);
  check.matrix("scale", p.scale, p.layout.batch, p.x.cols);
  check.tokens("y", p.y, rows, p.x.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().modulated_layer_norm, cuda::modulated_layer_norm);
}

void modulated_layer_norm_backward(const ModulatedLayerNormBackward& p, const Execution& exec) {
  Checker check("modulated_layer_norm_backward", exec);
  check.columns(p.x.cols);
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t rows = check.rows(p.layout, p.x), cols = p.x.cols, batch = p.layout.batch;
  check.tokens("x", p.x, rows, cols);
  check.matrix("scale", p.scale, batch, cols);
  check.tokens("grad_y", p.grad_y, rows, cols);
  if (p.grad_residual) check.tokens("grad_residual", p.grad_residual, rows, cols);
  check.tokens("grad_x", p.grad_x, rows, cols, Access::write);
  check.matrix("grad_shift", p.grad_shift, batch, cols, written(p.accumulate_modulation));
  check.matrix("grad_scale", p.grad_scale, batch, cols, written(p.accumulate_modulation));
  check.bytes("workspace", p.workspace, row_statistics_workspace(p.x.dtype, rows), Access::scratch);
  FLEXDIT_RUN(cpu::kernels().modulated_layer_norm_backward, cuda::modulated_layer_norm_backward);
}

void gated_residual(const GatedResidual& p, const Execution& exec) {
  Checker check("gated_residual", exec);
  check.columns(p.x.cols);
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t rows = check.rows(p.layout, p.x), cols = p.x.cols, batch = p.layout.batch;
  check.tokens("x", p.x, rows, cols);
  check.tokens("y", p.y, p.y_per_sample ? batch : rows, cols);
  check.optional("gate", p.gate, batch, cols);
  check.tokens("out", p.out, rows, cols, Access::write);
  check_norm_fields(check, p.shift, p.scale, p.normed, batch, rows, cols);
  FLEXDIT_RUN(cpu::kernels().gated_residual, cuda::gated_residual);
}

void gated_residual_backward(const GatedResidualBackward& p, const Execution& exec) {
  Checker check("gated_residual_backward", exec);
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t rows = check.rows(p.layout, p.grad_out), cols = p.gate.cols, batch = p.layout.batch;
  check.tokens("y", p.y, p.y_per_sample ? batch : rows, cols);
  check.matrix("gate", p.gate, batch, cols);
  check.tokens("grad_out", p.grad_out, rows, cols);
  check.tokens("grad_y", p.grad_y, p.y_per_sample ? batch : rows, cols, Access::write);
  check.matrix("grad_gate", p.grad_gate, batch, cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().gated_residual_backward, cuda::gated_residual_backward);
}

void modulated_mean(const ModulatedMean& p, const Execution& exec) {
  Checker check("modulated_mean", exec);
  check.columns(p.x.cols);
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t rows = check.rows(p.layout, p.x);
  check.tokens("x", p.x, rows, p.x.cols);
  check.matrix("shift", p.shift, p.layout.batch, p.x.cols);
  check.matrix("scale", p.scale, p.layout.batch, p.x.cols);
  check.matrix("mean", p.mean, p.layout.batch, p.x.cols, Access::write);
  check.bytes("workspace", p.workspace, modulated_mean_workspace(p.x.dtype, p.layout.batch, p.x.rows, p.x.cols),
              Access::scratch);
  FLEXDIT_RUN(cpu::kernels().modulated_mean, cuda::modulated_mean);
}

void modulated_mean_backward(const ModulatedMeanBackward& p, const Execution& exec) {
  Checker check("modulated_mean_backward", exec);
  check.columns(p.x.cols);
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t rows = check.rows(p.layout, p.x), cols = p.x.cols, batch = p.layout.batch;
  check.tokens("x", p.x, rows, cols);
  check.matrix("scale", p.scale, batch, cols);
  check.matrix("grad_mean", p.grad_mean, batch, cols);
  if (p.grad_residual) check.tokens("grad_residual", p.grad_residual, rows, cols);
  check.tokens("grad_x", p.grad_x, rows, cols, Access::write);
  check.matrix("grad_shift", p.grad_shift, batch, cols, Access::write);
  check.matrix("grad_scale", p.grad_scale, batch, cols, Access::write);
  check.bytes("workspace", p.workspace, row_statistics_workspace(p.x.dtype, rows), Access::scratch);
  FLEXDIT_RUN(cpu::kernels().modulated_mean_backward, cuda::modulated_mean_backward);
}

void pool_tokens(const PoolTokens& p, const Execution& exec) {
  Checker check("pool_tokens", exec);
  check.columns(p.x.cols);
  check_exchange(check, p.layout, p.sparse_layout, p.position);
  check.tokens("x", p.x, check.rows(p.layout, p.x), p.x.cols);
  if (p.position) check.matrix("position", p.position.rows, p.position.rows.rows, p.x.cols);
  const int64_t sparse_rows = check.rows(p.sparse_layout, p.out);
  check.tokens("out", p.out, sparse_rows, p.x.cols, Access::write);
  check_norm_fields(check, p.shift, p.scale, p.normed, p.layout.batch, sparse_rows, p.x.cols);
  FLEXDIT_RUN(cpu::kernels().pool_tokens, cuda::pool_tokens);
}

void pool_tokens_backward(const PoolTokensBackward& p, const Execution& exec) {
  Checker check("pool_tokens_backward", exec);
  check.columns(p.grad_out.cols);
  check_exchange(check, p.layout, p.sparse_layout, {});
  check.tokens("grad_out", p.grad_out, check.rows(p.sparse_layout, p.grad_out), p.grad_out.cols);
  check.tokens("grad_x", p.grad_x, check.rows(p.layout, p.grad_x), p.grad_out.cols, written(p.accumulate));
  FLEXDIT_RUN(cpu::kernels().pool_tokens_backward, cuda::pool_tokens_backward);
}

void gather_sparse(const GatherSparse& p, const Execution& exec) {
  Checker check("gather_sparse", exec);
  check.columns(p.x.cols);
  check_exchange(check, p.layout, p.sparse_layout, p.position);
  const int64_t rows = check.rows(p.layout, p.x), cols = p.x.cols;
  check.tokens("x", p.x, rows, cols);
  check.tokens("s", p.s, check.rows(p.sparse_layout, p.s), cols);
  if (p.position) check.matrix("position", p.position.rows, p.position.rows.rows, cols);
  check.tokens("out", p.out, rows, cols, Access::write);
  check_norm_fields(check, p.shift, p.scale, p.normed, p.layout.batch, rows, cols);
  FLEXDIT_RUN(cpu::kernels().gather_sparse, cuda::gather_sparse);
}

void gather_sparse_backward(const GatherSparseBackward& p, const Execution& exec) {
  Checker check("gather_sparse_backward", exec);
  check.columns(p.grad_out.cols);
  check_exchange(check, p.layout, p.sparse_layout, {});
  check.tokens("grad_out", p.grad_out, check.rows(p.layout, p.grad_out), p.grad_out.cols);
  check.tokens("grad_s", p.grad_s, check.rows(p.sparse_layout, p.grad_s), p.grad_out.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().gather_sparse_backward, cuda::gather_sparse_backward);
}

void add_position(const AddPosition& p, const Execution& exec) {
  Checker check("add_position", exec);
  check.columns(p.x.cols);
  check_exchange(check, p.layout, p.layout, p.position);
  check.tokens("x", p.x, check.rows(p.layout, p.x), p.x.cols, Access::update);
  check.matrix("position", p.position.rows, p.position.rows.rows, p.x.cols);
  FLEXDIT_RUN(cpu::kernels().add_position, cuda::add_position);
}

namespace {

void check_attention(Checker& check, const Attention& p, Access results) {
  check.layout("layout_q", p.layout_q, p.layout_q.batch);
  check.layout("layout_k", p.layout_k, p.layout_q.batch);
  const int64_t rows_q = check.rows(p.layout_q, p.q), rows_k = check.rows(p.layout_k, p.k);
  check.tokens("q", p.q, rows_q, p.q.cols);
  check.tokens("k", p.k, rows_k, p.q.cols);
  check.tokens("v", p.v, rows_k, p.q.cols);
  check.tokens("out", p.out, rows_q, p.q.cols, results);
  check.holds(p.num_heads >= 1 && p.q.cols % p.num_heads == 0, "num_heads is ", p.num_heads, ", must divide the ",
              p.q.cols, " columns of q");
  if (p.lse) check.accumulation("lse", p.lse, rows_q, p.num_heads, results);
  check.holds(!p.across_frames || p.layout_k.table == p.layout_q.table, "across_frames needs layout_k to be layout_q");
}

}  // namespace

void attention(const Attention& p, const Execution& exec) {
  Checker check("attention", exec);
  check_attention(check, p, Access::write);
  FLEXDIT_RUN(cpu::kernels().attention, cuda::attention);
}

void attention_backward(const AttentionBackward& p, const Execution& exec) {
  Checker check("attention_backward", exec);
  check_attention(check, p, Access::read);
  check.holds(bool(p.lse) || p.q.rows == 0, "lse is missing");
  const int64_t rows_q = check.rows(p.layout_q, p.q), rows_k = check.rows(p.layout_k, p.k);
  check.tokens("grad_out", p.grad_out, rows_q, p.q.cols);
  check.tokens("grad_q", p.grad_q, rows_q, p.q.cols, Access::write);
  check.tokens("grad_k", p.grad_k, rows_k, p.q.cols, Access::write);
  check.tokens("grad_v", p.grad_v, rows_k, p.q.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().attention_backward, cuda::attention_backward);
}

void gelu(const Elementwise& p, const Execution& exec) {
  Checker check("gelu", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols);
  check.matrix("y", p.y, p.x.rows, p.x.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().gelu, cuda::gelu);
}

void gelu_backward(const GeluBackward& p, const Execution& exec) {
  Checker check("gelu_backward", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols);
  check.matrix("grad_y", p.grad_y, p.x.rows, p.x.cols);
  check.optional("y", p.y, p.x.rows, p.x.cols, Access::write);
  check.matrix("grad_x", p.grad_x, p.x.rows, p.x.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().gelu_backward, cuda::gelu_backward);
}

void silu(const Elementwise& p, const Execution& exec) {
  Checker check("silu", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols);
  check.matrix("y", p.y, p.x.rows, p.x.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().silu, cuda::silu);
}

void silu_backward(const SiluBackward& p, const Execution& exec) {
  Checker check("silu_backward", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols);
  check.matrix("grad_y", p.grad_y, p.x.rows, p.x.cols);
  check.matrix("grad_x", p.grad_x, p.x.rows, p.x.cols, written(p.accumulate));
  FLEXDIT_RUN(cpu::kernels().silu_backward, cuda::silu_backward);
}

namespace {

void check_patches(Checker& check, const Patches& p, bool to_rows) {
  check.holds(p.patch >= 1, "patch is ", p.patch, ", must be at least 1");
  check.layout("layout", p.layout, p.layout.batch);
  const int64_t values = p.channels * p.patch * p.patch;
  check.tokens("rows", p.rows, check.rows(p.layout, p.rows), values, to_rows ? Access::write : Access::read);
  if (p.rows.rows > 0)
    check.images("image", p.image, p.layout, values, p.rows.dtype, to_rows ? Access::read : Access::write);
}

}  // namespace

void patchify(const Patches& p, const Execution& exec) {
  Checker check("patchify", exec);
  check_patches(check, p, true);
  FLEXDIT_RUN(cpu::kernels().patchify, cuda::patchify);
}

void unpatchify(const Patches& p, const Execution& exec) {
  Checker check("unpatchify", exec);
  check_patches(check, p, false);
  FLEXDIT_RUN(cpu::kernels().unpatchify, cuda::unpatchify);
}

void timestep_embedding(const TimestepEmbedding& p, const Execution& exec) {
  Checker check("timestep_embedding", exec);
  check.matrix("out", p.out, p.out.rows, p.out.cols, Access::write);
  check.holds(p.out.cols % 2 == 0, "out has ", p.out.cols, " columns, must be even");
  check.array("t", p.t, p.out.rows);
  check.holds(p.shift >= 0 && p.shift < std::max<int64_t>(p.out.cols / 2, 1), "shift is ", p.shift,
              ", must lie in [0, ", p.out.cols / 2, ")");
  FLEXDIT_RUN(cpu::kernels().timestep_embedding, cuda::timestep_embedding);
}

void label_embedding(const LabelEmbedding& p, const Execution& exec) {
  Checker check("label_embedding", exec);
  check.matrix("table", p.table, p.table.rows, p.table.cols);
  check.matrix("x", p.x, p.x.rows, p.table.cols, Access::update);
  check.array("labels", p.labels, p.x.rows);
  for (int64_t b = 0; check.on_cpu() && b < p.x.rows; ++b)
    check.holds(p.labels[b] >= 0 && p.labels[b] < p.table.rows, "labels[", b, "] is ", p.labels[b],
                ", must lie in [0, ", p.table.rows, ")");
  FLEXDIT_RUN(cpu::kernels().label_embedding, cuda::label_embedding);
}

void label_embedding_backward(const LabelEmbeddingBackward& p, const Execution& exec) {
  Checker check("label_embedding_backward", exec);
  check.columns(p.grad_table.cols);
  check.matrix("grad_table", p.grad_table, p.grad_table.rows, p.grad_table.cols, Access::write);
  check.matrix("grad_out", p.grad_out, p.grad_out.rows, p.grad_table.cols);
  check.array("labels", p.labels, p.grad_out.rows);
  FLEXDIT_RUN(cpu::kernels().label_embedding_backward, cuda::label_embedding_backward);
}

void select_tokens(const SelectTokens& p, const Execution& exec) {
  Checker check("select_tokens", exec);
  check.nonzero("schedule", p.schedule);
  check.array("table", p.table, p.batch + 1, Access::write);
  check.array("t", p.t, p.batch);
  check.holds(p.rows >= 0, "rows is ", p.rows, ", must be at least 0");
  if (p.row_map) check.array("row_map", p.row_map, p.rows, Access::write);
  FLEXDIT_RUN(select_tokens_on_cpu, cuda::select_tokens);
}

}  // namespace flexdit
