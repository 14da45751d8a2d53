// libFuzzer target: any text is a configuration within its limits, or a CheckpointError.
#include <cstdlib>

#include "files.h"
#include "model/config_json.h"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flexdit;
  const test::ExactBytes bytes(std::string(reinterpret_cast<const char*>(data), size));
  try {
    const ModelDescription d = parse_config(bytes.text(), "fuzz");
    const Config& c = d.config;
    require(c.hidden > 0 && c.hidden % c.num_heads == 0 && c.input_height % c.patch_size == 0);
    require(c.mlp_hidden > 0 && c.label_rows == d.num_classes + d.has_null_class);
    require(c.num_frames >= 1 && c.position_scale > 0);
    require(c.family == ModelFamily::dit ? c.label_rows > 0 && c.num_frames == 1 : c.max_caption_tokens > 0);
    require(c.family != ModelFamily::pixart || (c.caption_channels > 0 && c.label_rows == 0));
    require(c.num_pooling_blocks + c.num_sdtm + c.num_dense_blocks > 0);
    for (const double part : {0., 0.3, 1.}) {
      const Grid &sparse = d.schedule.grid(part * static_cast<double>(d.schedule.num_timesteps())),
                 dense = c.dense_grid();
      require(sparse.tokens() > 0 && sparse.frames <= dense.frames);
      require(sparse.height <= dense.height && sparse.width <= dense.width);
    }
  } catch (const CheckpointError&) {
  }
  return 0;
}
