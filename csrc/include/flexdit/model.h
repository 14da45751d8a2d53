// The full model, forward and backward: embedding, pooling blocks, sparse-dense token modules, dense blocks, final
// layer. All buffers belong to the caller.
#pragma once

#include "flexdit/block.h"

namespace flexdit {

struct Config {
  int64_t input_height = 32, input_width = 32;  // of the latent image
  int64_t patch_size = 2;
  int64_t in_channels = 4;
  int64_t out_channels = 8;  // 2 in_channels with learned sigma
  int64_t hidden = 1152;
  int64_t mlp_hidden = 4608;
  int64_t num_heads = 16;
  int64_t label_rows = 1001;  // classes and the null class
  int64_t num_pooling_blocks = 2;
  int64_t num_sdtm = 4;
  int64_t generation_blocks = 1, sparse_blocks = 3, recovery_blocks = 1, dense_blocks = 1;  // of a module
  int64_t num_dense_blocks = 2;
  bool reinject_position = false;
  int64_t timestep_features = 256;

  Grid dense_grid() const {
    return {1, static_cast<int32_t>(input_height / patch_size), static_cast<int32_t>(input_width / patch_size)};
  }
};

// All parameters, named as in flexdit_ext's state_dict, in the order that Model takes them. pos_embed comes first
// and has no gradient.
std::vector<ParameterSpec> model_parameters(const Config& config);

// Multiply-accumulates of a forward pass of one sample whose sparse tokens form `sparse`, as this library computes
// them: every linear layer and the attention scores, identities 1 and 2 of method.md used.
int64_t model_macs(const Config& config, Grid sparse);

struct ModelForward {
  Config config;
  std::span<const Matrix> parameters;
  DType dtype = DType::float32;
  int64_t batch = 0;
  const void* x = nullptr;          // [B, in_channels, H, W], contiguous, of dtype
  const double* t = nullptr;        // [B] timesteps
  Matrix timestep_features;         // [B, F] instead of t, or empty
  const int64_t* labels = nullptr;  // [B]
  TokenLayout sparse_layout;        // of the samples' sparse tokens; empty without modules
  void* out = nullptr;              // [B, out_channels, H, W], contiguous, written
  void* context = nullptr;          // model_context_bytes, or null: nothing is kept
  void* workspace = nullptr;        // model_workspace_bytes
};
struct ModelBackward : ModelForward {       // out is not used, context is read
  const void* grad_out = nullptr;           // [B, out_channels, H, W], contiguous
  void* grad_x = nullptr;                   // [B, in_channels, H, W], contiguous, written, or null
  std::span<const Matrix> grad_parameters;  // written; an empty view is not computed
};

int64_t model_context_bytes(const ModelForward& p);
int64_t model_workspace_bytes(const ModelForward& p, bool keeps_context);
int64_t model_backward_workspace_bytes(const ModelForward& p);
void model_forward(const ModelForward& p, const Execution& exec);
void model_backward(const ModelBackward& p, const Execution& exec);

}  // namespace flexdit
