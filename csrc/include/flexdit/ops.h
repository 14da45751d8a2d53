// The one list of operations. Each takes a struct of views and runs on `Execution`'s device without allocating
// device memory or synchronising. Rows are packed; R is their number, C the hidden size, B the batch.
// Gradients are written (=), never accumulated, unless a comment says +=. A view left empty is not computed.
// Every function throws ArgumentError, naming the field, when views do not fit together.
#pragma once

#include <memory>

#include "flexdit/layout.h"
#include "flexdit/schedule.h"
#include "flexdit/tensor.h"

namespace flexdit {

constexpr double kLayerNormEps = 1e-6;

// A weight [N, K] in the order that products read (oneDNN's choice, or tiles), which saves a pass over it in every
// product. CPU only, float32 and bfloat16.
class PackedWeight;
struct PackedWeightDeleter {
  void operator()(const PackedWeight* weight) const;
};
using PackedWeightPointer = std::unique_ptr<const PackedWeight, PackedWeightDeleter>;
// Null where there is nothing to gain: on a GPU, in float64, and in bfloat16 without the instructions.
PackedWeightPointer pack_weight(const Matrix& weight, const Execution& exec);

// y = activation(x weight^T + bias)
enum class Activation : uint8_t { none, gelu_tanh };
struct Linear {
  Matrix x;       // [M, K]
  Matrix weight;  // [N, K]
  Matrix bias;    // [1, N] or empty
  Matrix y;       // [M, N], written
  const PackedWeight* packed = nullptr;  // the weight packed, or null; with it weight's data is not read
  Activation activation = Activation::none;
  Matrix pre_activation;  // [M, N], x weight^T + bias where y is its GELU, written for a backward to come, or empty
};
struct LinearBackward {
  Matrix x;            // [M, K]
  Matrix weight;       // [N, K]
  Matrix grad_y;       // [M, N]
  Matrix grad_x;       // [M, K], written, or += with accumulate_grad_x, or empty
  Matrix grad_weight;  // [N, K], written, or empty
  Matrix grad_bias;    // [1, N], written, or empty
  bool accumulate_grad_x = false;
  Matrix gelu_input;          // [M, K]: x is GELU of it, and grad_x, not accumulated, becomes its gradient; or empty
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
  Matrix gate;  // [B, C], or empty: 1
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
  void* workspace = nullptr;  // modulated_mean_workspace() bytes
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
  void* workspace = nullptr;  // modulated_mean_workspace() bytes
};
// Statistics of each row, or sums of some rows each in float32.
int64_t modulated_mean_workspace(DType dtype, int64_t batch, int64_t rows, int64_t cols);
void modulated_mean(const ModulatedMean& p, const Execution& exec);
void modulated_mean_backward(const ModulatedMeanBackward& p, const Execution& exec);

// Fixed position tables [P, C], one behind the other: the table of sample b begins at row offset[b], or at row 0 where
// offset is null and all samples have the same dense grid.
struct PositionTable {
  Matrix rows;
  const int32_t* offset = nullptr;  // [B] on exec's device, or null

