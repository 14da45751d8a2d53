// Values of one storage type into another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "flexdit/tensor.h"

namespace flexdit::io {

// To nearest even; a value beyond the target's range becomes infinity, NaN stays NaN. float64 reaches 16 bits by way of
// float32, as in PyTorch. `from` may lie at any address, `to` must be aligned for its dtype; they must not overlap.
void cast(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count);

}  // namespace flexdit::io
