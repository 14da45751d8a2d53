// The four blocks of FlexDiT, forward and backward. The caller owns every buffer: parameters, inputs, outputs,
// the context that backward needs, and the workspace. Sizes come from block_context_bytes and friends.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "flexdit/ops.h"

namespace flexdit {

// method.md, Blocks. `x` are the tokens that the block updates, `other` those it attends to besides.
enum class BlockKind : uint8_t {
  pooling,     // x: dense tokens
  dense,       // x: dense or sparse tokens (a sparse block is a dense block on sparse tokens)
  generation,  // x: sparse tokens, other: the dense ones
  recovery,    // x: dense tokens, other: the sparse ones
};
const char* name_of(BlockKind kind);

// A parameter of a block: its name relative to the block, as in the state_dict, and its shape. Vectors are [1, n].
struct ParameterSpec {
  std::string name;
  int64_t rows, cols;
};
// How PixArt-alpha's and Latte's blocks (arXiv 2310.00426, 2401.03048) differ from DiT's.
struct BlockStyle {
  bool shared_modulation = false;  // the condition is the block's modulation [B, 6C] itself, which has no parameters here
  bool caption = false;            // between attention and MLP the tokens read a caption: x += cross-attention(x, caption)
};
// The order in which BlockForward::parameters and BlockBackward::grad_parameters list them.
std::vector<ParameterSpec> block_parameters(BlockKind kind, int64_t hidden, int64_t mlp_hidden, BlockStyle style = {});

struct BlockShape {
  BlockKind kind = BlockKind::dense;
  int64_t hidden = 0;      // C
  int64_t mlp_hidden = 0;  // 4 C
  int64_t num_heads = 1;
  int64_t batch = 0;
  int64_t rows = 0;        // of x
  int64_t other_rows = 0;  // of other; 0 for pooling and dense
  DType dtype = DType::float32;
  BlockStyle style = {};
  int64_t caption_rows = 0;
};

// The modulated layer norm of `out` that whoever reads it next begins with.
struct NextNorm {
  Matrix shift, scale;  // [B, C]
  Matrix normed;        // [rows, C], written
};

// What inference can bring along, each of it or nothing; not together with a context.
struct BlockPrepared {
  Matrix modulation;                          // [B, 6C] instead of a condition
  Matrix folded_weight, folded_bias;          // pooling: W_o W_v [C, C] and W_o b_v + b_o [1, C]
  std::span<const PackedWeight* const> packed;  // of each parameter, or null
  Matrix normed_x, normed_other;              // mod1(x), not for pooling and recovery; mod1(other)
  Matrix caption_kv;                          // [caption_rows, 2C] keys and values of the caption, which no step changes
  NextNorm next;
};

struct BlockForward {
  BlockShape shape;
  std::span<const Matrix> parameters;
  TokenLayout layout;         // of x
  TokenLayout other_layout;   // of other
  Matrix x;                   // [rows, C]
  Matrix other;               // [other_rows, C] or empty
  Matrix condition;           // [B, C]: t_emb + y_emb, or the modulation; empty with a prepared modulation
  PositionTable position;     // recovery with reinject_position, else empty
  Matrix out;                 // [rows, C], written; must not be x
  void* context = nullptr;    // block_context_bytes(shape) for backward, or null: nothing is kept
  void* workspace = nullptr;  // block_workspace_bytes(shape, context != nullptr)
  BlockPrepared prepared = {};
  double mlp_norm_eps = kLayerNormEps;
  // Dense: the frames of x as samples, to attend within a frame; with across_frames at one position of them instead.
  TokenLayout attention_layout = {};
  bool across_frames = false;
  int64_t max_positions = 0;  // as in Attention
  Matrix caption = {};        // [caption_rows, C]
  TokenLayout caption_layout = {};
};

struct BlockBackward : BlockForward {  // out is not used, context is read
  Matrix grad_out;                     // [rows, C]
  Matrix grad_x;                       // [rows, C], written; must not be grad_out
  Matrix grad_other;  // [other_rows, C], written, or += with accumulate_other, empty for pooling and dense
  bool accumulate_other = false;
  Matrix grad_condition;  // as condition, written, or += with accumulate_condition
  bool accumulate_condition = false;  // not with shared_modulation
  Matrix grad_caption;                // [caption_rows, C], written, or += with accumulate_caption
  bool accumulate_caption = false;
  std::span<const Matrix> grad_parameters;  // written; an empty view is not computed
};

int64_t block_context_bytes(const BlockShape& shape);
int64_t block_workspace_bytes(const BlockShape& shape, bool keeps_context);
int64_t block_backward_workspace_bytes(const BlockShape& shape);
void block_forward(const BlockForward& p, const Execution& exec);
void block_backward(const BlockBackward& p, const Execution& exec);

// LN, modulation with two parts, linear: rows of patches. Parameters: modulation.weight [2C, C], modulation.bias,
// linear.weight [P, C], linear.bias.
struct FinalLayerForward {
  std::span<const Matrix> parameters;
  TokenLayout layout;
  Matrix x;                   // [R, C]
  Matrix condition;           // [B, C], or empty
  Matrix out;                 // [R, P], written
  void* workspace = nullptr;  // final_layer_workspace_bytes
  Matrix modulation = {};     // [B, 2C] instead of a condition, in inference
  Matrix normed = {};         // [R, C] the modulated layer norm of x, if it is there already
};
struct FinalLayerBackward : FinalLayerForward {  // out is not used
  Matrix grad_out;                               // [R, P]
  Matrix grad_x;                                 // [R, C], written
  Matrix grad_condition;                         // [B, C], written
  std::span<const Matrix> grad_parameters;       // written; an empty view is not computed
};
int64_t final_layer_workspace_bytes(int64_t batch, int64_t rows, int64_t hidden, int64_t patch_values, DType dtype);
void final_layer_forward(const FinalLayerForward& p, const Execution& exec);
void final_layer_backward(const FinalLayerBackward& p, const Execution& exec);

// condition = W2 SiLU(W1 features + b1) + b2 + table[label]. Parameters: timestep_embed.fc1.weight [C, F], .bias,
// timestep_embed.fc2.weight [C, C], .bias, label_embed.weight [L, C]; forward may be without the last one.
struct ConditionForward {
  std::span<const Matrix> parameters;
  Matrix features;                  // [B, F], of timestep_embedding()
  const int64_t* labels = nullptr;  // [B], with a label table
  Matrix out;                       // [B, C], written
  void* workspace = nullptr;        // condition_workspace_bytes
};
struct ConditionBackward : ConditionForward {  // out is not used
  Matrix grad_out;                             // [B, C]
  std::span<const Matrix> grad_parameters;     // written; an empty view is not computed
};
int64_t condition_workspace_bytes(int64_t batch, int64_t hidden, int64_t features, DType dtype);
void condition_forward(const ConditionForward& p, const Execution& exec);
void condition_backward(const ConditionBackward& p, const Execution& exec);

// tokens = patches W^T + b + position. Parameters: patch_embed.weight as [C, in * p * p], patch_embed.bias.
struct PatchEmbedForward {
  std::span<const Matrix> parameters;
  Patches image;  // rows: [R, in * p * p], written by forward, read by backward
  PositionTable position;
  TokenLayout layout;
  Matrix out;  // [R, C], written
};
struct PatchEmbedBackward : PatchEmbedForward {  // out is not used; image.image is the image's gradient or null
  Matrix grad_out;                               // [R, C]
  std::span<const Matrix> grad_parameters;       // written; an empty view is not computed
  void* workspace = nullptr;                     // patch_embed_backward_workspace_bytes
};
int64_t patch_embed_backward_workspace_bytes(int64_t rows, int64_t hidden, int64_t patch_values, DType dtype);
void patch_embed_forward(const PatchEmbedForward& p, const Execution& exec);
void patch_embed_backward(const PatchEmbedBackward& p, const Execution& exec);

}  // namespace flexdit