  PositionTable(const Matrix& table = {}, const int32_t* offsets = nullptr) : rows(table), offset(offsets) {}
  explicit operator bool() const { return bool(rows); }
  constexpr int64_t first(int64_t sample) const { return offset ? offset[sample] : 0; }
};

// out = adaptive average pooling of x (+ position) from each sample's dense grid to its sparse grid, and with `normed`
// its modulated layer norm in the same pass: the queries of token generation.
struct PoolTokens {
  Matrix x;                // [R, C]
  PositionTable position;  // of the dense grids, or empty
  TokenLayout layout, sparse_layout;
  Matrix out;                   // [Rs, C], written
  Matrix shift, scale, normed;  // [B, C], [B, C], [Rs, C]: all or none
  double eps = kLayerNormEps;
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
  Matrix s;                // [Rs, C]
  Matrix x;                // [R, C]
  PositionTable position;  // of the dense grids, or empty
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
  Matrix x;  // [R, C], updated
  PositionTable position;
  TokenLayout layout;
};
void add_position(const AddPosition& p, const Execution& exec);

// out = softmax(q k^T / sqrt(d)) v within each sample and head, d = C / num_heads; with across_frames among the tokens
// that a sample's frames have at one position, which lie H W rows apart and are read where they are.
struct Attention {
  Matrix q;     // [Rq, C]
  Matrix k, v;  // [Rk, C]; in forward samples may lie in any order, apart, and several in the same rows
  TokenLayout layout_q, layout_k;
  int64_t num_heads = 1;
  Matrix out;  // [Rq, C], written
  Matrix lse;  // [Rq, num_heads] log of the softmax's denominator, accumulation dtype, written, or empty
  bool across_frames = false;  // then layout_k is layout_q
  int64_t max_positions = 0;   // across_frames on a GPU: no less than the sum of H W over the samples; 0: Rq is
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
  Matrix y;       // GELU(x) again, written, or empty
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

// Packed images to and from rows of patches. Sample b's image is [channels, frames * height * patch, width * patch] of
// its grid, contiguous, and begins at value layout.offset(b) * channels * patch^2; images of one size are just
// [B, channels, H, W]. Columns of a row are (channel, y, x) as a convolution's weight has them, or (y, x, channel) with
// channels_last as DiT's final layer.
struct Patches {
  void* image = nullptr;
  Matrix rows;  // [R, channels * patch * patch]
  TokenLayout layout;
  int64_t channels = 0, patch = 1;
  bool channels_last = false;
};
void patchify(const Patches& p, const Execution& exec);    // image -> rows
void unpatchify(const Patches& p, const Execution& exec);  // rows -> image

// out[b] = [cos(t w), sin(t w)], w_i = 10000^(-i / (D/2 - shift)), in float32 whatever the storage, as pretrained DiTs
// were trained: t w reaches 1000, so the rounding shows. Source: DiT's TimestepEmbedder (after GLIDE).
struct TimestepEmbedding {
  const double* t = nullptr;  // [B]
  Matrix out;                 // [B, D], D even, written
  int64_t shift = 0;          // below D/2; 1 in DiTs that diffusers has trained
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

// out[b, i] = standard normal value i of draw `draw` of the stream of seeds[b]. The same for every batch and device:
// value i comes from Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and (i / 4, draw) as counter, by
// Box and Muller's transform; devices differ by the rounding of log and cos.
struct NormalNoise {
  const uint64_t* seeds = nullptr;  // [B] on exec's device
  uint32_t draw = 0;
  Matrix out;  // [B, n] float32 or float64 (on the CPU), written
};
void normal_noise(const NormalNoise& p, const Execution& exec);

// The numbers of one sample in one step of a sampler (sampler.h), on exec's device. With c for these numbers:
//   prediction = uncond + c.guidance (cond - uncond), where there are both, in the guided channels
//   x0 = c.x0_from_x x + c.x0_from_output prediction, clamped to [-1, 1] with clip_x0
//   x  = c.x_coef x + c.x0_coef x0 + c.x0_previous_coef (x0 of the step before) + c.noise_coef noise
// With learned variance the noise's factor is exp(((1 - f) log_variance_small + f log_variance_large) / 2) instead,
// f = (v + 1) / 2 with v from the output's second half (IDDPM, arXiv 2102.09672, eq. 15). Computed in float64 on the
// CPU and in float32 on a GPU, then rounded to the state's dtype.
struct StepNumbers {
  double x0_from_x, x0_from_output, x_coef, x0_coef, x0_previous_coef, noise_coef;
  double log_variance_small, log_variance_large;
  double guidance;
  uint64_t seed;           // noise is draw `draw` of this stream, read where noise_coef > 0
  uint32_t draw;
  int32_t conditional;     // the model's sample with this one's label
  int32_t unconditional;   // and the one with the null label, or -1
  int32_t learned_variance, clip_x0;
};
struct DenoiseStep {
  const StepNumbers* numbers = nullptr;  // [B] on exec's device
  TokenLayout layout;                    // dense tokens of the B samples
  TokenLayout model_layout;              // dense tokens of the model's batch
  int64_t rows = 0;                      // tokens that the samples' buffers have room for, at least the layout's
  int64_t channels = 0, out_channels = 0, patch = 1, guided_channels = 0;
  DType dtype = DType::float32;   // of output
  const void* output = nullptr;   // the model's images, packed as Patches says, [out_channels, H, W] each
  DType state = DType::float32;   // of x and x0: float32, or float64 on the CPU
  void* x = nullptr;              // the samples' images, packed, [channels, H, W] each, updated
  void* x0 = nullptr;             // the same for x0 of the step before, read and written
};
void denoise_step(const DenoiseStep& p, const Execution& exec);

// input[m] = x[samples[m]] in the model's dtype, for each sample m of the model's batch.
struct ModelInput {
  const int32_t* samples = nullptr;  // [Bm] on exec's device
  TokenLayout layout, model_layout;
  int64_t rows = 0;  // tokens that `input` has room for, at least the model layout's
  int64_t channels = 0, patch = 1;
  DType state = DType::float32;  // of x
  const void* x = nullptr;       // packed images [channels, H, W]
  DType dtype = DType::float32;  // of input
  void* input = nullptr;         // packed images, written
};
void model_input(const ModelInput& p, const Execution& exec);

// Classifier-free guidance of DiT's forward_with_cfg, in place: images [2 B, channels, pixels], both halves' first
// `guided_channels` become uncond + scale (cond - uncond), cond being the first half.
struct GuidanceCombine {
  Matrix images;  // [2 B, channels * pixels], updated
  int64_t channels = 0, guided_channels = 0;
  double scale = 1;
};
void guidance_combine(const GuidanceCombine& p, const Execution& exec);

// out[b] = C values from rows[b]: rows of several tables, whose addresses lie on the device, so that a captured graph
// serves every step.
struct GatherRows {
  const void* const* rows = nullptr;  // [B] on exec's device
  Matrix out;                         // [B, C], written
};
void gather_rows(const GatherRows& p, const Execution& exec);

// out[b, k W + j] = x[b, j] + table[k, j]: a modulation that K blocks share, and the table of each (PixArt-alpha, arXiv
// 2310.00426, adaLN-single).
struct AddTables {
  Matrix x;      // [B, W]
  Matrix table;  // [K, W], or [B K, W] with own_tables: K rows for each of x
  Matrix out;    // [B, K W], written; may be x for K = 1
  bool own_tables = false;
};
void add_tables(const AddTables& p, const Execution& exec);

// table = the layout of sparse tokens that the schedule gives to timesteps t.
struct SelectTokens {
  const double* t = nullptr;  // [B]
  int64_t batch = 0;
  const DensitySchedule* schedule = nullptr;
  LayoutRow* table = nullptr;  // [B + 1], written
  int32_t* row_map = nullptr;  // [rows], the table's row map, written, or null
  int64_t rows = 0;            // at least the layout's total; on a GPU, where nobody knows it, the map ends with them
};
void select_tokens(const SelectTokens& p, const Execution& exec);

}  // namespace flexdit
