// A trained model, FlexDiT, FlexPixArt or FlexLatte, from the folder that flexdit_ext's save_pretrained writes:
// config.json and model.safetensors, or shards of it and model.safetensors.index.json.
#pragma once

#include "flexdit/model.h"
#include "flexdit/safetensors.h"

namespace flexdit {

struct Checkpoint {
  Config config;
  DensitySchedule schedule;
  bool names_schedule = true;  // else it is the default one of the config's size, and other sizes have their own
  DType dtype = DType::float32;
  int64_t num_classes = 0;
  bool has_null_class = false;     // label num_classes is the null class, for classifier-free guidance
  std::vector<Matrix> parameters;  // model_parameters(config), contiguous, read-only: they may lie in the mapped file
  std::shared_ptr<const void> storage;  // keeps their memory; copies of a Checkpoint share it

  // `path` is the folder, a .safetensors file or an index of shards. The configuration comes from config.json beside the weights or from
  // their metadata (key "config"); config.json is asked first, except for weights of another name than
  // model.safetensors. With `dtype` the values are converted, otherwise patch_embed.weight's dtype is kept.
  // Throws CheckpointError: files that are missing, unreadable or broken, a configuration that is no such thing, and
  // tensors that do not fit it.
  static Checkpoint load(const std::string& path, std::optional<DType> dtype = {});
};

}  // namespace flexdit
