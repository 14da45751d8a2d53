// What can be wrong with a request.
#pragma once

#include "model/sampling_model.h"

namespace flexdit {

// Throws ArgumentError; fills in the config's size where none is given. Returns the dense grid.
Grid check_request(const SamplingModel::Prepared& prepared, SampleRequest& request);

}  // namespace flexdit
