// The one list of operations. Each takes a struct of views and runs on `Execution`'s device without allocating
// device memory or synchronising. Rows are packed; R is their number, C the hidden size, B the batch.
// Gradients are written (=), never accumulated, unless a comment says +=. A view left empty is not computed.
// Every function throws ArgumentError, naming the field, when views do not fit together.
#pragma once

#include "flexdit/layout.h"
#include "flexdit/schedule.h"
#include "flexdit/tensor.h"

namespace flexdit {

constexpr double kLayerNormEps = 1e-6;

// y = activation(x weight^T + bias)
enum class Activation : uint8_t { none, gelu_tanh };
struct Linear {
  Matrix x;       // [M, K]
  Matrix weight;  // [N, K]
  Matrix bias;    // [1, N] or empty
  Matrix y;       // [M, N], written
  Activation activation = Activation::none;
};
struct LinearBackward {
  Matrix x;            // [M, K]
  Matrix weight;       // [N, K]
  Matrix grad_y;       // [M, N]
  Matrix grad_x;       // [M, K], written, or += with accumulate_grad_x, or empty
  Matrix grad_weight;  // [N, K], written, or empty
  Matrix grad_bias;    // [1, N], written, or empty
  bool accumulate_grad_x = false;
  void* workspace = nullptr;  // linear_backward_workspace() bytes
};
// Sums over the rows are kept in float32 [N, K] while grad_weight is stored in bfloat16 or float16.
int64_t linear_backward_workspace(DType dtype, int64_t n, int64_t k);
void linear(const Linear& p, const Execution& exec);
void linear_backward(const LinearBackward& p, const Execution& exec);

// y = LN(x) * (1 + scale) + shift, LN over C without affine. Source: method.md, Notation (adaLN of DiT).
struct ModulatedLayerNorm {
  Matrix x;             // [R, C]
  Matrix shift, scale;  // [B, C]
  TokenLayout layout;
  Matrix y;  // [R, C], written
  double eps = kLayerNormEps;
};
struct ModulatedLayerNormBackward {
  Matrix x;      // [R, C]
  Matrix scale;  // [B, C]
  TokenLayout layout;
  Matrix grad_y;                  // [R, C]
  Matrix grad_residual;           // [R, C], added to grad_x, or empty
  Matrix grad_x;                  // [R, C], written; may be grad_residual
  Matrix grad_shift, grad_scale;  // [B, C], written, or += with accumulate_modulation
  bool accumulate_modulation = false;
  double eps = kLayerNormEps;
  void* workspace = nullptr;  // row_statistics_workspace() bytes
};
int64_t row_statistics_workspace(DType dtype, int64_t rows);  // mean and 1 / standard deviation of each row
void modulated_layer_norm(const ModulatedLayerNorm& p, const Execution& exec);
void modulated_layer_norm_backward(const ModulatedLayerNormBackward& p, const Execution& exec);

// out = x + gate * y, and with `normed` also normed = LN(out) * (1 + scale) + shift in the same pass.
struct GatedResidual {
  Matrix x;     // [R, C]
  Matrix y;     // [R, C], or [B, C] with y_per_sample: the same vector for all tokens of a sample
  Matrix gate;  // [B, C]
  TokenLayout layout;
  Matrix out;                   // [R, C], written; may be x
  Matrix shift, scale, normed;  // [B, C], [B, C], [R, C]: all or none
  bool y_per_sample = false;
  double eps = kLayerNormEps;
};
struct GatedResidualBackward {
  Matrix y, gate;  // as above
  TokenLayout layout;
  Matrix grad_out;   // [R, C]
  Matrix grad_y;     // as y, written
  Matrix grad_gate;  // [B, C], written
  bool y_per_sample = false;
};
void gated_residual(const GatedResidual& p, const Execution& exec);
void gated_residual_backward(const GatedResidualBackward& p, const Execution& exec);

// mean[b] = mean over b's tokens of LN(x) * (1 + scale) + shift. With it pooled attention is two [B, C] linears:
// identity 1 of method.md.
struct ModulatedMean {
  Matrix x;             // [R, C]
  Matrix shift, scale;  // [B, C]
  TokenLayout layout;
  Matrix mean;  // [B, C], written
  double eps = kLayerNormEps;
  void* workspace = nullptr;  // row_statistics_workspace() bytes
};
struct ModulatedMeanBackward {
  Matrix x;      // [R, C]
  Matrix scale;  // [B, C]
  TokenLayout layout;
  Matrix grad_mean;               // [B, C]
  Matrix grad_residual;           // [R, C], added to grad_x, or empty
  Matrix grad_x;                  // [R, C], written; may be grad_residual
  Matrix grad_shift, grad_scale;  // [B, C], written
  double eps = kLayerNormEps;
  void* workspace = nullptr;  // row_statistics_workspace() bytes
};
void modulated_mean(const ModulatedMean& p, const Execution& exec);
void modulated_mean_backward(const ModulatedMeanBackward& p, const Execution& exec);

// out = adaptive average pooling of x (+ position) from each sample's dense grid to its sparse grid.
struct PoolTokens {
  Matrix x;         // [R, C]
  Matrix position;  // [N, C] fixed table of the dense grid, or empty
  TokenLayout layout, sparse_layout;
  Matrix out;  // [Rs, C], written
};
struct PoolTokensBackward {
  TokenLayout layout, sparse_layout;
  Matrix grad_out;  // [Rs, C]
  Matrix grad_x;    // [R, C], written, or += with accumulate
  bool accumulate = false;
};
void pool_tokens(const PoolTokens& p, const Execution& exec);
void pool_tokens_backward(const PoolTokensBackward& p, const Execution& exec);

// out[n] = x[n] + s[nearest sparse token of n] (+ position[n]), and with `normed` its modulated layer norm.
// With s = W_1 of the sparse tokens this is identity 2 of method.md.
struct GatherSparse {
  Matrix s;         // [Rs, C]
  Matrix x;         // [R, C]
  Matrix position;  // [N, C] fixed table of the dense grid, or empty
  TokenLayout layout, sparse_layout;
  Matrix out;                   // [R, C], written; may be x
  Matrix shift, scale, normed;  // [B, C], [B, C], [R, C]: all or none
  double eps = kLayerNormEps;
};
struct GatherSparseBackward {
  TokenLayout layout, sparse_layout;
  Matrix grad_out;  // [R, C]
  Matrix grad_s;    // [Rs, C], written; the gradient of x is grad_out itself
};
void gather_sparse(const GatherSparse& p, const Execution& exec);
void gather_sparse_backward(const GatherSparseBackward& p, const Execution& exec);

// x[n] += position[n] for every sample.
struct AddPosition {
  Matrix x;         // [R, C], updated
  Matrix position;  // [N, C]
  TokenLayout layout;
};
void add_position(const AddPosition& p, const Execution& exec);

// out = softmax(q k^T / sqrt(d)) v within each sample and head, d = C / num_heads.
struct Attention {
  Matrix q;     // [Rq, C]
  Matrix k, v;  // [Rk, C]
  TokenLayout layout_q, layout_k;
  int64_t num_heads = 1;
  Matrix out;  // [Rq, C], written
  Matrix lse;  // [Rq, num_heads] log of the softmax's denominator, accumulation dtype, written, or empty
};
struct AttentionBackward : Attention {  // out and lse are read
  Matrix grad_out;                      // [Rq, C]
  Matrix grad_q, grad_k, grad_v;        // as q, k, v, written
};
void attention(const Attention& p, const Execution& exec);
void attention_backward(const AttentionBackward& p, const Execution& exec);

// Elementwise on [M, N].
struct Elementwise {
  Matrix x;
  Matrix y;  // written; may be x
};
struct GeluBackward {
  Matrix x;
  Matrix grad_y;
  Matrix y;       // GELU(x) again, written
  Matrix grad_x;  // written; may be grad_y
};
struct SiluBackward {
  Matrix x;
  Matrix grad_y;
  Matrix grad_x;  // written, or += with accumulate; may be grad_y
  bool accumulate = false;
};
void gelu(const Elementwise& p, const Execution& exec);  // tanh approximation
void gelu_backward(const GeluBackward& p, const Execution& exec);
void silu(const Elementwise& p, const Execution& exec);
void silu_backward(const SiluBackward& p, const Execution& exec);

// Images [B, channels, height, width], contiguous, to and from rows of patches. Columns of a row are
// (channel, y, x) as a convolution's weight has them, or (y, x, channel) with channels_last as DiT's final layer.
struct Patches {
  void* image = nullptr;
  Matrix rows;  // [B * (height / patch) * (width / patch), channels * patch * patch]
  int64_t batch = 0, channels = 0, height = 0, width = 0, patch = 1;
  bool channels_last = false;
};
void patchify(const Patches& p, const Execution& exec);    // image -> rows
void unpatchify(const Patches& p, const Execution& exec);  // rows -> image

// out[b] = [cos(t w), sin(t w)], w_i = 10000^(-i / (D/2)), in float32 whatever the storage, as pretrained DiTs were
// trained: t w reaches 1000, so the rounding shows. Source: DiT's TimestepEmbedder (after GLIDE).
struct TimestepEmbedding {
  const double* t = nullptr;  // [B]
  Matrix out;                 // [B, D], D even, written
};
void timestep_embedding(const TimestepEmbedding& p, const Execution& exec);

// Row lookup in the label table and its gradient.
struct LabelEmbedding {
  const int64_t* labels = nullptr;  // [B]
  Matrix table;                     // [L, C]
  Matrix x;                         // [B, C]: += table[label]; in backward the gradient that is read
};
struct LabelEmbeddingBackward {
  const int64_t* labels = nullptr;  // [B]
  Matrix grad_out;                  // [B, C]
  Matrix grad_table;                // [L, C], written
};
void label_embedding(const LabelEmbedding& p, const Execution& exec);
void label_embedding_backward(const LabelEmbeddingBackward& p, const Execution& exec);

// table = the layout of sparse tokens that the schedule gives to timesteps t.
struct SelectTokens {
  const double* t = nullptr;  // [B]
  int64_t batch = 0;
  const DensitySchedule* schedule = nullptr;
  LayoutRow* table = nullptr;  // [B + 1], written
};
void select_tokens(const SelectTokens& p, const Execution& exec);

}  // namespace flexdit
