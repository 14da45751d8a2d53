// The full model, forward and backward: embedding, pooling blocks, sparse-dense token modules, dense blocks, final
// layer. All buffers belong to the caller and lie on exec's device.
#pragma once

#include "flexdit/block.h"
#include "flexdit/schedule.h"

namespace flexdit {

// What a model is conditioned on, and how its blocks are composed.
enum class ModelFamily : uint8_t {
  dit,     // FlexDiT: a label; every block has a modulation layer
  pixart,  // FlexPixArt: a caption; one modulation layer for all blocks and a table for each (arXiv 2310.00426)
  latte,   // FlexLatte: clips, of a label, a caption or neither; the same modulation, and blocks attend within a frame
           // and across the frames in turn (arXiv 2401.03048)
};

struct Config {
  int64_t input_height = 32, input_width = 32;  // of the latent image
  int64_t patch_size = 2;
  int64_t in_channels = 4;
  int64_t out_channels = 8;  // 2 in_channels with learned sigma
  int64_t hidden = 1152;
  int64_t mlp_hidden = 4608;
  int64_t num_heads = 16;
  int64_t label_rows = 1001;  // classes and the null class; 0: no labels
  int64_t num_pooling_blocks = 2;
  int64_t num_sdtm = 4;
  int64_t generation_blocks = 1, sparse_blocks = 3, recovery_blocks = 1, dense_blocks = 1;  // of a module
  int64_t num_dense_blocks = 2;
  bool reinject_position = false;
  int64_t timestep_features = 256;
  int64_t timestep_shift = 0;           // TimestepEmbedding's; diffusers' DiT has 1
  double mlp_norm_eps = kLayerNormEps;  // of the layer norms before the MLPs; diffusers' DiT has 1e-5
  ModelFamily family = ModelFamily::dit;
  // Of the other families:
  int64_t num_frames = 1;                               // Latte: of a clip at most
  int64_t caption_channels = 0, max_caption_tokens = 0;  // of the text encoder's output; 0 channels: no captions
  bool size_conditions = false;                         // PixArt: resolution and aspect ratio are embedded
  double position_scale = 1;                            // of the position embedding, as in FlexPixArtConfig

  Grid dense_grid() const {
    return {static_cast<int32_t>(num_frames), static_cast<int32_t>(input_height / patch_size),
            static_cast<int32_t>(input_width / patch_size)};
  }
  bool learned_variance() const { return out_channels == 2 * in_channels; }
  bool operator==(const Config&) const = default;
};

// All parameters, named as in flexdit_ext's state_dict, in the order that Model takes them. FlexDiT's pos_embed comes
// first and has no gradient; the other families compute positions.
std::vector<ParameterSpec> model_parameters(const Config& config);

// The kinds of the blocks in the order that the model runs and model_parameters lists them.
std::vector<BlockKind> model_blocks(const Config& config);

// What FlexPixArt and FlexLatte follow on that dense grid when their config names no schedule, as FlexPixArtConfig's
// and FlexLatteConfig's default_schedule. Throws ArgumentError for FlexDiT, which has none.
DensitySchedule default_schedule(const Config& config, Grid dense);

// Multiply-accumulates of a forward pass of one sample whose sparse tokens form `sparse`, as this library computes
// them: every linear layer and the attention scores, identities 1 and 2 of method.md used; captions have
// max_caption_tokens.
int64_t model_macs(const Config& config, Grid sparse);

// What a sampler computes once and brings along in inference, each of it or nothing.
struct ModelPrepared {
  Matrix modulation;  // [B, model_modulation_columns]: instead of t and labels
  std::span<const Matrix> folded;               // of each pooling block W_o W_v [C, C] and W_o b_v + b_o [1, C]
  std::span<const PackedWeight* const> packed;  // of each parameter, or null
  std::span<const Matrix> caption_kv;  // BlockPrepared's of each block that reads the caption, in their order
  TokenLayout caption_layout;          // where each sample's caption lies in all of them, as in Attention
};

// FlexPixArt and FlexLatte are computed for inference alone, with prepared.modulation, prepared.caption_kv if they read
// captions, and position tables; they are trained through Python's block ops.
struct ModelForward {
  Config config;
  std::span<const Matrix> parameters;
  DType dtype = DType::float32;
  int64_t batch = 0;
  const void* x = nullptr;          // packed images [in_channels, H, W] of dtype: [B, in_channels, H, W] for one size
  const double* t = nullptr;        // [B] timesteps
  Matrix timestep_features;         // [B, F] instead of t, or empty
  const int64_t* labels = nullptr;  // [B]
  TokenLayout layout;               // of the samples' dense tokens; on the CPU it may be empty: config's grid for all
  TokenLayout sparse_layout;        // of the samples' sparse tokens; empty without modules
  int64_t rows = 0, sparse_rows = 0;  // of token buffers, at least the layouts' totals; 0: the total, read on the host
  PositionTable positions;            // for samples with other dense grids than config's, or empty: pos_embed for all
  // Of FlexLatte: the frames of both layouts as samples, what BlockForward::max_positions says of both, and the
  // temporal embedding of each dense token.
  TokenLayout frames, sparse_frames;
  int64_t max_positions = 0, max_sparse_positions = 0;
  PositionTable times;
  void* out = nullptr;                // packed images [out_channels, H, W], written
  void* context = nullptr;            // model_context_bytes, or null: nothing is kept
  void* workspace = nullptr;          // model_workspace_bytes
  ModelPrepared prepared = {};
};
struct ModelBackward : ModelForward {       // out is not used, context is read
  const void* grad_out = nullptr;           // as out
  void* grad_x = nullptr;                   // as x, written, or null
  std::span<const Matrix> grad_parameters;  // written; an empty view is not computed
};

// Sizes depend on config, dtype, batch, layouts and rows, and on which of `prepared` there is; pointers are not read,
// except tables whose rows are 0.
int64_t model_context_bytes(const ModelForward& p);
int64_t model_workspace_bytes(const ModelForward& p, bool keeps_context);
int64_t model_backward_workspace_bytes(const ModelForward& p);
void model_forward(const ModelForward& p, const Execution& exec);
void model_backward(const ModelBackward& p, const Execution& exec);

// The modulations of all blocks and of the final layer, 6 C columns for each block, then 2 C: one product for all
// timesteps and labels of a trajectory (identity 3 of method.md). With a shared modulation layer its product and the
// tables; the final layer adds its table to the condition itself (PixArt-alpha, arXiv 2310.00426).
int64_t model_modulation_columns(const Config& config);
struct ModelModulation {
  Config config;
  std::span<const Matrix> parameters;  // of the model; only the condition's are read
  Matrix weight, bias;  // all modulation layers, one below the other: [columns, C], [1, columns]; or the one for all
  Matrix tables = {};   // with one for all: every modulation_table, one below the other, [6 blocks + 2, C]
  const PackedWeight* packed = nullptr;
  const double* t = nullptr;        // [S]
  const int64_t* labels = nullptr;  // [S], if the model has labels
  // With size_conditions: [S, 2] height and width, [S] height / width.
  const double *resolution = nullptr, *aspect_ratio = nullptr;
  Matrix out;                       // [S, columns], written
  void* workspace = nullptr;        // model_modulation_workspace_bytes
};
int64_t model_modulation_workspace_bytes(const Config& config, int64_t samples, DType dtype);
void model_modulation(const ModelModulation& p, const Execution& exec);

}  // namespace flexdit
