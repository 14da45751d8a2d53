// A model's configuration as flexdit_ext/config.py and config_single.py write it.
#pragma once

#include <string>
#include <string_view>

#include "flexdit/model.h"

namespace flexdit {

struct ModelDescription {
  Config config;
  DensitySchedule schedule;
  bool names_schedule;  // else it is the default one
  int64_t num_classes;
  bool has_null_class;
};

// Keys that are left out have the defaults of FlexDiTConfig, or of the class that "_class_name" names. `source` is what
// messages call the text. Throws CheckpointError naming the field.
ModelDescription parse_config(std::string_view json, const std::string& source);

}  // namespace flexdit
