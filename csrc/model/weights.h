// The tensors of a checkpoint: in one .safetensors file, or in several beside an index that says which is where.
#pragma once

#include "flexdit/safetensors.h"

namespace flexdit {

class Weights {
 public:
  // A folder with model.safetensors, or if it has none model.safetensors.index.json; or a file of these kinds. Throws
  // CheckpointError: files that are missing or broken, and shards that do not have just what the index says.
  explicit Weights(const std::string& path);
  Weights(Weights&&) = default;  // entries_ points into files_

  const SafetensorsEntry* find(std::string_view name) const;  // null if there is none
  const std::vector<const SafetensorsEntry*>& entries() const { return entries_; }  // in the order of their names
  const std::string& name() const { return name_; }  // of the file or the index
  bool usual_name() const;                           // as save_pretrained gives it
  // The configuration's JSON in the file's or index's metadata.
  const std::optional<std::string>& config() const { return config_; }

 private:
  void read_index();

  std::string name_;
  std::vector<SafetensorsFile> files_;
  std::vector<const SafetensorsEntry*> entries_;
  std::optional<std::string> config_;
};

}  // namespace flexdit
