// Errors and checkpoints of the C interface.
#include <cstdio>

#include "c_api/internal.h"

using namespace flexdit;
using namespace flexdit::c_api;

namespace {

static_assert(static_cast<int>(DType::float32) == FLEXDIT_FLOAT32 &&
              static_cast<int>(DType::bfloat16) == FLEXDIT_BFLOAT16 &&
              static_cast<int>(DType::float16) == FLEXDIT_FLOAT16 &&
              static_cast<int>(DType::float64) == FLEXDIT_FLOAT64);
static_assert(static_cast<int>(ModelFamily::dit) == FLEXDIT_DIT &&
              static_cast<int>(ModelFamily::pixart) == FLEXDIT_PIXART &&
              static_cast<int>(ModelFamily::latte) == FLEXDIT_LATTE);

thread_local char last_error[2048] = "";  // of a fixed size: telling a failure must not fail

std::optional<DType> dtype_from(flexdit_dtype dtype) {
  require(dtype >= FLEXDIT_KEEP_DTYPE && dtype <= FLEXDIT_FLOAT64,
          "dtype is " + std::to_string(dtype) + ", must be one of the FLEXDIT_ dtypes, -1 to 3");
  if (dtype == FLEXDIT_KEEP_DTYPE) return {};
  return static_cast<DType>(dtype);
}

int64_t property_of(const Checkpoint& c, flexdit_property property) {
  int64_t count = 0;
  switch (property) {
    case FLEXDIT_INPUT_HEIGHT:
      return c.config.input_height;
    case FLEXDIT_INPUT_WIDTH:
      return c.config.input_width;
    case FLEXDIT_IN_CHANNELS:
      return c.config.in_channels;
    case FLEXDIT_OUT_CHANNELS:
      return c.config.out_channels;
    case FLEXDIT_NUM_CLASSES:
      return c.num_classes;
    case FLEXDIT_HAS_NULL_CLASS:
      return c.has_null_class;
    case FLEXDIT_NUM_TIMESTEPS:
      return c.schedule.num_timesteps();
    case FLEXDIT_DTYPE:
      return static_cast<int64_t>(c.dtype);
    case FLEXDIT_PATCH_SIZE:
      return c.config.patch_size;
    case FLEXDIT_FAMILY:
      return static_cast<int64_t>(c.config.family);
    case FLEXDIT_NUM_FRAMES:
      return c.config.num_frames;
    case FLEXDIT_CAPTION_CHANNELS:
      return c.config.caption_channels;
    case FLEXDIT_MAX_CAPTION_TOKENS:
      return c.config.max_caption_tokens;
    case FLEXDIT_SIZE_CONDITIONS:
      return c.config.size_conditions;
    case FLEXDIT_NUM_PARAMETERS:
      for (const Matrix& m : c.parameters) count += m.rows * m.cols;
      return count;
  }
  throw ArgumentError("property is " + std::to_string(property) + ", must be one of flexdit_property, 0 to 14");
}

}  // namespace

flexdit_status flexdit::c_api::fail(flexdit_status status, const char* message) {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

const char* flexdit_version(void) { return FLEXDIT_VERSION; }

const char* flexdit_last_error(void) { return last_error; }

flexdit_status flexdit_checkpoint_load(const char* path, flexdit_dtype dtype, flexdit_checkpoint** checkpoint) {
  return guarded([&] {
    require_pointer(checkpoint, "checkpoint");
    *checkpoint = nullptr;
    require_pointer(path, "path");
    *checkpoint = new flexdit_checkpoint{Checkpoint::load(path, dtype_from(dtype))};
  });
}

void flexdit_checkpoint_free(flexdit_checkpoint* checkpoint) { delete checkpoint; }

flexdit_status flexdit_checkpoint_get(const flexdit_checkpoint* checkpoint, flexdit_property property, int64_t* value) {
  return guarded([&] {
    require_pointer(checkpoint, "checkpoint");
    require_pointer(value, "value");
    *value = property_of(checkpoint->value, property);
  });
}
