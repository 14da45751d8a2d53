// The CUDA backend: the operations of ops.h on device memory. No allocation, no synchronisation; layout tables,
// timesteps and labels are read by the device only. Where an operation writes token rows, rows behind the layout's
// total, up to the capacity that the view has, become zero: later products over the capacity are then harmless.
#pragma once

#include <algorithm>

#include "flexdit/ops.h"

namespace flexdit::cuda {

constexpr int64_t kMaxColumns = 1536;  // a warp keeps a token in registers
constexpr size_t kMaxSegments = 64;    // of a density schedule: it travels as a kernel parameter

// modulated_mean adds up tokens in parts of so many, which lie in its workspace: float32 [mean_parts, C].
constexpr int64_t kMeanRows = 16;
constexpr int64_t mean_parts(int64_t batch, int64_t rows) { return rows / kMeanRows + batch; }

void linear(const Linear& p, const Execution& exec);
void linear_backward(const LinearBackward& p, const Execution& exec);
void modulated_layer_norm(const ModulatedLayerNorm& p, const Execution& exec);
void modulated_layer_norm_backward(const ModulatedLayerNormBackward& p, const Execution& exec);
void gated_residual(const GatedResidual& p, const Execution& exec);
void gated_residual_backward(const GatedResidualBackward& p, const Execution& exec);
void modulated_mean(const ModulatedMean& p, const Execution& exec);
void modulated_mean_backward(const ModulatedMeanBackward& p, const Execution& exec);
void pool_tokens(const PoolTokens& p, const Execution& exec);
void pool_tokens_backward(const PoolTokensBackward& p, const Execution& exec);
void gather_sparse(const GatherSparse& p, const Execution& exec);
void gather_sparse_backward(const GatherSparseBackward& p, const Execution& exec);
void add_position(const AddPosition& p, const Execution& exec);
void attention(const Attention& p, const Execution& exec);
void attention_backward(const AttentionBackward& p, const Execution& exec);
void gelu(const Elementwise& p, const Execution& exec);
void gelu_backward(const GeluBackward& p, const Execution& exec);
void silu(const Elementwise& p, const Execution& exec);
void silu_backward(const SiluBackward& p, const Execution& exec);
void patchify(const Patches& p, const Execution& exec);
void unpatchify(const Patches& p, const Execution& exec);
void timestep_embedding(const TimestepEmbedding& p, const Execution& exec);
void label_embedding(const LabelEmbedding& p, const Execution& exec);  // a label outside the table: its row is NaN
void label_embedding_backward(const LabelEmbeddingBackward& p, const Execution& exec);
void normal_noise(const NormalNoise& p, const Execution& exec);
// What refers to a sample, a channel or a step that does not exist, or to a sample with other tokens, becomes NaN.
void denoise_step(const DenoiseStep& p, const Execution& exec);
void model_input(const ModelInput& p, const Execution& exec);
void guidance_combine(const GuidanceCombine& p, const Execution& exec);
void gather_rows(const GatherRows& p, const Execution& exec);
void add_tables(const AddTables& p, const Execution& exec);
// A timestep outside the schedule takes the first or the last segment, NaN the first.
void select_tokens(const SelectTokens& p, const Execution& exec);

// sums[j] = sum over i of x[i, j]: a bias's gradient. The rows are summed in `chunks` parts that lie in `partial`,
// float32 [chunks, N]; with one chunk `partial` is not used.
struct ColumnSums {
  Matrix x;     // [M, N]
  Matrix sums;  // [1, N], written
  float* partial = nullptr;
  int64_t chunks = 1;
};
void column_sums(const ColumnSums& p, const Execution& exec);
// The bias's part of linear_backward: in chunks where its workspace, which products do not need here, has room.
inline ColumnSums bias_gradient(const LinearBackward& p) {
  constexpr int64_t kRowsPerChunk = 256, kMostChunks = 32;
  const int64_t room = p.workspace ? linear_backward_workspace(p.x.dtype, p.weight.rows, p.weight.cols) : 0;
  const int64_t chunks =
      std::min({p.grad_y.rows / kRowsPerChunk, kMostChunks, room / (p.weight.rows * int64_t{sizeof(float)})});
  return {p.grad_y, p.grad_bias, static_cast<float*>(p.workspace), std::max<int64_t>(chunks, 1)};
}

}  // namespace flexdit::cuda
