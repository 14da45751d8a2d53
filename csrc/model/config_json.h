// A model's configuration as flexdit_ext/config.py writes it.
#pragma once

#include <string>
#include <string_view>

#include "flexdit/model.h"

namespace flexdit {

struct ModelDescription {
  Config config;
  DensitySchedule schedule;
  int64_t num_classes;
  bool has_null_class;
};

// Keys that are left out have FlexDiTConfig's defaults. `source` is what messages call the text.
// Throws CheckpointError naming the field.
ModelDescription parse_config(std::string_view json, const std::string& source);

}  // namespace flexdit
