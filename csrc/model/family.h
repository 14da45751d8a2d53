// Where the families of models differ: which parameters there are, in what style the blocks are, and when a clip's
// frames learn which they are.
#pragma once

#include <optional>

#include "flexdit/model.h"

namespace flexdit {

// One modulation layer for all blocks and a table for each, instead of a layer in each.
constexpr bool shares_modulation(const Config& c) { return c.family != ModelFamily::dit; }

// Where a part's parameters begin in model_parameters, if the model has it.
struct ParameterPlaces {
  std::optional<size_t> position;  // the fixed table of the config's grid; other families compute theirs
  size_t patch_embed = 0, timestep = 0;
  std::optional<size_t> resolution, aspect_ratio, label, caption, modulation;
  size_t first_block = 0;
};
ParameterPlaces parameter_places(const Config& c);

// Of block k of the flattened order, which alternate in Latte: even ones attend within a frame and read the caption,
// odd ones attend across the frames at one position (arXiv 2401.03048, variant 1).
constexpr bool has_cross(const Config& c, size_t k) {
  return c.caption_channels > 0 && (c.family == ModelFamily::pixart || (c.family == ModelFamily::latte && k % 2 == 0));
}
constexpr bool within_frames(const Config& c, size_t k) { return c.family == ModelFamily::latte && k % 2 == 0; }
constexpr bool across_frames(const Config& c, size_t k) { return c.family == ModelFamily::latte && k % 2 == 1; }
constexpr BlockStyle style_of(const Config& c, size_t k) { return {shares_modulation(c), has_cross(c, k)}; }
// How many parameters block k has in model_parameters, and how many the final layer.
size_t model_block_parameters(const Config& c, BlockKind kind, size_t k);
constexpr size_t final_parameters(const Config& c) { return shares_modulation(c) ? 3 : 4; }

constexpr size_t cross_index(const Config& c, size_t k) { return c.family == ModelFamily::latte ? k / 2 : k; }
int64_t cross_blocks(const Config& c);  // how many have it

// Latte adds the temporal embedding before its second block, here before the pooling block, module or dense block that
// holds it: the first block of that, or nothing in other models.
constexpr std::optional<size_t> time_place(const Config& c) {
  const int64_t module = c.generation_blocks + c.sparse_blocks + c.recovery_blocks + c.dense_blocks;
  const int64_t depth = c.num_pooling_blocks + c.num_sdtm * module + c.num_dense_blocks;
  if (c.family != ModelFamily::latte || depth < 2) return std::nullopt;
  return c.num_pooling_blocks || !c.num_sdtm ? 1 : 0;
}

}  // namespace flexdit
